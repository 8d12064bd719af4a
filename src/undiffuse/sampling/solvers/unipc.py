# pyright: reportIncompatibleVariableOverride=false
"""UniPC: a multistep predictor, and a corrector that reuses the next step's prediction [Zhao23]."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling.solvers.dpm_singlestep import single_step
from undiffuse.sampling.solvers.exponential import RULES, advance
from undiffuse.sampling.solvers.solver import Solver, State, is_finite_step


@dataclass(frozen=True)
class UniPC(Solver):
    """UniPC-``points``: x_s from x̂ at t and the ``points`` − 1 levels before, corrected once x̂ at s is computed.

    It is of order ``points`` + 1 [Zhao23 thm. 3.1]. A first step with one point is of order 2, which is enough for
    two points; three begin with a single step of third order, which is not corrected. With ``start`` = ``"low"`` three
    begin with 1 and 2 points, as in other implementations, and are of order 3. ``rule`` is B(h), ``"bh1"`` or
    ``"bh2"``; it matters where there is one other point. The states that a trajectory yields are not yet corrected. The
    last step is not corrected, which saves a call. A step into data or out of pure noise is DDIM's. Raises
    `ConfigError`.
    """

    points: int = 2
    rule: str = "bh2"
    start: str = "high"

    def __post_init__(self) -> None:
        if self.points not in (1, 2, 3) or self.rule not in RULES or self.start not in ("high", "low"):
            where = f"points={self.points!r}, rule={self.rule!r}, start={self.start!r}"
            fix = f"Use 1 to 3 points, the rule {' or '.join(RULES)}, the start high or low"
            raise ConfigError("SOLVER", where, "there is no such UniPC", fix)

    @property
    def order(self) -> int:
        return min(self.points + 1, 3) if self.start == "low" else self.points + 1

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        new, (base, *points) = (denoise(x_t, t, next_level=s).x, t), state or (x_t,)
        enough = 1 if self.start == "low" else self.points - 1
        x = x_t
        if points and len(points) >= enough:
            x = advance(base, points[0][1], t, [points[0], new, *points[1:]], self.rule)
        points, finite = [new, *points][: self.points], is_finite_step(t, s)
        if finite and len(points) < enough:
            x_s = single_step(denoise, x, t, s, new, 3)
        else:
            x_s = advance(x, t, s, points, self.rule)
        return x_s, (x, *points) if finite else ()
