"""Schedules: maps from t in [0, 1] (0 data, 1 noise) to a noise level, float64 on the CPU.

`Tabulated` is the discrete chain, a grid of T + 1 levels; the others are functions. Discrete and
continuous time are the same code. ``beta`` and ``alpha_bar`` live in this module only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel, frac


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


def _double(value: Tensor | float | Sequence[float]) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()


def _time(t: Tensor | float) -> Tensor:
    t = _double(t)
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"a time must be in [0, 1], 0 for data and 1 for noise; got {t.flatten()[:3].tolist()}")
    return t


def preserving(t: Tensor, log_snr: Tensor) -> NoiseLevel:
    """The variance-preserving level of a ``log_snr``: alpha² = sigmoid(log_snr), sigma² = sigmoid(−log_snr)."""
    return NoiseLevel(t, torch.exp(0.5 * logsigmoid(log_snr)), torch.exp(0.5 * logsigmoid(-log_snr)), log_snr)


class Tabulated:
    """The chain of anybody's ``beta`` (T,), each in (0, 1), the last possibly 1 [Ho20 eq. 2, 4].

    alpha_bar_t = Π(1 − beta_i) is summed in the log domain with compensation, and what the sum loses
    is kept for `between`; between the grid's times t = k/T log alpha_bar is linear, that is, beta's
    rate is constant. log_snr is +inf at t = 0.
    Raises `ConfigError`.
    """

    def __init__(self, beta: Tensor | Sequence[float]) -> None:
        beta = _double(beta)
        if beta.ndim != 1 or not 1 <= len(beta) <= 1_000_000:
            raise ConfigError(
                "SCHEDULE",
                "beta",
                f"expected a list of T numbers, got the shape {tuple(beta.shape)}",
                "Pass one beta a step",
            )
        bad = ~((beta > 0) & (beta < 1))
        bad[-1] &= beta[-1] != 1
        if bad.any():
            k = int(bad.nonzero()[0])
            raise ConfigError(
                "SCHEDULE",
                f"beta[{k}] = {float(beta[k]):g}",
                "every beta must lie in (0, 1), the last may be 1",
                "Mend the table, or use a schedule that fits this T (linear_rescaled, cosine)",
            )
        self.beta, self.steps, self.t_min = beta, len(beta), 1.0 / len(beta)
        self._log_alpha_bar, self._lost = _compensated_cumsum(torch.log1p(-beta))
        variance = -torch.expm1(self._log_alpha_bar)
        self._floor = torch.log(beta[0] if self.steps == 1 else beta[1] * variance[1] / variance[2])

    def _position(self, t: Tensor) -> Tensor:
        position = t * self.steps
        nearest = position.round()
        return torch.where((position - nearest).abs() < 1e-9 * self.steps, nearest, position)

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha_bar at ``t``, and what its rounding lost."""
        position = self._position(t)
        below = position.floor().long()
        above, on = (below + 1).clamp(max=self.steps), position == below
        low, high = self._log_alpha_bar[below], self._log_alpha_bar[above]
        return torch.where(on, low, low + (position - below) * (high - low)), self._lost[below] * on

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = _time(t)
        log_alpha_bar, _ = self._at(t)
        variance = -torch.expm1(log_alpha_bar)
        log_snr, floor = log_alpha_bar - torch.log(variance), self._floor.expand(t.shape)
        return NoiseLevel(t, torch.exp(0.5 * log_alpha_bar), torch.sqrt(variance), log_snr, floor, self.between)

    def between(self, t: Tensor, s: Tensor) -> Tensor:
        """frac = −expm1(log alpha_bar_t − log alpha_bar_s)/(1 − alpha_bar_t)."""
        (at_t, lost_t), (at_s, lost_s) = self._at(t), self._at(s)
        return torch.expm1(at_t - at_s + (lost_t - lost_s)) / torch.expm1(at_t)

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        depth = -logsigmoid(_double(log_snr))
        grid = -self._log_alpha_bar
        k = (torch.searchsorted(grid, depth.contiguous()) - 1).clamp(0, self.steps - 1)
        share = torch.where(depth == grid[k + 1], 1, (depth - grid[k]) / (grid[k + 1] - grid[k]))
        return ((k + share) / self.steps).clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        level = self(t)
        k = self._position(level.t).ceil().long().clamp(min=1)
        return torch.log1p(-self.beta[k - 1]) * self.steps / level.sigma**2


def _compensated_cumsum(terms: Tensor) -> tuple[Tensor, Tensor]:
    """0 and the running sums of ``terms``, rounded, and what the rounding lost of each (Neumaier)."""
    sums, total, lost = [(0.0, 0.0)], 0.0, 0.0
    for term in terms.tolist():
        new = total + term
        if math.isfinite(new):
            lost += (total - new) + term if abs(total) >= abs(term) else (term - new) + total
        total, rounded = new, new + lost
        sums.append((rounded, total - rounded + lost if math.isfinite(new) else 0.0))
    high, low = torch.tensor(sums, dtype=torch.float64).unbind(1)
    return high, low


def _length(T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, int) or not 1 <= T <= 10_000:
        raise ConfigError(
            "SCHEDULE", f"T = {T}", "the number of steps must be a whole number from 1 to 10,000", "Choose such a T"
        )
    return T


def _line(first: float, last: float, T: int) -> Tensor:
    return torch.linspace(first, last, _length(T), dtype=torch.float64)


def linear(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tabulated:
    """beta linear from ``first`` to ``last`` [Ho20 §4]."""
    return Tabulated(_line(first, last, T))


def linear_rescaled(T: int = 1000, first: float = 1e-4, last: float = 0.02, limit: float = 0.999) -> Tabulated:
    """beta linear with both ends times 1000/T, at most ``limit`` [Dhariwal21's code]."""
    return Tabulated(_line(first * 1000 / _length(T), last * 1000 / T, T).clamp(max=limit))


def quadratic(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tabulated:
    """√beta linear, elsewhere called scaled linear [Song21 DDIM's code]."""
    return Tabulated(_line(math.sqrt(first), math.sqrt(last), T) ** 2)


def cosine(T: int = 1000, s: float = 0.008, limit: float = 0.999) -> Tabulated:
    """beta_t = 1 − f(t)/f(t−1) ≤ ``limit``, f = cos²(π/2 (t/T + s)/(1 + s)) [Nichol21 eq. 17].

    alpha_bar is the product of what is left. With c_t the complement of the angle f = sin² c_t, and
    beta_t = sin(c_{t−1} − c_t) sin(c_{t−1} + c_t)/sin² c_{t−1}.
    """
    scale = math.pi / 2 / (1 + s) / _length(T)
    c = scale * torch.arange(T, -1, -1, dtype=torch.float64)
    beta = math.sin(scale) * torch.sin(c[:-1] + c[1:]) / torch.sin(c[:-1]) ** 2
    return Tabulated(beta.clamp(max=limit))


@dataclass(frozen=True)
class LinearLogSNR:
    """log_snr linear from ``high`` at t = 0 to ``low`` at t = 1, variance preserving [VDM21 app. I.2]."""

    high: float = 13.3
    low: float = -5.0
    steps = None
    t_min = 0.0

    def __post_init__(self) -> None:
        _descending(self.low, self.high, "low", "high")

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = _time(t)
        return preserving(t, self.high + (self.low - self.high) * t)._replace(between=self.between)

    def between(self, t: Tensor, s: Tensor) -> Tensor:
        return -torch.expm1((self.low - self.high) * (t - s))

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        return ((_double(log_snr) - self.high) / (self.low - self.high)).clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        return torch.full_like(_time(t), self.low - self.high)


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
        _descending(self.start, self.end, "start", "end")
        _descending(0.0, self.width, "0", "width")

    def _halves(self) -> tuple[float, float, float]:
        a, b = self.start / (2 * self.width), self.end / (2 * self.width)
        return b - a, a, b

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = _time(t)
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
        noise = torch.sigmoid(-_double(log_snr)) / (1 - self.keep)
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
        _descending(0.0, self.sigma_min, "0", "sigma_min")
        _descending(self.sigma_min, self.sigma_max, "sigma_min", "sigma_max")

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = _time(t)
        log_sigma = math.log(self.sigma_min) + math.log(self.sigma_max / self.sigma_min) * t
        return NoiseLevel(t, torch.ones_like(t), torch.exp(log_sigma), -2 * log_sigma, between=self.between)

    def between(self, t: Tensor, s: Tensor) -> Tensor:
        return -torch.expm1(2 * math.log(self.sigma_max / self.sigma_min) * (s - t))

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        t = (-0.5 * _double(log_snr) - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        return t.clamp(0, 1)

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        return torch.full_like(_time(t), -2 * math.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True)
class Flow:
    """alpha = 1 − t, sigma = t: straight lines from data to noise [Lipman23 eq. 20]. log_snr is ±inf at the ends."""

    steps = None
    t_min = 1e-5

    def __call__(self, t: Tensor | float) -> NoiseLevel:
        t = _time(t)
        return NoiseLevel(t, 1 - t, t, 2 * (torch.log1p(-t) - torch.log(t)), between=self.between)

    def between(self, t: Tensor, s: Tensor) -> Tensor:
        """frac = 1 − ((1 − t) s/((1 − s) t))², the difference of squares as a product."""
        return (t - s) * (t + s - 2 * t * s) / ((1 - s) * t) ** 2

    def inverse(self, log_snr: Tensor | float) -> Tensor:
        return torch.sigmoid(-0.5 * _double(log_snr))

    def log_snr_rate(self, t: Tensor | float) -> Tensor:
        t = _time(t)
        return -2 / (t * (1 - t))


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _descending(low: float, high: float, low_name: str, high_name: str) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            "SCHEDULE",
            f"{low_name} = {low:g}, {high_name} = {high:g}",
            f"{low_name} must be below {high_name}",
            "The log-SNR of a schedule falls from data to noise",
        )


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "linear_rescaled": linear_rescaled,
    "quadratic": quadratic,
    "cosine": cosine,
    "sigmoid": Sigmoid,
    "linear_log_snr": LinearLogSNR,
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
    times = _time(torch.as_tensor(times, dtype=torch.float64))
    if times.ndim != 1 or len(times) < 2 or not bool((times[1:] < times[:-1]).all()):
        raise ValueError("a chain is a falling list of at least two times, from noise to data")
    levels = [schedule(t) for t in times]
    if levels[-1].sigma == 0:
        floor = None
        if len(levels) > 2:
            floor = 2 * torch.log(levels[-2].sigma) + torch.log(frac(levels[-3], levels[-2]))
        levels[-1] = levels[-1]._replace(floor=floor)
    return levels
