"""Runge–Kutta methods for the probability flow, with steps of its own for every item.

The independent variable is the flow time u = −asinh(alpha/sigma), which rises from data to noise. For a strong signal
it is close to −½ log_snr − log 2; it stays finite (0) where there is no signal and log_snr = −inf.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.process.noise_level import NoiseLevel, broadcast_like

Derivative = Callable[[Tensor, Tensor, Tensor], Tensor]
"""derivative(items, u, y) = dy/du (b, n) of the given ``items`` (b,) of the batch, at ``u`` (b,) and ``y`` (b, n)."""


def flow_time(log_snr: Tensor | float) -> Tensor:
    """u = −asinh(exp(log_snr/2)) = −asinh(alpha/sigma), float64."""
    return -torch.asinh(torch.exp(0.5 * torch.as_tensor(log_snr, dtype=torch.float64)))


def log_snr_at_flow_time(u: Tensor) -> Tensor:
    """log_snr = 2 log sinh(−u), −inf for u ≥ 0."""
    return 2 * torch.log(torch.sinh((-u).clamp(min=0)))


def radius(level: NoiseLevel) -> Tensor:
    """√(alpha² + sigma²)."""
    return torch.hypot(level.alpha, level.sigma)


def flow_velocity(x: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """dy/du = (sigma/r)((alpha/r) ε̂ − (sigma/r) x̂) of y = x_t/r, r² = alpha² + sigma² [Song21 eq. 13].

    ``x`` and ``eps`` (B, ...) are the prediction at ``level``; the flow of y in the flow time u has no other term.
    """
    at, r = level.broadcast_like(x), broadcast_like(radius(level), x)
    return at.sigma / r * (at.alpha / r * eps - at.sigma / r * x)


class Tableau(NamedTuple):
    """An explicit method: ``stages[j]`` has the weights of the earlier derivatives in stage j + 1, ``result`` those of
    the step, and ``error`` those of the difference to the embedded method of one order less.
    """

    stages: tuple[tuple[float, ...], ...]
    result: tuple[float, ...]
    error: tuple[float, ...] = ()


HEUN = Tableau(((1.0,),), (1 / 2, 1 / 2))
RK4 = Tableau(((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
_FIFTH = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
DORMAND_PRINCE = Tableau(  # [Dormand80 table 2]; the last derivative is the next step's first
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _FIFTH,
    ),
    _FIFTH,
    (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)
METHODS = {"adaptive": DORMAND_PRINCE, "heun": HEUN, "rk4": RK4}
MIN_STEP = 1e-8
"""Step of the flow time below which the adaptive method fails."""


@dataclass(frozen=True)
class Integrator:
    """An integration method: ``"heun"`` (order 2) and ``"rk4"`` (4) take ``num_steps`` equal steps of the flow time.

    ``"adaptive"`` is Dormand and Prince's pair of orders 5 and 4. A step is accepted where its `error_size` for
    ``rtol`` and ``atol`` is at most 1; the next is 0.9 size^(−1/5) times as long, between 1/5 and 5 times. Items that
    have reached the end leave the batch, so that no item's steps depend on the others. Raises `ConfigError`.
    """

    method: str = "adaptive"
    num_steps: int = 50
    rtol: float = 1e-5
    atol: float = 1e-5
    max_calls: int = 10_000

    def __post_init__(self) -> None:
        if (
            self.method not in METHODS
            or self.num_steps < 1
            or not 0 <= self.rtol < math.inf
            or not 0 < self.atol < math.inf
        ):
            raise ConfigError(
                "ODE_METHOD",
                f"method = {self.method!r}, num_steps = {self.num_steps}, rtol = {self.rtol:g}, atol = {self.atol:g}",
                "unknown method or invalid setting",
                f"Use {', '.join(METHODS)}, at least one step, and tolerances above 0",
            )

    def __call__(self, derivative: Derivative, y: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        """(y(end), calls) from ``y`` = y(start): (B, n), and each item's ``derivative`` evaluations, (B,) on the CPU.

        Raises `NonFiniteError` where an item becomes NaN or infinite, and `ConfigError` at ``max_calls``.
        """
        integrate = self._adaptive if self.method == "adaptive" else self._fixed
        return integrate(derivative, y, start, end)

    def _fixed(self, derivative: Derivative, y: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        tableau, items, h = METHODS[self.method], torch.arange(len(y)), (end - start) / self.num_steps
        for k in range(self.num_steps):
            u = torch.full((len(y),), start + k * h, dtype=torch.float64)
            y, _ = rk_step(tableau, derivative, items, u, y, torch.full_like(u, h), derivative(items, u, y))
        if not bool(torch.isfinite(y).all()):
            item = int((~torch.isfinite(y)).any(1).nonzero()[0])
            raise _not_finite(item, end, "Use more steps or method 'adaptive', and check the weights")
        return y, torch.full((len(y),), self.num_steps * len(tableau.result))

    def _adaptive(self, derivative: Derivative, y: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        items, tableau = torch.arange(len(y)), METHODS["adaptive"]
        u = torch.full((len(y),), start, dtype=torch.float64)
        h = torch.full_like(u, (self.rtol + self.atol) ** 0.2)
        calls = torch.ones(len(y), dtype=torch.int64)
        y, first = y.clone(), derivative(items, u, y).clone()
        while len(items):
            remaining, old = end - u[items], y[items]
            last, length = h[items] >= remaining, torch.minimum(h[items], remaining)
            new, slopes = rk_step(tableau, derivative, items, u[items], old, length, first[items])
            error = _scale_rows(_combine(tableau.error, slopes), length)
            size = error_size(error, old, new, self.rtol, self.atol).cpu()
            calls[items] += len(tableau.stages)
            accepted = size <= 1  # False where size is NaN
            stuck = items[~accepted & (length < MIN_STEP)]
            if len(stuck):
                fix = "Check the weights, or use float64 or a larger rtol and atol"
                raise _not_finite(int(stuck[0]), float(u[stuck[0]]), fix)
            h[items] = length * (0.9 * size**-0.2).nan_to_num(nan=0.2).clamp(0.2, 5.0)
            done = items[accepted]
            y[done], first[done], u[done] = new[accepted], slopes[-1][accepted], (u[items] + length)[accepted]
            items = items[~(accepted & last)]
            slow = items[calls[items] >= self.max_calls]
            if len(slow):
                log_snr = float(log_snr_at_flow_time(-u[slow[0]].abs()))
                cause = f"item {int(slow[0])} has only reached log_snr = {log_snr:.4g}"
                fix = "Allow more calls, or larger rtol and atol"
                raise ConfigError("ODE_CALLS", f"max_calls = {self.max_calls}", cause, fix)
        return y, calls


def error_size(error: Tensor, old: Tensor, new: Tensor, rtol: float, atol: float) -> Tensor:
    """max(rms(e), |e_last|) of each row, (b,), e = error/(atol + rtol max(|old|, |new|)).

    The last column is an integral along the path and counts as much as all the others together.
    """
    e = error / (atol + rtol * torch.maximum(old.abs(), new.abs()))
    return torch.maximum(torch.sqrt((e[:, :-1] ** 2).mean(1)), e[:, -1].abs())


def rk_step(
    tableau: Tableau, derivative: Derivative, items: Tensor, u: Tensor, y: Tensor, h: Tensor, first: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(y(u + h), the derivatives of all stages), from the derivative ``first`` at u; h (b,)."""
    slopes = [first]
    for weights in tableau.stages:
        at = y + _scale_rows(_combine(weights, slopes), h)
        slopes.append(derivative(items, u + math.fsum(weights) * h, at))
    return y + _scale_rows(_combine(tableau.result, slopes), h), slopes


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return sum((w * r for w, r in zip(weights, slopes, strict=False)), torch.zeros_like(slopes[0]))


def _scale_rows(rows: Tensor, h: Tensor) -> Tensor:
    return rows * h.to(rows)[:, None]


def _not_finite(item: int, u: float, fix: str) -> NonFiniteError:
    at = float(log_snr_at_flow_time(torch.tensor(-abs(u), dtype=torch.float64)))  # backwards the flow time is −u
    return NonFiniteError("ODE", f"item {item} of the batch", f"its ODE diverges at log_snr = {at:.4g}", fix)
