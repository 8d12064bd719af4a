"""Losses, per item and per dimension: (B,), the mean over an item's numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser, NetworkDenoiser, Prediction
from undiffuse.likelihood.discrete import Edges, clean_nll, prior_kl, step_nll, vlb
from undiffuse.process.gaussian import Gaussian, Variance, diffuse, posterior, reverse
from undiffuse.process.learned import Learned
from undiffuse.process.level import NoiseLevel
from undiffuse.process.target import Target
from undiffuse.randomness import Noise


def matching(
    y_hat: Tensor,
    target: Target,
    x: Tensor,
    eps: Tensor,
    w_eps: Tensor,
    t: NoiseLevel,
    s: NoiseLevel | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """w_y ‖y − ŷ‖² with w_y = w_eps (alpha/D)²: the loss w_eps ‖eps − ε̂‖² in the frame of what the network says.

    ``y_hat`` (B, ...) is the network's output, ``w_eps`` () or (B,) the weight in the frame of eps.
    """
    error = flat_mean((target.encode(x, eps, t, s, z) - y_hat) ** 2)
    return target.weight(w_eps, t, s).to(error) * error


def simple(prediction: Prediction, eps: Tensor) -> Tensor:
    """‖eps − ε̂‖², L_simple [Ho20 eq. 14]."""
    return flat_mean((eps - prediction.eps) ** 2)


def weighted(prediction: Prediction, eps: Tensor, w_eps: Tensor) -> Tensor:
    """w_eps ‖eps − ε̂‖² for any denoiser; see `matching` for a network's own frame."""
    return w_eps.to(eps) * simple(prediction, eps)


def mean_matching(prediction: Prediction, x: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """‖μ̃(x_t, x) − μ(x_t)‖², the means of posterior and reverse step [Ho20 eq. 8]."""
    return flat_mean((posterior(x_t, x, t, s).mean - reverse(prediction, x_t, t, s).mean) ** 2)


def bound_term(
    prediction: Prediction,
    x: Tensor,
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    variance: Variance = "small",
    edges: Edges | None = None,
) -> Tensor:
    """The bound's term of the step from t to s, nats per dimension; see `likelihood.step_nll`."""
    return flat_mean(step_nll(prediction, x, x_t, t, s, variance, edges=edges))


def full_bound(
    denoise: Denoiser,
    x: Tensor,
    levels: Sequence[NoiseLevel],
    noise: Noise,
    variance: Variance = "small",
    edges: Edges | None = None,
    cond: Condition | None = None,
) -> Tensor:
    """(L_T + Σ L_{t−1} + L_0)/dims, every step of the chain in one loss, nats per dimension [SohlDickstein15 eq. 14].

    `likelihood.vlb` with its gradient: all calls of the network are held for the backward pass. T times
    `bound_term` at a uniform step has the same mean, and the same gradient in the mean.
    """
    return vlb(denoise, x, levels, noise, cond=cond, variance=variance, edges=edges).total / x[0].numel()


def hybrid(
    prediction: Prediction,
    eps: Tensor,
    x: Tensor,
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    steps: int,
    share: float = 0.001,
    edges: Edges | None = None,
) -> Tensor:
    """L_simple + share · T · L_{t−1}, the latter with learned variance, no gradient to the mean [Nichol21 eq. 16].

    L_{t−1} is in nats per dimension. The paper's code counts it in bits: its 0.001 is ``share`` = 0.001/ln 2 here.
    """
    still = prediction._replace(x=prediction.x.detach())
    return simple(prediction, eps) + share * steps * bound_term(still, x, x_t, t, s, "learned", edges)


def continuous(
    y_hat: Tensor,
    target: Target,
    x: Tensor,
    eps: Tensor,
    rate: Tensor,
    t: NoiseLevel,
    s: NoiseLevel | None = None,
) -> Tensor:
    """½ (−d log_snr/dt) ‖eps − ε̂‖², whose mean over t in [0, 1] is the bound's integral over log_snr [VDM21 §5].

    ``rate`` (B,) is d log_snr/dt, over the density of t where t is not uniform. Nats per dimension, in the frame
    of what the network says.
    """
    return matching(y_hat, target, x, eps, -0.5 * rate, t, s)


def continuous_bound(
    denoise: NetworkDenoiser,
    x: Tensor,
    at: Tensor,
    log_density: Tensor,
    eps: Tensor,
    edges: Edges | None = None,
    cond: Condition | None = None,
) -> Tensor:
    """`continuous` at the times ``at`` (B,), drawn with exp(``log_density``), for any schedule of the denoiser's.

    A learned one, whose times are uniform, gets its gradients in the same backward pass: its ends that of the
    bound, for which `ends` is added, and its shape that of the estimate's variance (`cut_variance`).
    """
    schedule, curve = denoise.schedule, ()
    if isinstance(schedule, Learned):
        curve = schedule.curve(at)
        t, rate = schedule.bend(at, *curve)
    else:
        t, rate = schedule(at), schedule.log_snr_rate(at) * torch.exp(-log_density)
    y, _ = denoise.outputs(diffuse(x, t, eps), t, cond)
    loss = continuous(y, denoise.target, x, eps, rate, t, denoise.aim(t))
    cut_variance(loss, curve)
    if isinstance(schedule, Learned) and schedule.learns_ends:
        return loss + ends(x, eps, schedule(1.0), schedule(0.0), edges).to(loss)
    return loss


def ends(x: Tensor, eps: Tensor, top: NoiseLevel, clean: NoiseLevel, edges: Edges | None = None) -> Tensor:
    """(KL(q(z_1|x) to N(0, I)) − log p(x|z_0))/dims: what the bound adds at its preserving ends [VDM21 §3.5]."""
    x, still = x.double(), torch.zeros_like(x, dtype=torch.float64)
    return flat_mean(prior_kl(x, top, Gaussian(still, still)) + clean_nll(x, clean, eps.double(), edges))


def cut_variance(loss: Tensor, curve: Sequence[Tensor]) -> None:
    """Makes what the backward pass brings to ``curve``, (B,) each, the gradient of loss² [VDM21 app. I.2].

    Item by item that is 2 loss times as much, so it takes no second pass. Where the mean of the loss does not depend
    on what the curve is made of, as the bound does not on a schedule's shape, it is the gradient of the variance.
    """
    factor = 2 * loss.detach().to(device="cpu", dtype=torch.float64)
    for part in curve:
        if part.requires_grad:
            part.register_hook(lambda gradient: gradient * factor)


def flat_mean(values: Tensor) -> Tensor:
    """Mean over all but the first dimension."""
    return values.flatten(1).mean(1)
