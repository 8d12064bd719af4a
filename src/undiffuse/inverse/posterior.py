"""Denoisers that know an observation: E[x given x_t, y] from E[x given x_t], for every solver and likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser, Prediction
from undiffuse.errors import ConfigError
from undiffuse.inverse.operators import Linear
from undiffuse.process.level import NoiseLevel, frac, like
from undiffuse.process.schedule import Schedule

Pull = Callable[[Tensor], Tensor]
"""v (B, *seen) ↦ (sigma²/alpha) J A' v, of x's shape, with J = dx̂/dx_t: a change of x̂."""


class Observation(NamedTuple):
    """y = A x + noise_std n: ``y`` (B, *seen), or (1, *seen) for all items, in the units of x."""

    operator: Linear
    y: Tensor
    noise_std: float = 0.0


@dataclass(frozen=True)
class Posterior:
    """x̂ + (sigma²/alpha) J A' v and ε̂ to match, x_t = alpha x̂ + sigma ε̂: what `MMPS`, `PiGDM` and `DPS` share.

    J' A' v = ∇ log p(y given x_t) for a Gaussian p around A x̂, with J = dx̂/dx_t; the kinds differ in the weights
    v of the residual y − A x̂. Of an exact denoiser J is J', as (sigma²/alpha) J is a covariance. Of a network J u is a
    change of images, but J' u full of what its input is most sensitive to, so J u is taken, as
    (x̂(x_t + h u) − x̂(x_t))/h with ``nudge`` = h rms(u)/sigma: a call for each u, of any denoiser. ``nudge=None`` takes
    J' u by autograd, as the papers do. Where alpha is 0, x_t says nothing of x, nor J of its covariance, and the
    prediction is left as it is. Gradients flow through it where x_t asks for them, as the flow's likelihood does.
    """

    denoise: Denoiser
    observed: Observation
    nudge: float | None = field(default=0.05, kw_only=True)

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        operator, y, _ = self.observed
        at, graph = level.like(x_t), torch.is_grad_enabled() and x_t.requires_grad
        scale = torch.where(at.alpha > 0, at.sigma**2 / at.alpha, 0)
        with torch.set_grad_enabled(graph or self.nudge is None):
            place = x_t if graph or self.nudge is not None else x_t.detach().requires_grad_()
            x, eps, nu = self.denoise(place, level, cond, to)

        def pull(v: Tensor) -> Tensor:
            u = operator.adjoint(v)
            if self.nudge is None:
                return scale * torch.autograd.grad(x, place, u, retain_graph=True, create_graph=graph)[0]
            length = like(u.detach().flatten(1).square().mean(1).sqrt().clamp(min=1e-20), u)
            h = self.nudge * at.sigma / length
            return scale * (self.denoise(x_t + h * u, level, cond, to).x - x) / h

        with torch.set_grad_enabled(graph):
            shift = pull(self.weights(y.to(x) - operator(x), pull, level, to))
            eps = eps - at.alpha / at.sigma * shift
            return Prediction(x + shift, eps, nu if graph or nu is None else nu.detach())

    def weights(self, residual: Tensor, pull: Pull, level: NoiseLevel, to: NoiseLevel | None) -> Tensor:
        """v (B, *seen) of the ``residual`` y − A x̂."""
        raise NotImplementedError


@dataclass(frozen=True)
class MMPS(Posterior):
    """v = (noise_std² I + A C A')⁻¹ (y − A x̂) with C = (sigma²/alpha) J, that of x given x_t [Rozet24 eq. 14].

    Moment matching: p(x given x_t) is taken for the Gaussian of its own mean and covariance, so that on Gaussian
    data x̂ is E[x given x_t, y] itself. The system is solved by ``iterations`` of conjugate gradients, each one product
    with J; as many as y has numbers solve it exactly, few leave directions of small variance to the prior.
    """

    iterations: int = 5

    def weights(self, residual: Tensor, pull: Pull, level: NoiseLevel, to: NoiseLevel | None) -> Tensor:
        operator, _, std = self.observed
        return conjugate_gradients(lambda v: std**2 * v + operator(pull(v)), residual, self.iterations)


@dataclass(frozen=True)
class PiGDM(Posterior):
    """v = (noise_std² I + r² A A')⁻¹ (y − A x̂), r² = d² sigma²/(alpha² d² + sigma²) [Song23 eq. 8, §3.2].

    ``data_std`` = d: the covariance of x given x_t is taken for that of data N(m, d² I), theirs with d = 1; on such
    data it is exact. A A' is inverted by ``iterations`` of conjugate gradients, which do not ask for J.
    """

    data_std: float = 1.0
    iterations: int = 50

    def weights(self, residual: Tensor, pull: Pull, level: NoiseLevel, to: NoiseLevel | None) -> Tensor:
        (operator, _, std), d = self.observed, self.data_std
        spread = like((d * level.sigma) ** 2 / ((d * level.alpha) ** 2 + level.sigma**2), residual)
        apply = lambda v: std**2 * v + spread * operator(operator.adjoint(v))  # noqa: E731
        return conjugate_gradients(apply, residual, self.iterations)


@dataclass(frozen=True)
class DPS(Posterior):
    """v = (y − A x̂)/noise_std²: x given x_t is taken for x̂ itself [Chung23 eq. 11, theorem 1].

    With ``step`` their algorithm, which needs no noise_std: `Ancestral` goes to x_s − step ∇‖y − A x̂‖ (whose J' is J
    here, unless ``nudge`` is None), and v = step (y − A x̂)/‖y − A x̂‖ · alpha_t/(sigma_t² alpha_s frac) does so. Raises
    `ConfigError` where there is neither noise nor step, or no level aimed at.
    """

    step: float | None = None

    def weights(self, residual: Tensor, pull: Pull, level: NoiseLevel, to: NoiseLevel | None) -> Tensor:
        std = self.observed.noise_std
        if self.step is None:
            if std == 0:
                cause = "it weighs the residual by 1/noise_std², and there is no noise"
                raise ConfigError("DPS", f"noise_std = {std:g}", cause, "Give noise_std above 0, or a step")
            return residual / std**2
        if to is None:
            cause = "its steps are those between two levels, and only one is given"
            raise ConfigError("DPS", f"step = {self.step:g}", cause, "Use a solver, or the form without step")
        rate = level.alpha / (level.sigma**2 * to.alpha * frac(level, to))
        length = residual.flatten(1).norm(dim=1)
        return like(self.step * rate, residual) * residual / like(length.clamp(min=1e-12), residual)


def conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, iterations: int) -> Tensor:
    """v with ``apply``(v) = ``right``, item by item (B, ...), after ``iterations`` from 0 [Hestenes52].

    ``apply`` is linear, symmetric and positive. An item stops where it finds that it is not, or is done.
    """
    v, left, way = torch.zeros_like(right), right, right
    size = _dot(left, left)
    for _ in range(iterations):
        bent = apply(way)
        curve = _dot(way, bent)
        step = _ratio(size, curve)
        v, left = v + step * way, left - step * bent
        size, old = torch.where((curve > 0) & (size > 0), _dot(left, left), 0), size
        way = left + _ratio(size, old) * way
    return v


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return like((a * b).flatten(1).sum(1), a)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a/b, 0 where b is not above 0, with a gradient everywhere."""
    return torch.where(b > 0, a, 0) / torch.where(b > 0, b, 1)
