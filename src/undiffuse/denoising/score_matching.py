"""Scores, the gradients of log-densities: their closed forms, the losses that match them, two lemmas.

A `Score` maps x_t (B, ...) to ∇ log p(x_t) of that shape, each item on its own. Losses are per item and per dimension,
(B,), as in `undiffuse.model.losses`, and all have the factor ½ of their papers, so that `explicit`, `implicit`,
`denoising` and `sliced` differ in expectation by constants only. `implicit` and `sliced` differentiate the score with
respect to x_t: they detach x_t as a new leaf and switch off fused attention, which has no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.denoising.denoiser import Denoiser, Prediction
from undiffuse.networks.condition import Condition
from undiffuse.process.gaussian import diffuse
from undiffuse.process.noise_level import NoiseLevel, as_float64, broadcast_like
from undiffuse.process.statistics import item_mean

Score = Callable[[Tensor], Tensor]


def conditional_score(eps: Tensor, level: NoiseLevel) -> Tensor:
    """∇ log q(x_t given x) = −eps/sigma, at x_t = alpha x + sigma eps [Vincent11 §4.2]."""
    return -eps / broadcast_like(level.sigma, eps)


def score_from_prediction(prediction: Prediction, level: NoiseLevel) -> Tensor:
    """∇ log p(x_t) = −ε̂/sigma, the score of a denoiser's prediction [Ho20 §3.2; Song21 eq. 7]."""
    return conditional_score(prediction.eps, level)


def as_score(denoise: Denoiser, level: NoiseLevel, cond: Condition | None = None) -> Score:
    """x_t ↦ −ε̂(x_t)/sigma: a denoiser at one ``level``, () or (B,), as a score."""
    return lambda x_t: score_from_prediction(denoise(x_t, level, cond), level)


def tweedie(x_t: Tensor, score: Tensor, level: NoiseLevel) -> Tensor:
    """E[x given x_t] = (x_t + sigma² score)/alpha, from the score of q(x_t) at x_t [Robbins56; Efron11 eq. 1.4]."""
    at = level.broadcast_like(x_t)
    return (x_t + at.sigma**2 * score) / at.alpha


def posterior_covariance(score: Score, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """Cov[x given x_t] = (sigma/alpha)² (I + sigma² ∂score/∂x_t), (B, D, D) for items of D elements [Efron11 §2].

    It takes D backward passes.
    """
    leaf, value = _evaluate(score, x_t)
    jacobian = torch.stack([_vjp(value, leaf, axis).flatten(1) for axis in _axes(value)], 1).detach()
    at = level.broadcast_like(jacobian)
    return (at.sigma / at.alpha) ** 2 * (torch.eye(jacobian.shape[1]).to(jacobian) + at.sigma**2 * jacobian)


def explicit(score: Score, x_t: Tensor, true_score: Tensor) -> Tensor:
    """½ ‖score(x_t) − ∇ log q(x_t)‖², the integrand of the Fisher divergence [Hyvarinen05 eq. 2]."""
    return 0.5 * item_mean((score(x_t) - true_score) ** 2)


def implicit(score: Score, x_t: Tensor) -> Tensor:
    """½ ‖score(x_t)‖² + tr ∂score/∂x_t, exactly, in D backward passes [Hyvarinen05 theorem 1].

    In expectation over q(x_t) it is `explicit` less ½ E‖∇ log q(x_t)‖².
    """
    leaf, value = _evaluate(score, x_t)
    trace = torch.stack([item_mean(axis * _vjp(value, leaf, axis)) for axis in _axes(value)]).sum(0)
    return _keep_graph_if_enabled(0.5 * item_mean(value**2) + trace)


def sliced(score: Score, x_t: Tensor, projections: Tensor, reduced: bool = False) -> Tensor:
    """Mean over v of vᵀ (∂score/∂x_t) v + ½ (vᵀ score)², v one of ``projections`` (M, B, ...) [Song19b].

    With E v vᵀ = I (normal noise or random signs) it is `implicit` in expectation; ``reduced`` replaces
    ½ (vᵀ score)² by its mean ½ ‖score‖², which lowers the variance [Song19b, SSM-VR].
    """
    leaf, value = _evaluate(score, x_t)
    terms = []
    for v in projections:
        along = (v * value).flatten(1).sum(1)
        square = item_mean(value**2) if reduced else along**2 / v[0].numel()
        terms.append(item_mean(v * _vjp(value, leaf, v)) + 0.5 * square)
    return _keep_graph_if_enabled(torch.stack(terms).mean(0))


def denoising(score: Score, x: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """½ ‖score(x_t) + eps/sigma‖², x_t = alpha x + sigma eps [Vincent11 §4.2; Song19 eq. 5].

    In expectation it is `explicit` plus ½ (1/sigma² − E‖∇ log q(x_t)‖²), the square per dimension.
    """
    return explicit(score, diffuse(x, level, eps), conditional_score(eps, level))


def noise_form(prediction: Prediction, eps: Tensor, level: NoiseLevel) -> Tensor:
    """½ ‖eps − ε̂‖²/sigma², which is `denoising` with a denoiser's score [Ho20 §3.2]."""
    return 0.5 * item_mean(((eps - prediction.eps) / broadcast_like(level.sigma, eps)) ** 2)


def stein(f: Score, mean: Tensor | float, std: Tensor | float, nodes: int = 64) -> tuple[Tensor, Tensor]:
    """(E[(Y − mean) f(Y)], std² E[f′(Y)]) for Y ~ N(mean, std²), which are equal [Stein81 lemma 1].

    ``f`` acts elementwise; ``mean`` and ``std`` are () or (B,). Both sides by Gauss-Hermite
    quadrature, float64, exact for polynomials of degree below 2 ``nodes`` − 1.
    """
    points, weights = (as_float64(v.tolist()) for v in hermegauss(nodes))
    mean, std = as_float64(mean), as_float64(std)
    y, value = _evaluate(f, mean[..., None] + std[..., None] * points)
    slope = _vjp(value, y, torch.ones_like(value))
    weights = weights / weights.sum()
    return ((y - mean[..., None]) * value @ weights).detach(), (std**2 * (slope @ weights)).detach()


def _evaluate(score: Score, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t as a leaf, the score there with its graph)."""
    leaf = x_t.detach().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return leaf, score(leaf) + 0 * leaf  # so that a constant score has a gradient too


def _vjp(value: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
    """vᵀ ∂value/∂leaf, itself differentiable."""
    return torch.autograd.grad(value, leaf, v, create_graph=True)[0]


def _axes(value: Tensor) -> Iterator[Tensor]:
    """The unit vectors of an item's elements, each expanded to the batch."""
    for axis in torch.eye(value[0].numel()).to(value):
        yield axis.reshape(value.shape[1:]).expand_as(value)


def _keep_graph_if_enabled(loss: Tensor) -> Tensor:
    """``loss`` with its graph where gradients are being recorded, else without."""
    return loss if torch.is_grad_enabled() else loss.detach()
