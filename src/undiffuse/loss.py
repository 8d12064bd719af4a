"""Losses, per item and per dimension: (B,), the mean over an item's numbers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser, Prediction
from undiffuse.likelihood.discrete import Edges, step_nll, vlb
from undiffuse.process.gaussian import Variance, posterior, reverse
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


def flat_mean(values: Tensor) -> Tensor:
    """Mean over all but the first dimension."""
    return values.flatten(1).mean(1)
