# pyright: reportIncompatibleVariableOverride=false
"""Runge–Kutta methods on the probability flow, in a chosen variable; [Karras22 alg. 1] is Heun's in sigma/alpha."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import fsum
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser, predicts_at_data
from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.ode_integrator import HEUN, RK4, Tableau, radius
from undiffuse.process.rates import scale_derivatives
from undiffuse.process.schedule import Schedule
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.solver import Solver, State, end_power, is_finite_step

METHODS = {"euler": Tableau((), (1.0,)), "heun": HEUN, "rk4": RK4}
"""Each has as many stages as its order."""


class Variable(NamedTuple):
    """dy/du = a x̂ + b ε̂ for y = x_t/``scale``, u = ``coordinate``, (a, b) = ``derivative``; ``level`` inverts u."""

    coordinate: Callable[[NoiseLevel], Tensor]
    scale: Callable[[NoiseLevel], Tensor]
    derivative: Callable[[Schedule, NoiseLevel], tuple[Tensor, Tensor]]
    level: Callable[[Schedule, Tensor], NoiseLevel]


def noise_to_signal(level: NoiseLevel) -> Tensor:
    """sigma/alpha, which is Karras's sigma; inf where alpha is 0."""
    return level.sigma / level.alpha


def level_at_ratio(schedule: Schedule, u: Tensor) -> NoiseLevel:
    """The level of ``schedule`` whose sigma/alpha is ``u``, or the nearest within its range."""
    return schedule(schedule.inverse(-2 * torch.log(u)))


VARIABLES = {
    "ratio": Variable(  # [Karras22 eq. 4; Song21 DDIM eq. 14]
        coordinate=noise_to_signal,
        scale=lambda level: level.alpha,
        derivative=lambda schedule, level: (torch.zeros_like(level.alpha), torch.ones_like(level.alpha)),
        level=level_at_ratio,
    ),
    "angle": Variable(  # [Salimans22 app. D]
        coordinate=lambda level: torch.atan2(level.sigma, level.alpha),
        scale=radius,
        derivative=lambda schedule, level: (-level.sigma / radius(level), level.alpha / radius(level)),
        level=lambda schedule, angle: level_at_ratio(schedule, torch.tan(angle)),
    ),
    "t": Variable(  # [Song21 eq. 13; Lipman23 eq. 1]
        coordinate=lambda level: level.t,
        scale=lambda level: torch.ones_like(level.t),
        derivative=scale_derivatives,
        level=lambda schedule, t: schedule(t),
    ),
}


@dataclass(frozen=True)
class RungeKutta(Solver):
    """y_s = y_t + h Σ_j w_j (a_j x̂_j + b_j ε̂_j), h = u_s − u_t, for stages j between the levels t and s.

    ``method`` is ``"euler"``, ``"heun"`` or ``"rk4"``, of order 1, 2 and 4 and as many calls. ``variable`` is the
    coordinate of the flow: ``"ratio"``, d(x_t/alpha)/d(sigma/alpha) = ε̂; ``"angle"``, with tan θ = sigma/alpha and r² =
    alpha² + sigma², d(x_t/r)/dθ = cos θ ε̂ − sin θ x̂; or ``"t"``, dx_t/dt = alpha' x̂ + sigma' ε̂, see
    `scale_derivatives`. Euler's method in the ratio is DDIM. Raises `ConfigError`.

    A step out of pure noise or into data has stages at its end too, if the schedule is a function of time, the flow is
    regular there in the variable, and the denoiser `predicts_at_data`; otherwise it is DDIM's. ``end`` = ``"low"``
    takes the step into data by DDIM in any case, which suits data without a density, such as whole numbers: x̂ of the
    last level is free of noise, while the average of slopes keeps a part of it.
    """

    method: str = "heun"
    variable: str = "ratio"
    end: str = "high"

    def __post_init__(self) -> None:
        if self.end not in ("high", "low"):
            raise ConfigError("SOLVER", f"end = {self.end!r}", "unknown", "Use one of high, low")
        for name, value, table in (("method", self.method, METHODS), ("variable", self.variable, VARIABLES)):
            if value not in table:
                raise ConfigError("SOLVER", f"{name} = {value!r}", "unknown", f"Use one of {', '.join(table)}")

    @property
    def order(self) -> int:
        return self.calls

    @property
    def calls(self) -> int:
        return len(METHODS[self.method].result)

    def order_on(self, schedule: Schedule, at_data: bool = False) -> int | None:
        """As in `Solver`; in the angle, with stages at the ends, the full order where sigma ~ t.

        Where sigma² ~ t the angle is ~ √t, and its first step √h long. x_t/r is even in the angle, so the error of that
        step is of order h^(order/2 + 1) for an even order.
        """
        if self.variable != "angle" or self.end == "low" or not at_data or schedule.chain_length is not None:
            return super().order_on(schedule, at_data)
        return self.order if end_power(schedule) > 1 else self.order // 2 + 1

    def _is_regular(self, denoise: Denoiser, t: NoiseLevel, s: NoiseLevel) -> bool:
        """Whether each stage of the step has a level of the schedule, a finite slope and a prediction."""
        if is_finite_step(t, s):
            return True
        if denoise.schedule.chain_length or not (s.sigma > 0 or (self.end == "high" and predicts_at_data(denoise))):
            return False
        flow = VARIABLES[self.variable]
        ends = [v for level in (t, s) for v in (flow.coordinate(level), *flow.derivative(denoise.schedule, level))]
        return bool(torch.isfinite(torch.stack(ends)).all())

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        if not self._is_regular(denoise, t, s):
            return DDIM().step(denoise, x_t, t, s, state, noise)
        flow, tableau, schedule = VARIABLES[self.variable], METHODS[self.method], denoise.schedule
        start = flow.coordinate(t)
        h = flow.coordinate(s) - start
        y = x_t / broadcast_like(flow.scale(t), x_t)

        def moved(weights: tuple[float, ...]) -> Tensor:
            return sum((broadcast_like(w * h, y) * change for w, change in zip(weights, changes, strict=True)), y)

        changes: list[Tensor] = []
        for stage in ((), *tableau.stages):
            fraction = fsum(stage)
            level = {0.0: t, 1.0: s}.get(fraction) or flow.level(schedule, start + fraction * h)
            x, eps, _ = denoise(
                broadcast_like(flow.scale(level), y) * moved(stage), level, next_level=None if stage else s
            )
            on_x, on_eps = flow.derivative(schedule, level)
            changes.append(broadcast_like(on_x, y) * x + broadcast_like(on_eps, y) * eps)
        return broadcast_like(flow.scale(s), y) * moved(tableau.result), state
