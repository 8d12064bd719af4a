"""UniPC: a multistep predictor, and a corrector that takes the next step's prediction for nothing [Zhao23]."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel
from undiffuse.solvers.dpm import single
from undiffuse.solvers.exponential import RULES, advance, finite
from undiffuse.solvers.solver import State


@dataclass(frozen=True)
class UniPC:
    """UniPC-``points``: x_s from x̂ at t and the ``points`` − 1 levels before, corrected when x̂ at s is known.

    It is of order ``points`` + 1 [Zhao23 thm. 3.1]. A first step with one point is of order 2, which is enough for
    two: three begin by a single step of third order, not corrected; with ``start`` = ``"low"`` they begin with 1 and
    2 points, as others do, and are of order 3. ``rule`` is B(h), ``"bh1"`` or ``"bh2"``: it matters where there is
    one other point. What a trajectory yields is not corrected yet; the last step never is, and needs no call.
    A step into data or out of pure noise is DDIM's. Raises `ConfigError`.
    """

    points: int = 2
    rule: str = "bh2"
    start: str = "high"
    calls: int = field(default=1, init=False, repr=False)
    draws: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.points not in (1, 2, 3) or self.rule not in RULES or self.start not in ("high", "low"):
            where = f"points={self.points!r}, rule={self.rule!r}, start={self.start!r}"
            fix = f"Use 1 to 3 points, the rule {' or '.join(RULES)}, the start high or low"
            raise ConfigError("SOLVER", where, "there is no such UniPC", fix)

    @property
    def order(self) -> int:
        return min(self.points + 1, 3) if self.start == "low" else self.points + 1

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        new, (base, *known) = (denoise(x_t, t, to=s).x, t), state or (x_t,)
        enough = 1 if self.start == "low" else self.points - 1
        x = x_t
        if known and len(known) >= enough:
            x = advance(base, known[0][1], t, [known[0], new, *known[1:]], self.rule)
        known = [new, *known][: self.points]
        single_step = len(known) < enough
        x_s = single(denoise, x, t, s, new, 3) if single_step else advance(x, t, s, known, self.rule)
        return x_s, (x, *known) if finite(t, s) else ()
