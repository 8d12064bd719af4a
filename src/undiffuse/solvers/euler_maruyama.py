"""The reverse stochastic differential equation by equal rates over a step [Song21 eq. 6]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.process.level import NoiseLevel, like
from undiffuse.solvers.ddim import DDIM
from undiffuse.solvers.rates import rates
from undiffuse.solvers.runge_kutta import inside
from undiffuse.solvers.solver import State


@dataclass(frozen=True)
class EulerMaruyama:
    """x_s = x_t + (f x_t + g² ε̂/sigma)(s − t) + g √(t − s) z, f = alpha'/alpha, g² = −sigma² log_snr' at t.

    It is dx = (f x − g² ∇log p(x)) dt + g dw, run backwards, with the score −ε̂/sigma [Song21 eq. 6, 8]. A step into
    data or out of pure noise, where these rates are infinite, is DDIM's.
    """

    order: int | None = field(default=1, init=False, repr=False)
    calls: int = field(default=1, init=False, repr=False)
    draws: int = field(default=1, init=False, repr=False)

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        if not inside(t, s):
            return DDIM().step(denoise, x_t, t, s, state, noise)
        eps = denoise(x_t, t, to=s).eps
        drift = rates(denoise.schedule, t)[0] / t.alpha
        spread = -t.sigma * denoise.schedule.log_snr_rate(t.t)  # g²/sigma
        h = t.t - s.t
        x_s = like(1 - drift * h, x_t) * x_t - like(spread * h, x_t) * eps
        return x_s + like(torch.sqrt(t.sigma * spread * h), x_t) * noise[0], state
