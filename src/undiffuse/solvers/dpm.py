"""DPM-Solver++ by single steps: the flow in lambda = log(alpha/sigma), each step on its own [Lu22b §4.1]."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel
from undiffuse.solvers.exponential import Point, advance, finite
from undiffuse.solvers.solver import State


@dataclass(frozen=True)
class SingleStep:
    """DPM-Solver++ 1S, 2S or 3S: x̂ at t, and for ``order`` 2 halfway in lambda, for 3 at one and at two thirds.

    1S is DDIM. A step into data or out of pure noise is 1S, with one call. The levels between come from
    ``denoise.schedule``. Raises `ConfigError`.
    """

    order: int = 2
    draws: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ConfigError("SOLVER", f"order = {self.order!r}", "there is no such single step", "Use 1, 2 or 3")

    @property
    def calls(self) -> int:
        return self.order

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        return single(denoise, x_t, t, s, (denoise(x_t, t, to=s).x, t), self.order), state


def single(denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, start: Point, order: int) -> Tensor:
    """x_s by one step of ``order`` 1 to 3 from ``start`` = (x̂ at t, t), with order − 1 further calls.

    2S: x_m of DDIM halfway, then x̂ = x̂_m throughout [Lu22b alg. 1, r = ½]. 3S: a line through x̂_t and x̂ at
    ⅓ leads to ⅔, a line through x̂_t and x̂ at ⅔ to s.
    """
    points = [start]
    if finite(t, s):
        for share in {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}[order]:
            middle = denoise.schedule(denoise.schedule.inverse(t.log_snr + share * (s.log_snr - t.log_snr)))
            points = [start, (denoise(advance(x_t, t, middle, points), middle, to=s).x, middle)]
    return advance(x_t, t, s, points, "bh2" if order == 2 else "exact")
