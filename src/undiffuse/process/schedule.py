"""Schedules: maps from t in [0, 1] (0 data, 1 noise) to a noise level, float64 on the CPU.

Here are the functions of time; `undiffuse.process.discrete_schedule` has the discrete chains, and
`undiffuse.process.tables` all by name. Discrete and continuous time are the same code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from undiffuse.errors import ConfigError, unknown_name
from undiffuse.process.noise_level import NoiseLevel, as_float64, check_ascending, check_time, transition_frac, vp_level
from undiffuse.process.tables import SCHEDULES


class Schedule(Protocol):
    @property
    def chain_length(self) -> int | None:
        """T of a discrete chain, whose levels are at t = k/T; None for a function of time."""
        ...

    @property
    def t_min(self) -> float:
        """The cleanest time at which a network is called: log_snr is finite on [t_min, 1)."""
        ...

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        """The noise level at ``t``, of ``t``'s shape. Raises ValueError outside [0, 1]."""
        ...

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        """The t whose level has this ``log_snr``, clamped to [0, 1]; float64 of its shape."""
        ...

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        """d log_snr / dt ≤ 0, float64 of ``t``'s shape. Raises ValueError outside [0, 1]."""
        ...


@dataclass(frozen=True)
class LinearLogSNR:
    """log_snr linear from ``high`` at t = 0 to ``low`` at t = 1, variance preserving [VDM21 app. I.2]."""

    high: float = 13.3
    low: float = -5.0
    chain_length = None
    t_min = 0.0

    def __post_init__(self) -> None:
        check_ascending(self.low, self.high, "low", "high")

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = check_time(t)
        return vp_level(t, self.high + (self.low - self.high) * t)._replace(frac_fn=self.frac_between)

    def frac_between(self, t: Tensor, s: Tensor) -> Tensor:
        """frac = −expm1((low − high)(t − s))."""
        return -torch.expm1((self.low - self.high) * (t - s))

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        return ((as_float64(log_snr) - self.high) / (self.low - self.high)).clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        return torch.full_like(check_time(t), self.low - self.high)


MAX_SIGMOID_WIDTHS = 50
"""The largest (end − start)/width of `Sigmoid`: beyond it alpha² is ``min_signal`` to rounding long before t = 1."""


@dataclass(frozen=True)
class Sigmoid:
    """alpha² = δ + (1 − δ)(v(end) − v(z))/(v(end) − v(start)), z = start + (end − start) t [Jabri22 alg. 1].

    v(z) = sigmoid(z/width); δ = ``min_signal`` is the signal at t = 1. log_snr is +inf at t = 0.
    """

    start: float = -3.0
    end: float = 3.0
    width: float = 1.0
    min_signal: float = 1e-9
    chain_length = None
    t_min = 1e-5

    def __post_init__(self) -> None:
        check_ascending(self.start, self.end, "start", "end")
        check_ascending(0.0, self.width, "0", "width")
        if not self.end - self.start <= MAX_SIGMOID_WIDTHS * self.width:
            cause = f"is less than 1/{MAX_SIGMOID_WIDTHS} of end − start = {self.end - self.start:g}"
            raise ConfigError("SCHEDULE", f"width = {self.width:g}", cause, "Give a larger width, such as 1")

    def _halves(self) -> tuple[float, float, float]:
        a, b = self.start / (2 * self.width), self.end / (2 * self.width)
        return b - a, a, b

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = check_time(t)
        h, a, b = self._halves()
        under = torch.cosh(a + h * t) * math.sinh(h)
        # sigmoid(p) − sigmoid(q) = sinh((p − q)/2)/(2 cosh(p/2) cosh(q/2)), for signal and noise alike
        signal = torch.sinh(h * (1 - t)) * math.cosh(a) / under
        noise = (1 - self.min_signal) * torch.sinh(h * t) * math.cosh(b) / under
        signal = self.min_signal + (1 - self.min_signal) * signal
        log_signal = torch.where(noise < 0.5, torch.log1p(-noise), torch.log(signal))
        log_snr = log_signal - torch.log(noise)
        return NoiseLevel(t, torch.exp(0.5 * log_signal), torch.sqrt(noise), log_snr, frac_fn=self.frac_between)

    def frac_between(self, t: Tensor, s: Tensor) -> Tensor:
        """frac = (alpha_s² − alpha_t²)/(alpha_s sigma_t)², with the difference as a product of sinh."""
        at_t, at_s, (h, a, b) = self(t), self(s), self._halves()
        under = math.sinh(h) * torch.cosh(a + h * t) * torch.cosh(a + h * s)
        fall = (1 - self.min_signal) * math.cosh(a) * math.cosh(b) * torch.sinh(h * (t - s)) / under
        return fall / (at_s.alpha * at_t.sigma) ** 2

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        noise = torch.sigmoid(-as_float64(log_snr)) / (1 - self.min_signal)
        low, high = _sigmoid(self.start / self.width), _sigmoid(self.end / self.width)
        z = self.width * torch.logit((low + noise * (high - low)).clamp(low, high))
        return ((z - self.start) / (self.end - self.start)).clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        level = self(t)
        low, high = _sigmoid(self.start / self.width), _sigmoid(self.end / self.width)
        v = torch.sigmoid((self.start + (self.end - self.start) * level.t) / self.width)
        slope = (1 - self.min_signal) * v * (1 - v) * (self.end - self.start) / self.width / (high - low)
        return -slope / (level.alpha * level.sigma) ** 2


@dataclass(frozen=True)
class VarianceExploding:
    """alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t [Song21 eq. 30; Karras22 use 0.002 to 80]."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    chain_length = None
    t_min = 0.0

    def __post_init__(self) -> None:
        check_ascending(0.0, self.sigma_min, "0", "sigma_min")
        check_ascending(self.sigma_min, self.sigma_max, "sigma_min", "sigma_max")

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = check_time(t)
        log_sigma = math.log(self.sigma_min) + math.log(self.sigma_max / self.sigma_min) * t
        return NoiseLevel(t, torch.ones_like(t), torch.exp(log_sigma), -2 * log_sigma, frac_fn=self.frac_between)

    def frac_between(self, t: Tensor, s: Tensor) -> Tensor:
        """frac = −expm1(2 log(sigma_max/sigma_min) (s − t))."""
        return -torch.expm1(2 * math.log(self.sigma_max / self.sigma_min) * (s - t))

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        t = (-0.5 * as_float64(log_snr) - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        return t.clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        return torch.full_like(check_time(t), -2 * math.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True)
class Flow:
    """alpha = 1 − t, sigma = t [Lipman23 eq. 20]. log_snr is +inf at t = 0 and −inf at t = 1."""

    chain_length = None
    t_min = 1e-5

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = check_time(t)
        return NoiseLevel(t, 1 - t, t, 2 * (torch.log1p(-t) - torch.log(t)), frac_fn=self.frac_between)

    def frac_between(self, t: Tensor, s: Tensor) -> Tensor:
        """frac = 1 − ((1 − t) s/((1 − s) t))², with the difference of squares as a product."""
        return (t - s) * (t + s - 2 * t * s) / ((1 - s) * t) ** 2

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(-0.5 * as_float64(log_snr))

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        t = check_time(t)
        return -2 / (t * (1 - t))


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def build(name: str, **settings: object) -> Schedule:
    """The schedule ``name`` of `SCHEDULES` with its settings. Raises `ConfigError`."""
    if name not in SCHEDULES:
        raise unknown_name("SCHEDULE", name, "schedule", SCHEDULES)
    try:
        return SCHEDULES[name](**settings)
    except TypeError as error:
        raise ConfigError(
            "SCHEDULE", f"schedule {name!r}", str(error).split(") ", 1)[-1], "Check the names of its settings"
        ) from None


def chain(schedule: Schedule, times: Sequence[float] | Tensor) -> list[NoiseLevel]:
    """The levels at ``times``, which fall from noise to data.

    Where the last level has sigma = 0, its ``final_log_var`` is the small log-variance of the step before the last
    (None in a chain of one step). Raises ValueError.
    """
    times = check_time(torch.as_tensor(times, dtype=torch.float64))
    if times.ndim != 1 or len(times) < 2 or not bool((times[1:] < times[:-1]).all()):
        raise ValueError("a chain is a falling list of at least two times, from noise to data")
    batch = schedule(times)
    columns = (value.unbind() for value in batch[:4])
    levels = [NoiseLevel(*values, frac_fn=batch.frac_fn) for values in zip(*columns, strict=True)]
    if batch.final_log_var is not None:
        levels = [level._replace(final_log_var=v) for level, v in zip(levels, batch.final_log_var, strict=True)]
    if levels[-1].sigma == 0:
        final = None
        if len(levels) > 2:
            final = 2 * torch.log(levels[-2].sigma) + torch.log(transition_frac(levels[-3], levels[-2]))
        levels[-1] = levels[-1]._replace(final_log_var=final)
    return levels


MIN_LOG_SNR = -20.0
"""log-SNR at which schedules that reach −∞ are cut: there |x| = 1 adds 1.03e-9 nats per dimension to the prior's KL."""


@torch.no_grad()
def finite_ends(schedule: Schedule) -> tuple[NoiseLevel, NoiseLevel]:
    """(noisiest, cleanest) level: at t = 1, or where log_snr = `MIN_LOG_SNR` if it falls below that, and at t_min.

    Both log_snr are finite. A table that ends without signal is cut one step earlier, at t = 1 − 1/T.
    """
    noisiest = schedule(1.0)
    if bool(noisiest.log_snr < MIN_LOG_SNR):
        noisiest = schedule(schedule.inverse(MIN_LOG_SNR))
    return noisiest, schedule(schedule.t_min)
