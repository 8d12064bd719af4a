# pyright: reportIncompatibleVariableOverride=false
"""DDIM, from deterministic (eta = 0) to ancestral with the posterior variance (eta = 1) [Song21 DDIM eq. 12]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel, broadcast_like, transition_frac
from undiffuse.sampling.solvers.solver import Solver, State, is_finite_step


@dataclass(frozen=True)
class DDIM(Solver):
    """x_s = alpha_s x̂ + sigma_s √(1 − eta² frac) ε̂ + eta sigma_s √frac z, 0 ≤ eta ≤ 1. Raises `ConfigError`."""

    eta: float = 0.0
    order: ClassVar[int | None] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            cause = "eta is a fraction of the noise of ancestral sampling"
            raise ConfigError("SOLVER", f"eta = {self.eta!r}", cause, "Give a number from 0 to 1")

    @property
    def noises_per_step(self) -> int:
        return 0 if self.eta == 0 else 1

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        x, eps, _ = denoise(x_t, t, next_level=s)
        fresh = self.eta**2 * transition_frac(t, s)
        x_s = broadcast_like(s.alpha, x_t) * x + broadcast_like(s.sigma * torch.sqrt(1 - fresh), x_t) * eps
        if self.noises_per_step:
            x_s = x_s + broadcast_like(s.sigma * torch.sqrt(fresh), x_t) * noise[0]
        return x_s, state


class DDIMAtInfinity(Solver):
    """Base of solvers that are defined between finite log-SNRs only: any other step, out of pure noise or into data,
    is deterministic DDIM. A subclass has `finite_step` in place of `step`.
    """

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        step = self.finite_step if is_finite_step(t, s) else DDIM().step
        return step(denoise, x_t, t, s, state, noise)

    def finite_step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        """`step`, where alpha_t > 0 and sigma_s > 0."""
        raise NotImplementedError
