# pyright: reportIncompatibleVariableOverride=false
"""DPM-Solver++ by single steps: the flow in lambda = log(alpha/sigma), each step on its own [Lu22b §4.1]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling.solvers.ddim import DDIMAtInfinity
from undiffuse.sampling.solvers.exponential import Point, advance
from undiffuse.sampling.solvers.solver import State


@dataclass(frozen=True)
class SingleStep(DDIMAtInfinity):
    """DPM-Solver++ 1S, 2S or 3S: x̂ at t, and for ``order`` 2 halfway in lambda, for 3 at one and at two thirds.

    1S is DDIM. The levels between come from ``denoise.schedule``. Raises `ConfigError`.
    """

    order: int = 2

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ConfigError("SOLVER", f"order = {self.order!r}", "unknown order of single steps", "Use 1, 2 or 3")

    @property
    def calls(self) -> int:
        return self.order

    def finite_step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        return single_step(denoise, x_t, t, s, (denoise(x_t, t, next_level=s).x, t), self.order), state


def single_step(denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, start: Point, order: int) -> Tensor:
    """x_s by one step of ``order`` 1 to 3 from ``start`` = (x̂ at t, t), with order − 1 further calls.

    2S: x_m of DDIM halfway, then x̂ = x̂_m throughout [Lu22b alg. 1, r = ½]. 3S: a line through x̂_t and x̂ at
    ⅓ leads to ⅔, a line through x̂_t and x̂ at ⅔ to s. Both log-SNRs have to be finite.
    """
    points = [start]
    for fraction in {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}[order]:
        middle = denoise.schedule(denoise.schedule.inverse(t.log_snr + fraction * (s.log_snr - t.log_snr)))
        points = [start, (denoise(advance(x_t, t, middle, points), middle, next_level=s).x, middle)]
    return advance(x_t, t, s, points, "bh2" if order == 2 else "exact")
