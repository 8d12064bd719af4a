"""Scores, the gradients of log-densities: their closed forms, the losses that match them, two lemmas.

A `Score` maps x_t (B, ...) to ∇ log p(x_t) of that shape, each item from itself alone. Losses are per item
and per dimension, (B,), as in `undiffuse.loss`, and all carry the factor ½ of their papers, so that
`explicit`, `implicit`, `denoising` and `sliced` differ in expectation by constants only. `implicit` and
`sliced` differentiate the score by x_t: for that they take x_t as a leaf of its own, and fused attention is
switched off, which has no second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser, Prediction
from undiffuse.process.gaussian import diffuse
from undiffuse.process.level import NoiseLevel, double, like

Score = Callable[[Tensor], Tensor]


def conditional(eps: Tensor, level: NoiseLevel) -> Tensor:
    """∇ log q(x_t given x) = −eps/sigma, at x_t = alpha x + sigma eps [Vincent11 §4.2]."""
    return -eps / like(level.sigma, eps)


def predicted(prediction: Prediction, level: NoiseLevel) -> Tensor:
    """∇ log p(x_t) = −ε̂/sigma, the score that a denoiser's prediction is [Ho20 §3.2; Song21 eq. 7]."""
    return conditional(prediction.eps, level)


def function(denoise: Denoiser, level: NoiseLevel, cond: Condition | None = None) -> Score:
    """x_t ↦ −ε̂(x_t)/sigma: a denoiser at one ``level``, () or (B,), as a score."""
    return lambda x_t: predicted(denoise(x_t, level, cond), level)


def tweedie(x_t: Tensor, score: Tensor, level: NoiseLevel) -> Tensor:
    """E[x given x_t] = (x_t + sigma² score)/alpha, from the score of q(x_t) at x_t [Robbins56; Efron11 eq. 1.4]."""
    at = level.like(x_t)
    return (x_t + at.sigma**2 * score) / at.alpha


def posterior_covariance(score: Score, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """Cov[x given x_t] = (sigma/alpha)² (I + sigma² ∂score/∂x_t), (B, D, D) for items of D numbers [Efron11 §2].

    It takes D backward passes.
    """
    leaf, value = _evaluate(score, x_t)
    jacobian = torch.stack([_pull(value, leaf, axis).flatten(1) for axis in _axes(value)], 1).detach()
    at = level.like(jacobian)
    return (at.sigma / at.alpha) ** 2 * (torch.eye(jacobian.shape[1]).to(jacobian) + at.sigma**2 * jacobian)


def explicit(score: Score, x_t: Tensor, known: Tensor) -> Tensor:
    """½ ‖score(x_t) − known‖², the Fisher divergence's integrand: ``known`` is ∇ log q(x_t) [Hyvarinen05 eq. 2]."""
    return 0.5 * _mean((score(x_t) - known) ** 2)


def implicit(score: Score, x_t: Tensor) -> Tensor:
    """½ ‖score(x_t)‖² + tr ∂score/∂x_t, exactly, in D backward passes [Hyvarinen05 theorem 1].

    In expectation over q(x_t) it is `explicit` less ½ E‖∇ log q(x_t)‖².
    """
    leaf, value = _evaluate(score, x_t)
    trace = torch.stack([_mean(axis * _pull(value, leaf, axis)) for axis in _axes(value)]).sum(0)
    return _as_asked(0.5 * _mean(value**2) + trace)


def sliced(score: Score, x_t: Tensor, projections: Tensor, reduced: bool = False) -> Tensor:
    """Mean over v of vᵀ (∂score/∂x_t) v + ½ (vᵀ score)², v one of ``projections`` (M, B, ...) [Song19b].

    With E v vᵀ = I (normal numbers or random signs) it is `implicit` in expectation; ``reduced`` takes
    ½ ‖score‖² for ½ (vᵀ score)², which is its mean, and so has less variance [Song19b, SSM-VR].
    """
    leaf, value = _evaluate(score, x_t)
    terms = []
    for v in projections:
        along = (v * value).flatten(1).sum(1)
        square = _mean(value**2) if reduced else along**2 / v[0].numel()
        terms.append(_mean(v * _pull(value, leaf, v)) + 0.5 * square)
    return _as_asked(torch.stack(terms).mean(0))


def denoising(score: Score, x: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """½ ‖score(x_t) + eps/sigma‖², x_t = alpha x + sigma eps [Vincent11 §4.2; Song19 eq. 5].

    In expectation it is `explicit` plus ½ (1/sigma² − E‖∇ log q(x_t)‖²), the square per dimension.
    """
    return explicit(score, diffuse(x, level, eps), conditional(eps, level))


def noise_form(prediction: Prediction, eps: Tensor, level: NoiseLevel) -> Tensor:
    """½ ‖eps − ε̂‖²/sigma², which is `denoising` of a denoiser's score [Ho20 §3.2]."""
    return 0.5 * _mean(((eps - prediction.eps) / like(level.sigma, eps)) ** 2)


def stein(f: Score, mean: Tensor | float, std: Tensor | float, nodes: int = 64) -> tuple[Tensor, Tensor]:
    """(E[(Y − mean) f(Y)], std² E[f′(Y)]) for Y ~ N(mean, std²), which are equal [Stein81 lemma 1].

    ``f`` acts on each number alone; ``mean`` and ``std`` are () or (B,). Both sides by Gauss-Hermite
    quadrature, float64, exact for polynomials of degree below 2 ``nodes`` − 1.
    """
    where, share = (double(v.tolist()) for v in hermegauss(nodes))
    mean, std = double(mean), double(std)
    y, value = _evaluate(f, mean[..., None] + std[..., None] * where)
    slope = _pull(value, y, torch.ones_like(value))
    share = share / share.sum()
    return ((y - mean[..., None]) * value @ share).detach(), (std**2 * (slope @ share)).detach()


def _evaluate(score: Score, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t as a leaf, and the score there with the graph that leads to it."""
    leaf = x_t.detach().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        return leaf, score(leaf) + 0 * leaf  # a constant score has a gradient too


def _pull(value: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
    """vᵀ ∂value/∂leaf, itself differentiable."""
    return torch.autograd.grad(value, leaf, v, create_graph=True)[0]


def _axes(value: Tensor) -> Iterator[Tensor]:
    """The unit vectors of an item's numbers, each for the whole batch."""
    for axis in torch.eye(value[0].numel()).to(value):
        yield axis.reshape(value.shape[1:]).expand_as(value)


def _mean(values: Tensor) -> Tensor:
    """Over an item's numbers."""
    return values.flatten(1).mean(1)


def _as_asked(loss: Tensor) -> Tensor:
    """``loss`` with its graph where gradients are being recorded, else without."""
    return loss if torch.is_grad_enabled() else loss.detach()
