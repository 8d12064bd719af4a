# pyright: reportIncompatibleVariableOverride=false
"""Multistep methods in lambda = log(alpha/sigma): exponential Adams–Bashforth, DPM-Solver++ 2M and 3M, their SDEs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling.solvers.dpm_singlestep import single_step
from undiffuse.sampling.solvers.exponential import RULES, advance
from undiffuse.sampling.solvers.solver import Solver, State, is_finite_step


@dataclass(frozen=True)
class Multistep(Solver):
    """x_s from the polynomial through x̂ at t and at the ``points`` − 1 levels before it, integrated exactly.

    ``points`` = 1 is DDIM, and with ``eta`` = 1 ancestral sampling with the small variance; 2 with ``rule`` =
    ``"bh2"`` is DPM-Solver++ 2M [Lu22b alg. 2], 3 is 3M; any number is exponential Adams–Bashforth. ``eta`` > 0 is
    the SDE [Lu22b §5], whose noise equals that of DDIM's eta only at 0 and 1.

    ``start`` = ``"high"`` begins with single steps, and then fewer points, of order ``points`` − 1, so that the whole
    is of order ``points``; ``"low"`` begins with 1, 2, ... points, as other implementations do, and is of order 2 at
    most. An SDE always starts low. After a step out of pure noise the start is repeated. ``end`` = ``"low"`` takes the
    last step with x̂ at t alone; it suits grids whose last step, to data, begins at a level with much noise, and is of
    order 2 at most. Raises `ConfigError`.
    """

    points: int = 2
    eta: float = 0.0
    rule: str = "exact"
    start: str = "high"
    end: str = "high"

    def __post_init__(self) -> None:
        where = f"points={self.points!r}, eta={self.eta!r}, rule={self.rule!r}, start={self.start!r}, end={self.end!r}"
        if (
            self.points not in (1, 2, 3, 4)
            or not 0 <= self.eta < math.inf
            or self.rule not in RULES
            or not {self.start, self.end} <= {"high", "low"}
        ):
            fix = f"Use 1 to 4 points, eta of at least 0, the rule {' or '.join(RULES)}, start and end high or low"
            raise ConfigError("SOLVER", where, "there is no such multistep method", fix)

    @property
    def order(self) -> int:
        return min(self.points, 2) if "low" in (self.start, self.end) or self.eta > 0 else self.points

    @property
    def noises_per_step(self) -> int:
        return 0 if self.eta == 0 else 1

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        """(time of the last level,), to which `step` appends the latest points (x̂, level), newest first."""
        return (levels[-1].t,)

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        last, *before = state
        points, finite = ((denoise(x_t, t, next_level=s).x, t), *before), is_finite_step(t, s)
        if finite and self.order > len(points) + 1:
            x_s = single_step(denoise, x_t, t, s, points[0], self.order - 1)
        else:
            used = points[:1] if self.end == "low" and bool(s.t == last) else points
            x_s = advance(x_t, t, s, used, self.rule, self.eta, noise[0] if self.noises_per_step else None)
        return x_s, (last, *(points[: self.points - 1] if finite else ()))
