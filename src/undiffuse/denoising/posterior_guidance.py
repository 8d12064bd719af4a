"""Posterior guidance: E[x given x_t, y] from E[x given x_t] for an observation y, with every solver and likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import DenoiserWrapper, Prediction
from undiffuse.denoising.linear_operators import DecodedOperator, LinearOperator
from undiffuse.errors import ConfigError
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel, broadcast_like, transition_frac

VJP = Callable[[Tensor], Tensor]
"""v (B, *y.shape) ↦ (sigma²/alpha) J A' v, of x's shape, with J = dx̂/dx_t: a change of x̂."""


class Observation(NamedTuple):
    """y = A x + noise_std n: ``y`` (B, ...), or (1, ...) for all items; A decode(x) in place of A x for latents x."""

    operator: LinearOperator | DecodedOperator
    y: Tensor
    noise_std: float = 0.0


@dataclass(frozen=True)
class PosteriorGuidance(DenoiserWrapper):
    """x̂ + (sigma²/alpha) J A' v and ε̂ to match, x_t = alpha x̂ + sigma ε̂: the base of `MMPS`, `PiGDM` and `DPS`.

    J' A' v = ∇ log p(y given x_t) for a Gaussian p around A x̂, with J = dx̂/dx_t; the methods differ in the weights v
    of the residual y − A x̂. For an exact denoiser J = J', because (sigma²/alpha) J is a covariance. For a network J u
    looks like a change of an image, while J' u is dominated by the input directions to which the network is most
    sensitive. So J u is used, as (x̂(x_t + h u) − x̂(x_t))/h with ``fd_step`` = h rms(u)/sigma: one call of any denoiser
    for each u. ``fd_step=None`` uses J' u by autograd, as the papers do. Where alpha is 0, x_t does not depend on x
    and the prediction stays as it is. Gradients flow through the result if x_t requires them, as in the flow's
    likelihood. Of latents, A is the derivative of the observation of what the decoder makes of x̂, at x̂.
    """

    observation: Observation
    fd_step: float | None = field(default=0.05, kw_only=True)

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        operator, y, _ = self.observation
        at, graph = level.broadcast_like(x_t), torch.is_grad_enabled() and x_t.requires_grad
        scale = torch.where(at.alpha > 0, at.sigma**2 / at.alpha, 0)
        with torch.set_grad_enabled(graph or self.fd_step is None):
            leaf = x_t if graph or self.fd_step is not None else x_t.detach().requires_grad_()
            x, eps, var_interp = self.denoise(leaf, level, cond, next_level)

        def vjp(v: Tensor) -> Tensor:
            u = linear.adjoint(v)
            if self.fd_step is None:
                return scale * torch.autograd.grad(x, leaf, u, retain_graph=True, create_graph=graph)[0]
            length = broadcast_like(u.detach().flatten(1).square().mean(1).sqrt().clamp(min=1e-20), u)
            h = self.fd_step * at.sigma / length
            return scale * (self.denoise(x_t + h * u, level, cond, next_level).x - x) / h

        with torch.set_grad_enabled(graph):
            observed, linear = operator.linearize(x)
            shift = vjp(self.residual_weights(y.to(x) - observed, linear, vjp, level, next_level))
            eps = eps - at.alpha / at.sigma * shift
            return Prediction(x + shift, eps, var_interp if graph or var_interp is None else var_interp.detach())

    def residual_weights(
        self, residual: Tensor, operator: LinearOperator, vjp: VJP, level: NoiseLevel, s: NoiseLevel | None
    ) -> Tensor:
        """v (B, *y.shape) of the ``residual`` y − A x̂ at ``level``, in a step to ``s``; ``operator`` is A at x̂."""
        raise NotImplementedError


@dataclass(frozen=True)
class MMPS(PosteriorGuidance):
    """v = (noise_std² I + A C A')⁻¹ (y − A x̂) with C = (sigma²/alpha) J, that of x given x_t [Rozet24 eq. 14].

    Moment matching: p(x given x_t) is approximated by the Gaussian of its own mean and covariance, so that on Gaussian
    data x̂ is E[x given x_t, y] itself. The system is solved by ``iterations`` of conjugate gradients, each with one
    product with J. As many as y has elements solve it exactly; fewer leave directions of small variance to the prior.
    """

    iterations: int = 5

    def residual_weights(
        self, residual: Tensor, operator: LinearOperator, vjp: VJP, level: NoiseLevel, s: NoiseLevel | None
    ) -> Tensor:
        std = self.observation.noise_std
        return conjugate_gradients(lambda v: std**2 * v + operator(vjp(v)), residual, self.iterations)


@dataclass(frozen=True)
class PiGDM(PosteriorGuidance):
    """v = (noise_std² I + r² A A')⁻¹ (y − A x̂), r² = d² sigma²/(alpha² d² + sigma²) [Song23 eq. 8, §3.2].

    ``data_std`` = d: the covariance of x given x_t is approximated by that of data N(m, d² I), theirs with d = 1; on
    such data it is exact. A A' is inverted by ``iterations`` of conjugate gradients, which need no product with J.
    """

    data_std: float = 1.0
    iterations: int = 50

    def residual_weights(
        self, residual: Tensor, operator: LinearOperator, vjp: VJP, level: NoiseLevel, s: NoiseLevel | None
    ) -> Tensor:
        std, d = self.observation.noise_std, self.data_std
        spread = broadcast_like((d * level.sigma) ** 2 / ((d * level.alpha) ** 2 + level.sigma**2), residual)
        apply = lambda v: std**2 * v + spread * operator(operator.adjoint(v))  # noqa: E731
        return conjugate_gradients(apply, residual, self.iterations)


@dataclass(frozen=True)
class DPS(PosteriorGuidance):
    """v = (y − A x̂)/noise_std²: x given x_t is approximated by x̂ itself [Chung23 eq. 11, theorem 1].

    With ``step`` it is their algorithm, which needs no noise_std: v = step (y − A x̂)/‖y − A x̂‖ · alpha_t/(sigma_t²
    alpha_s frac), with which `Ancestral` goes to x_s − step ∇‖y − A x̂‖ (with J in place of J' unless ``fd_step`` is
    None). Raises `ConfigError` if there is neither noise nor step, or a step without the level s that it goes to.
    """

    step: float | None = None

    def residual_weights(
        self, residual: Tensor, operator: LinearOperator, vjp: VJP, level: NoiseLevel, s: NoiseLevel | None
    ) -> Tensor:
        std = self.observation.noise_std
        if self.step is None:
            if std == 0:
                cause = "it divides the residual by noise_std², which is 0"
                raise ConfigError("DPS", f"noise_std = {std:g}", cause, "Give noise_std above 0, or a step")
            return residual / std**2
        if s is None:
            cause = "step needs both levels of a solver's step, and only one is given"
            raise ConfigError("DPS", f"step = {self.step:g}", cause, "Use a solver, or the form without step")
        rate = level.alpha / (level.sigma**2 * s.alpha * transition_frac(level, s))
        length = residual.flatten(1).norm(dim=1)
        return broadcast_like(self.step * rate, residual) * residual / broadcast_like(length.clamp(min=1e-12), residual)


def conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """v with ``apply``(v) = ``right``, item by item (B, ...), after ``iterations`` from 0 [Hestenes52].

    ``apply`` is linear, symmetric and positive. An item stops when it has converged, or where ``apply`` turns out not
    to be positive.
    """
    v, residual, direction = torch.zeros_like(right), right, right
    size = _dot(residual, residual)
    for _ in range(iterations):
        applied = apply(direction)
        curvature = _dot(direction, applied)
        step = _ratio(size, curvature)
        v, residual = v + step * direction, residual - step * applied
        size, old = torch.where((curvature > 0) & (size > 0), _dot(residual, residual), 0), size
        direction = residual + _ratio(size, old) * direction
    return v


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return broadcast_like((a * b).flatten(1).sum(1), a)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a/b, 0 where b is not above 0, with a gradient everywhere."""
    return torch.where(b > 0, a, 0) / torch.where(b > 0, b, 1)
