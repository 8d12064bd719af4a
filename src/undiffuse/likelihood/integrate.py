"""Runge–Kutta methods along the probability flow, every item with steps of its own.

The clock of the flow is u = −asinh(alpha/sigma), which rises from data to noise. Where the signal is strong
it is −½ log_snr − log 2; where none is left it is 0, though log_snr is −inf there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.errors import ConfigError, NonFiniteError

Rate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""rate(items, u, y) = dy/du (b, n) of some ``items`` (b,) of the batch, at ``u`` (b,) and ``y`` (b, n)."""


def clock(log_snr: Tensor | float) -> Tensor:
    """u = −asinh(exp(log_snr/2)), float64: −asinh(alpha/sigma)."""
    return -torch.asinh(torch.exp(0.5 * torch.as_tensor(log_snr, dtype=torch.float64)))


def log_snr_at(u: Tensor) -> Tensor:
    """log_snr = 2 log sinh(−u), −inf from u = 0 on."""
    return 2 * torch.log(torch.sinh((-u).clamp(min=0)))


class Tableau(NamedTuple):
    """An explicit method: ``stages[j]`` weighs the rates so far in stage j + 1, ``result`` those of the step.

    ``error`` weighs them in the difference to the embedded method of one order less.
    """

    stages: tuple[tuple[float, ...], ...]
    result: tuple[float, ...]
    error: tuple[float, ...] = ()


HEUN = Tableau(((1.0,),), (1 / 2, 1 / 2))
RK4 = Tableau(((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
_FIFTH = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
DORMAND_PRINCE = Tableau(  # [Dormand80 table 2]; the last rate is the next step's first
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
SMALLEST = 1e-8
"""A step of the clock below which there is no hope."""


@dataclass(frozen=True)
class Integrator:
    """A way to integrate: ``"heun"`` (order 2) and ``"rk4"`` (4) take ``steps`` equal steps of the clock.

    ``"adaptive"`` is Dormand and Prince's pair of orders 5 and 4. A step is kept where its `error_size` is at most 1
    for ``rtol`` and ``atol``; the next is 0.9 size^(−1/5) times as long, between a fifth and five times. An item that
    has arrived leaves the batch, so that none waits for another or sets its steps. Raises `ConfigError`.
    """

    method: str = "adaptive"
    steps: int = 50
    rtol: float = 1e-5
    atol: float = 1e-5
    max_calls: int = 10_000

    def __post_init__(self) -> None:
        if (
            self.method not in METHODS
            or self.steps < 1
            or not 0 <= self.rtol < math.inf
            or not 0 < self.atol < math.inf
        ):
            raise ConfigError(
                "ODE_METHOD",
                f"method = {self.method!r}, steps = {self.steps}, rtol = {self.rtol:g}, atol = {self.atol:g}",
                "no such way to integrate",
                f"Use {', '.join(METHODS)}, one step or more, and tolerances above 0",
            )

    def __call__(self, rate: Rate, y: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        """y(end) (B, n) and the calls of ``rate`` that each item took, (B,) on the CPU, from ``y`` = y(start).

        Raises `NonFiniteError` where an item's numbers end, and `ConfigError` at ``max_calls``.
        """
        return self._adaptive(rate, y, start, end) if self.method == "adaptive" else self._fixed(rate, y, start, end)

    def _fixed(self, rate: Rate, y: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        tableau, items, h = METHODS[self.method], torch.arange(len(y)), (end - start) / self.steps
        for k in range(self.steps):
            u = torch.full((len(y),), start + k * h, dtype=torch.float64)
            y, _ = step(tableau, rate, items, u, y, torch.full_like(u, h), rate(items, u, y))
        if not bool(torch.isfinite(y).all()):
            item = int((~torch.isfinite(y)).any(1).nonzero()[0])
            raise _not_finite(item, end, "Use more steps or method 'adaptive', and check the weights")
        return y, torch.full((len(y),), self.steps * len(tableau.result))

    def _adaptive(self, rate: Rate, y: Tensor, start: float, end: float) -> tuple[Tensor, Tensor]:
        items, tableau = torch.arange(len(y)), METHODS["adaptive"]
        u = torch.full((len(y),), start, dtype=torch.float64)
        h = torch.full_like(u, (self.rtol + self.atol) ** 0.2)
        calls = torch.ones(len(y), dtype=torch.int64)
        y, first = y.clone(), rate(items, u, y).clone()
        while len(items):
            left, old = end - u[items], y[items]
            last, length = h[items] >= left, torch.minimum(h[items], left)
            new, rates = step(tableau, rate, items, u[items], old, length, first[items])
            size = error_size(_times(_mix(tableau.error, rates), length), old, new, self.rtol, self.atol).cpu()
            calls[items] += len(tableau.stages)
            kept = size <= 1  # never where it is NaN
            stuck = items[~kept & (length < SMALLEST)]
            if len(stuck):
                fix = "Check the weights, or use float64 or a larger rtol and atol"
                raise _not_finite(int(stuck[0]), float(u[stuck[0]]), fix)
            h[items] = length * (0.9 * size**-0.2).nan_to_num(nan=0.2).clamp(0.2, 5.0)
            done = items[kept]
            y[done], first[done], u[done] = new[kept], rates[-1][kept], (u[items] + length)[kept]
            items = items[~(kept & last)]
            slow = items[calls[items] >= self.max_calls]
            if len(slow):
                at = f"item {int(slow[0])} is only at log_snr = {float(log_snr_at(-u[slow[0]].abs())):.4g}"
                fix = "Allow more calls, a larger rtol and atol, or use method 'rk4'"
                raise ConfigError("ODE_CALLS", f"max_calls = {self.max_calls}", at, fix)
        return y, calls


def error_size(error: Tensor, old: Tensor, new: Tensor, rtol: float, atol: float) -> Tensor:
    """max(rms(e), |e_last|) of each row, (b,), e = error/(atol + rtol max(|old|, |new|)).

    The last column is an integral along the path, and weighs as much as all the others together.
    """
    e = error / (atol + rtol * torch.maximum(old.abs(), new.abs()))
    return torch.maximum(torch.sqrt((e[:, :-1] ** 2).mean(1)), e[:, -1].abs())


def step(
    tableau: Tableau, rate: Rate, items: Tensor, u: Tensor, y: Tensor, h: Tensor, first: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(y at u + h, the rates of all stages), from the rate ``first`` at u; h (b,)."""
    rates = [first]
    for weights in tableau.stages:
        rates.append(rate(items, u + math.fsum(weights) * h, y + _times(_mix(weights, rates), h)))
    return y + _times(_mix(tableau.result, rates), h), rates


def _mix(weights: tuple[float, ...], rates: list[Tensor]) -> Tensor:
    return sum((w * r for w, r in zip(weights, rates, strict=False)), torch.zeros_like(rates[0]))


def _times(rows: Tensor, h: Tensor) -> Tensor:
    return rows * h.to(rows)[:, None]


def _not_finite(item: int, u: float, fix: str) -> NonFiniteError:
    at = float(log_snr_at(torch.tensor(-abs(u), dtype=torch.float64)))  # a clock run backwards is −u
    return NonFiniteError("ODE", f"item {item} of the batch", f"its flow breaks down at log_snr = {at:.4g}", fix)
