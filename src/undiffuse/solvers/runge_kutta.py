"""Runge–Kutta methods on the probability flow, in a chosen variable; [Karras22 alg. 1] is Heun's in sigma/alpha."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import fsum
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.denoiser import Denoiser
from undiffuse.errors import ConfigError
from undiffuse.likelihood.integrate import HEUN, RK4, Tableau
from undiffuse.process.level import NoiseLevel, like
from undiffuse.process.schedule import Schedule
from undiffuse.solvers.ddim import DDIM
from undiffuse.solvers.rates import rates
from undiffuse.solvers.solver import State

METHODS = {"euler": Tableau((), (1.0,)), "heun": HEUN, "rk4": RK4}
"""By their names, with as many stages as their order."""


class Variable(NamedTuple):
    """dy/du = a x̂ + b ε̂ for y = x_t/``scale``, u = ``clock`` and (a, b) = ``rate``; ``level`` is the one at a u."""

    clock: Callable[[NoiseLevel], Tensor]
    scale: Callable[[NoiseLevel], Tensor]
    rate: Callable[[Schedule, NoiseLevel], tuple[Tensor, Tensor]]
    level: Callable[[Schedule, Tensor], NoiseLevel]


def ratio(level: NoiseLevel) -> Tensor:
    """sigma/alpha, which elsewhere is called sigma; inf where alpha is 0."""
    return level.sigma / level.alpha


def at_ratio(schedule: Schedule, u: Tensor) -> NoiseLevel:
    """The level of ``schedule`` whose sigma/alpha is ``u``, or the nearest that it has."""
    return schedule(schedule.inverse(-2 * torch.log(u)))


def radius(level: NoiseLevel) -> Tensor:
    return torch.hypot(level.alpha, level.sigma)


VARIABLES = {
    "ratio": Variable(  # [Karras22 eq. 4; Song21 DDIM eq. 14]
        clock=ratio,
        scale=lambda level: level.alpha,
        rate=lambda schedule, level: (torch.zeros_like(level.alpha), torch.ones_like(level.alpha)),
        level=at_ratio,
    ),
    "angle": Variable(  # [Salimans22 app. D]
        clock=lambda level: torch.atan2(level.sigma, level.alpha),
        scale=radius,
        rate=lambda schedule, level: (-level.sigma / radius(level), level.alpha / radius(level)),
        level=lambda schedule, angle: at_ratio(schedule, torch.tan(angle)),
    ),
    "t": Variable(  # [Song21 eq. 13; Lipman23 eq. 1]
        clock=lambda level: level.t,
        scale=lambda level: torch.ones_like(level.t),
        rate=rates,
        level=lambda schedule, t: schedule(t),
    ),
}


@dataclass(frozen=True)
class RungeKutta:
    """y_s = y_t + h Σ_j w_j (a_j x̂_j + b_j ε̂_j), h = u_s − u_t, for stages j between the levels t and s.

    ``method`` is ``"euler"``, ``"heun"`` or ``"rk4"``, of order 1, 2 and 4 and as many calls. ``variable`` says in what
    the flow is written: ``"ratio"``, d(x_t/alpha)/d(sigma/alpha) = ε̂; ``"angle"``, with tan θ = sigma/alpha and r² =
    alpha² + sigma², d(x_t/r)/dθ = cos θ ε̂ − sin θ x̂; or ``"t"``, dx_t/dt = alpha' x̂ + sigma' ε̂, see `rates`. Euler's
    method in the ratio is DDIM. A step into data or out of pure noise is DDIM's. Raises `ConfigError`.
    """

    method: str = "heun"
    variable: str = "ratio"
    draws: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, value, table in (("method", self.method, METHODS), ("variable", self.variable, VARIABLES)):
            if value not in table:
                raise ConfigError("SOLVER", f"{name} = {value!r}", "unknown", f"Use one of {', '.join(table)}")

    @property
    def order(self) -> int:
        return self.calls

    @property
    def calls(self) -> int:
        return len(METHODS[self.method].result)

    def init(self, x: Tensor, levels: list[NoiseLevel]) -> State:
        return ()

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        if not inside(t, s):
            return DDIM().step(denoise, x_t, t, s, state, noise)
        flow, tableau, schedule = VARIABLES[self.variable], METHODS[self.method], denoise.schedule
        start = flow.clock(t)
        h = flow.clock(s) - start
        y = x_t / like(flow.scale(t), x_t)

        def moved(weights: tuple[float, ...]) -> Tensor:
            return sum((like(w * h, y) * change for w, change in zip(weights, changes, strict=True)), y)

        changes: list[Tensor] = []
        for stage in ((), *tableau.stages):
            share = fsum(stage)
            level = {0.0: t, 1.0: s}.get(share) or flow.level(schedule, start + share * h)
            x, eps, _ = denoise(like(flow.scale(level), y) * moved(stage), level, to=None if stage else s)
            on_x, on_eps = flow.rate(schedule, level)
            changes.append(like(on_x, y) * x + like(on_eps, y) * eps)
        return like(flow.scale(s), y) * moved(tableau.result), state


def inside(t: NoiseLevel, s: NoiseLevel) -> bool:
    """Whether both log-SNRs are finite: the step neither begins without signal nor ends without noise."""
    return bool(t.alpha > 0) and bool(s.sigma > 0)
