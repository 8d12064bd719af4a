"""Losses per item and dimension: (B,), the mean over an item's dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import NetworkDenoiser, Prediction
from undiffuse.likelihood.decoder import Decoder, Edges, clean_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import step_nll, vlb
from undiffuse.networks.condition import Condition
from undiffuse.process.gaussian import Gaussian, diffuse, posterior, reverse
from undiffuse.process.learned_schedule import LearnedSchedule
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.prior import prior_kl
from undiffuse.process.seeded_noise import Noise
from undiffuse.process.statistics import item_mean
from undiffuse.process.target import Target


def weighted_mse(
    y_hat: Tensor,
    target: Target,
    x: Tensor,
    eps: Tensor,
    w_eps: Tensor,
    t: NoiseLevel,
    s: NoiseLevel | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """w_y ‖y − ŷ‖² with w_y = w_eps (alpha/D)²: the loss w_eps ‖eps − ε̂‖² in the frame of the network's output.

    ``y_hat`` (B, ...) is the network's output, ``w_eps`` () or (B,) the weight in the frame of eps.
    """
    error = item_mean((target.combine(x, eps, t, s, z) - y_hat) ** 2)
    return broadcast_like(target.weight(w_eps, t, s), error) * error


def eps_mse(prediction: Prediction, eps: Tensor) -> Tensor:
    """‖eps − ε̂‖², L_simple [Ho20 eq. 14]."""
    return item_mean((eps - prediction.eps) ** 2)


def mean_matching(prediction: Prediction, x: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """‖μ̃(x_t, x) − μ(x_t)‖², the means of posterior and reverse step [Ho20 eq. 8]."""
    return item_mean((posterior(x_t, x, t, s).mean - reverse(prediction, x_t, t, s).mean) ** 2)


def bound_term(
    model: Gaussian, x: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, edges: Edges | None = None
) -> Tensor:
    """KL(q(x_s given x_t, x) to p(x_s given x_t))/dims, or −log p(x given x_t)/dims at the last step: nats per dim.

    ``model`` is p(x_s given x_t), such as `ReverseChain.step`; see `step_nll`.
    """
    return item_mean(step_nll(model, x, x_t, t, s, edges))


def full_bound(
    chain: ReverseChain, x: Tensor, noise: Noise, edges: Edges | None = None, decode: Decoder | None = None
) -> Tensor:
    """(L_T + Σ L_{t−1} + L_0)/dims, every step of the chain in one loss, nats per dimension [SohlDickstein15 eq. 14].

    `vlb` with its gradient: the activations of all network calls are kept for the backward pass. T times `bound_term`
    at a uniform step has the same mean, and its gradient has the same mean.
    """
    return vlb(chain, x, noise, edges=edges, decode=decode).total / x[0].numel()


def hybrid(
    prediction: Prediction,
    eps: Tensor,
    x: Tensor,
    x_t: Tensor,
    t: NoiseLevel,
    s: NoiseLevel,
    chain_length: int,
    vlb_weight: float = 0.001,
    edges: Edges | None = None,
) -> Tensor:
    """L_simple + vlb_weight · T · L_{t−1}, L_{t−1} with learned variance and no gradient to the mean [Nichol21 eq. 16].

    L_{t−1} is in nats per dimension. The paper's code has bits: its 0.001 is ``vlb_weight`` = 0.001/ln 2 here.
    """
    model = reverse(prediction._replace(x=prediction.x.detach()), x_t, t, s, "learned")
    return eps_mse(prediction, eps) + vlb_weight * chain_length * bound_term(model, x, x_t, t, s, edges)


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

    ``rate`` (B,) is d log_snr/dt, divided by the density of t if t is not uniform. Nats per dimension, in the frame
    of the network's output.
    """
    return weighted_mse(y_hat, target, x, eps, -0.5 * rate, t, s)


def continuous_bound(
    denoise: NetworkDenoiser,
    x: Tensor,
    at: Tensor,
    log_density: Tensor,
    eps: Tensor,
    decode: Decoder | None = None,
    cond: Condition | None = None,
) -> Tensor:
    """`continuous` at the times ``at`` (B,), drawn with density exp(``log_density``), for any schedule.

    A learned schedule, whose times are uniform, gets its gradients in the same backward pass: the ends that of the
    bound, to which `endpoint_loss` is added, and the shape that of the estimator's variance
    (`reweight_schedule_gradient`).
    """
    schedule, shape = denoise.schedule, ()
    if isinstance(schedule, LearnedSchedule):
        shape = schedule.shape(at)
        t, rate = schedule.levels_from_shape(at, *shape)
    else:
        t, rate = schedule(at), schedule.log_snr_rate(at) * torch.exp(-log_density)
    y, *_ = denoise.outputs(diffuse(x, t, eps), t, cond)
    loss = continuous(y, denoise.target, x, eps, rate, t, denoise.next_level(t))
    reweight_schedule_gradient(loss, shape)
    if isinstance(schedule, LearnedSchedule) and schedule.learns_ends:
        return loss + endpoint_loss(x, eps, schedule(1.0), schedule(0.0), decode).to(loss)
    return loss


def endpoint_loss(x: Tensor, eps: Tensor, top: NoiseLevel, clean: NoiseLevel, decode: Decoder | None = None) -> Tensor:
    """(KL(q(z_1|x) to N(0, I)) − log p(x|z_0))/dims: the bound's terms at its two ends [VDM21 §3.5].

    ``decode`` gives p(x|z_0), by default the density N(z_0/alpha_0, sigma_0²/alpha_0²) of continuous data.
    """
    zero = torch.zeros_like(x, dtype=torch.float64)
    return item_mean(prior_kl(x.double(), top, Gaussian(zero, zero)) + clean_nll(x, clean, eps, decode))


def reweight_schedule_gradient(loss: Tensor, shape: Sequence[Tensor]) -> None:
    """Register hooks that turn the gradient w.r.t. the schedule's ``shape``, (B,) each, into that of E[loss²].

    VDM app. I.2: minimize the estimator's variance. d loss²/d shape is 2 loss times d loss/d shape, item by item, so
    no second pass is needed. The mean of the loss does not depend on the shape, so this is the gradient of the
    variance.
    """
    factor = 2 * loss.detach().to(device="cpu", dtype=torch.float64)
    for part in shape:
        if part.requires_grad:
            part.register_hook(lambda gradient: gradient * factor)
