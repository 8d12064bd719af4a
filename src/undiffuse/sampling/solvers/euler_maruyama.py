"""The reverse stochastic differential equation with rates held constant over a step [Song21 eq. 6]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.rates import scale_derivatives
from undiffuse.process.schedule import MIN_LOG_SNR
from undiffuse.sampling.solvers.ddim import DDIM, DDIMAtInfinity
from undiffuse.sampling.solvers.solver import State


@dataclass(frozen=True)
class EulerMaruyama(DDIMAtInfinity):
    """x_s = x_t + (f x_t + g² ε̂/sigma)(s − t) + g √(t − s) z, f = alpha'/alpha, g² = −sigma² log_snr' at t.

    It is dx = (f x − g² ∇log p(x)) dt + g dw, run backwards, with the score −ε̂/sigma [Song21 eq. 6, 8]. On a function
    of time a step from below `MIN_LOG_SNR` is DDIM's: f grows there like 1/alpha², and its value at t is not that of
    the step.
    """

    order: ClassVar[int | None] = 1
    noises_per_step: ClassVar[int] = 1

    def finite_step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        if denoise.schedule.chain_length is None and bool(t.log_snr < MIN_LOG_SNR):
            return DDIM().step(denoise, x_t, t, s, state, noise)
        eps = denoise(x_t, t, next_level=s).eps
        drift = scale_derivatives(denoise.schedule, t)[0] / t.alpha
        spread = -t.sigma * denoise.schedule.log_snr_rate(t.t)  # g²/sigma
        h = t.t - s.t
        x_s = broadcast_like(1 - drift * h, x_t) * x_t - broadcast_like(spread * h, x_t) * eps
        return x_s + broadcast_like(torch.sqrt(t.sigma * spread * h), x_t) * noise[0], state
