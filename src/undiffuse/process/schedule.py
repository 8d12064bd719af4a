"""Schedules: maps from t in [0, 1] (0 data, 1 noise) to a noise level, float64 on the CPU.

The discrete chain is a table (`undiffuse.process.table`); the others are functions. Discrete and
continuous time are the same code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.process.learned import Learned
from undiffuse.process.level import NoiseLevel, descending, double, frac, preserving, time_of
from undiffuse.process.table import Tabulated, cosine, linear, linear_rescaled, quadratic


class Schedule(Protocol):
    @property
    def steps(self) -> int | None:
        """T of a table, whose levels are at t = k/T; None where every t is as good as another."""
        ...

    @property
    def t_min(self) -> float:
        """The cleanest time that a network is called at: log_snr is finite from here to t = 1 excluded."""
        ...

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        """The noise level at ``t`` in [0, 1], of ``t``'s shape. Raises ValueError outside."""
        ...

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        """The t whose level has this ``log_snr``; clamped to [0, 1]."""
        ...

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        """d log_snr / dt ≤ 0."""
        ...


@dataclass(frozen=True)
class LinearLogSNR:
    """log_snr linear from ``high`` at t = 0 to ``low`` at t = 1, variance preserving [VDM21 app. I.2]."""

    high: float = 13.3
    low: float = -5.0
    steps = None
    t_min = 0.0

    def __post_init__(self) -> None:
        descending(self.low, self.high, "low", "high")

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = time_of(t)
        return preserving(t, self.high + (self.low - self.high) * t)._replace(between=self.between)

    def between(self, t: Tensor, s: Tensor) -> Tensor:
        return -torch.expm1((self.low - self.high) * (t - s))

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        return ((double(log_snr) - self.high) / (self.low - self.high)).clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        return torch.full_like(time_of(t), self.low - self.high)


@dataclass(frozen=True)
class Sigmoid:
    """alpha² = δ + (1 − δ)(v(end) − v(z))/(v(end) − v(start)), z = start + (end − start) t [Jabri22 alg. 1].

    v(z) = sigmoid(z/width); ``δ`` = 1e-9 keeps some signal at t = 1. log_snr is +inf at t = 0.
    """

    start: float = -3.0
    end: float = 3.0
    width: float = 1.0
    keep: float = 1e-9
    steps = None
    t_min = 1e-5

    def __post_init__(self) -> None:
        descending(self.start, self.end, "start", "end")
        descending(0.0, self.width, "0", "width")

    def _halves(self) -> tuple[float, float, float]:
        a, b = self.start / (2 * self.width), self.end / (2 * self.width)
        return b - a, a, b

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = time_of(t)
        h, a, b = self._halves()
        under = torch.cosh(a + h * t) * math.sinh(h)
        # sigmoid(p) − sigmoid(q) = sinh((p − q)/2)/(2 cosh(p/2) cosh(q/2)), for signal and noise alike
        signal = torch.sinh(h * (1 - t)) * math.cosh(a) / under
        noise = (1 - self.keep) * torch.sinh(h * t) * math.cosh(b) / under
        signal = self.keep + (1 - self.keep) * signal
        log_signal = torch.where(noise < 0.5, torch.log1p(-noise), torch.log(signal))
        log_snr = log_signal - torch.log(noise)
        return NoiseLevel(t, torch.exp(0.5 * log_signal), torch.sqrt(noise), log_snr, between=self.between)

    def between(self, t: Tensor, s: Tensor) -> Tensor:
        """frac = (alpha_s² − alpha_t²)/(alpha_s sigma_t)², the difference as a product."""
        at_t, at_s, (h, a, b) = self(t), self(s), self._halves()
        under = math.sinh(h) * torch.cosh(a + h * t) * torch.cosh(a + h * s)
        fall = (1 - self.keep) * math.cosh(a) * math.cosh(b) * torch.sinh(h * (t - s)) / under
        return fall / (at_s.alpha * at_t.sigma) ** 2

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        noise = torch.sigmoid(-double(log_snr)) / (1 - self.keep)
        low, high = _sigmoid(self.start / self.width), _sigmoid(self.end / self.width)
        z = self.width * torch.logit((low + noise * (high - low)).clamp(low, high))
        return ((z - self.start) / (self.end - self.start)).clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        level = self(t)
        low, high = _sigmoid(self.start / self.width), _sigmoid(self.end / self.width)
        v = torch.sigmoid((self.start + (self.end - self.start) * level.t) / self.width)
        slope = (1 - self.keep) * v * (1 - v) * (self.end - self.start) / self.width / (high - low)
        return -slope / (level.alpha * level.sigma) ** 2


@dataclass(frozen=True)
class VarianceExploding:
    """alpha = 1, sigma geometric from ``sigma_min`` to ``sigma_max`` [Song21 eq. 30; in Karras22 0.002 to 80]."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    steps = None
    t_min = 0.0

    def __post_init__(self) -> None:
        descending(0.0, self.sigma_min, "0", "sigma_min")
        descending(self.sigma_min, self.sigma_max, "sigma_min", "sigma_max")

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = time_of(t)
        log_sigma = math.log(self.sigma_min) + math.log(self.sigma_max / self.sigma_min) * t
        return NoiseLevel(t, torch.ones_like(t), torch.exp(log_sigma), -2 * log_sigma, between=self.between)

    def between(self, t: Tensor, s: Tensor) -> Tensor:
        return -torch.expm1(2 * math.log(self.sigma_max / self.sigma_min) * (s - t))

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        t = (-0.5 * double(log_snr) - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        return t.clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        return torch.full_like(time_of(t), -2 * math.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True)
class Flow:
    """alpha = 1 − t, sigma = t: straight lines from data to noise [Lipman23 eq. 20]. log_snr is ±inf at the ends."""

    steps = None
    t_min = 1e-5

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = time_of(t)
        return NoiseLevel(t, 1 - t, t, 2 * (torch.log1p(-t) - torch.log(t)), between=self.between)

    def between(self, t: Tensor, s: Tensor) -> Tensor:
        """frac = 1 − ((1 − t) s/((1 − s) t))², the difference of squares as a product."""
        return (t - s) * (t + s - 2 * t * s) / ((1 - s) * t) ** 2

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(-0.5 * double(log_snr))

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        t = time_of(t)
        return -2 / (t * (1 - t))


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "linear_rescaled": linear_rescaled,
    "quadratic": quadratic,
    "cosine": cosine,
    "sigmoid": Sigmoid,
    "linear_log_snr": LinearLogSNR,
    "learned": Learned,
    "variance_exploding": VarianceExploding,
    "flow": Flow,
    "tabulated": Tabulated,
}


def build(name: str, **settings: object) -> Schedule:
    """The schedule called ``name`` with its settings. Raises `ConfigError`."""
    if name not in SCHEDULES:
        raise ConfigError("SCHEDULE", repr(name), "no such schedule", f"Use one of {', '.join(SCHEDULES)}")
    try:
        return SCHEDULES[name](**settings)
    except TypeError as error:
        raise ConfigError(
            "SCHEDULE", f"schedule {name!r}", str(error).split(") ", 1)[-1], "Check the names of its settings"
        ) from None


def chain(schedule: Schedule, times: Sequence[float] | Tensor) -> list[NoiseLevel]:
    """The levels at ``times`` (from noise to data, falling), with the floor of this very chain at its end.

    The floor is what the log of the small variance becomes in the last step where sigma is 0: that of
    the step before (of a chain of one step, log of the large one). Raises ValueError.
    """
    times = time_of(torch.as_tensor(times, dtype=torch.float64))
    if times.ndim != 1 or len(times) < 2 or not bool((times[1:] < times[:-1]).all()):
        raise ValueError("a chain is a falling list of at least two times, from noise to data")
    levels = [schedule(t) for t in times]
    if levels[-1].sigma == 0:
        floor = None
        if len(levels) > 2:
            floor = 2 * torch.log(levels[-2].sigma) + torch.log(frac(levels[-3], levels[-2]))
        levels[-1] = levels[-1]._replace(floor=floor)
    return levels
