"""DDIM, from deterministic (eta = 0) to ancestral with the posterior variance (eta = 1) [Song21 DDIM eq. 12]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel, frac, like
from undiffuse.solvers.solver import State


@dataclass(frozen=True)
class DDIM:
    """x_s = alpha_s x̂ + sigma_s √(1 − eta² frac) ε̂ + eta sigma_s √frac z, 0 ≤ eta ≤ 1. Raises `ConfigError`."""

    eta: float = 0.0
    order: int | None = field(default=1, init=False, repr=False)
    calls: int = field(default=1, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            cause = "it is a share of the noise of ancestral sampling"
            raise ConfigError("SOLVER", f"eta = {self.eta!r}", cause, "Give a number from 0 to 1")

    @property
    def draws(self) -> int:
        return 0 if self.eta == 0 else 1

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        x, eps, _ = denoise(x_t, t, to=s)
        fresh = self.eta**2 * frac(t, s)
        x_s = like(s.alpha, x_t) * x + like(s.sigma * torch.sqrt(1 - fresh), x_t) * eps
        if self.draws:
            x_s = x_s + like(s.sigma * torch.sqrt(fresh), x_t) * noise[0]
        return x_s, state
