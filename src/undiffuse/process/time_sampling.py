"""Distributions of training times: how often training visits a noise level. Its weight is a separate setting.

Each maps uniform numbers u in [0, 1) to times by its quantile function, so that randomness stays an argument:
independent u give independent times, those of `low_discrepancy` give times that cover the distribution evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from undiffuse.errors import ConfigError, unknown_name
from undiffuse.process.schedule import Schedule

_EDGE = 2.0**-53
HISTORY_LENGTH = 10
"""Losses of each stratum that `LossAwareSteps` keeps."""


class TimeDistribution(Protocol):
    def sample(self, u: Tensor) -> Tensor:
        """Times in [0, 1] for uniform numbers ``u`` in [0, 1), float64 of ``u``'s shape."""
        ...

    def log_prob(self, t: Tensor) -> Tensor:
        """log density at ``t`` (log probability for `UniformSteps` and `LossAwareSteps`), nats; −inf outside."""
        ...


def low_discrepancy(u: Tensor, n: int) -> Tensor:
    """(u + i/n) mod 1, (n,): each uniform, together equally spaced [VDM21 app. I.1]; ``u`` is ()."""
    return (u.double() + torch.arange(n, dtype=torch.float64) / n) % 1.0


def _constant(log_prob: float, inside: Tensor) -> Tensor:
    return torch.where(inside, torch.tensor(log_prob, dtype=torch.float64), -math.inf)


@dataclass(frozen=True)
class UniformTime:
    """t uniform on [low, high], or t = low where they are equal."""

    low: float = 0.0
    high: float = 1.0

    def sample(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u.double()

    def log_prob(self, t: Tensor) -> Tensor:
        inside = (t >= self.low) & (t <= self.high)
        return _constant(-math.log(self.high - self.low) if self.low < self.high else 0.0, inside)


@dataclass(frozen=True)
class UniformSteps:
    """t = k/T with k uniform on 1..T [Ho20 algorithm 1]."""

    T: int

    def sample(self, u: Tensor) -> Tensor:
        return (torch.floor(u.double() * self.T) + 1).clamp(max=self.T) / self.T

    def log_prob(self, t: Tensor) -> Tensor:
        return _constant(-math.log(self.T), _step(t, self.T)[1])


@dataclass(frozen=True, eq=False)
class LossAwareSteps:
    """t = k/T, p(k) = (1 − f) r_k/Σ r + f/T, r_k = √mean(L²) of the step's last losses [Nichol21 §3.3].

    f is ``uniform_fraction``. A loss times `importance_weight` has the same mean as with uniform steps, and the least
    variance where r_k = √E[L²]. ``history`` (strata, 10) holds the last squared losses, the newest last, and −1 where
    there is none yet; p is uniform until it is full. A stratum is one step, or T/strata neighbouring steps.
    Immutable: `update` returns a new one.
    """

    T: int
    uniform_fraction: float
    history: Tensor

    def probabilities(self) -> Tensor:
        """p(k) of the steps 1..T, (T,) float64."""
        uniform = torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        if bool((self.history < 0).any()) or not bool(self.history.any()):
            return uniform
        size = torch.sqrt(self.history.mean(1))[self._stratum(torch.arange(1, self.T + 1))]
        return (1 - self.uniform_fraction) * size / size.sum() + self.uniform_fraction * uniform

    def sample(self, u: Tensor) -> Tensor:
        below = torch.searchsorted(self.probabilities().cumsum(0), u.double().contiguous(), right=True)
        return (below + 1).clamp(max=self.T).double() / self.T

    def log_prob(self, t: Tensor) -> Tensor:
        k, on_grid = _step(t, self.T)
        return torch.where(on_grid, torch.log(self.probabilities())[k.clamp(1, self.T) - 1], -math.inf)

    def importance_weight(self, t: Tensor) -> Tensor:
        """1/(T p(k)), the factor for a loss at ``t``, at most 1/``uniform_fraction``."""
        return torch.exp(-self.log_prob(t)) / self.T

    def update(self, t: Tensor, loss: Tensor) -> LossAwareSteps:
        """The distribution after these losses (n,) at ``t`` (n,), taken before `importance_weight`."""
        where = self._stratum(_step(t, self.T)[0])
        order = torch.argsort(where, stable=True)
        count = torch.bincount(where, minlength=len(self.history))
        place = HISTORY_LENGTH + torch.arange(len(where)) - (count.cumsum(0) - count)[where[order]]
        wide = torch.cat([self.history, self.history.new_full((len(count), int(count.max())), -1)], 1)
        wide[where[order], place] = loss.detach().to(wide)[order] ** 2
        return replace(self, history=wide.gather(1, count[:, None] + torch.arange(HISTORY_LENGTH)))

    def _stratum(self, k: Tensor) -> Tensor:
        return (k - 1) * len(self.history) // self.T


def loss_aware(T: int, uniform_fraction: float = 0.001, strata: int = 1000) -> LossAwareSteps:
    """A `LossAwareSteps` with an empty history of at most ``strata`` strata. Raises `ConfigError`."""
    if not 0 < uniform_fraction <= 1 or strata < 1 or strata % 1:
        where = f"times 'loss_aware', uniform_fraction = {uniform_fraction}, strata = {strata}"
        cause = "uniform_fraction must be above 0 and at most 1, strata a whole number from 1"
        raise ConfigError("TIMES", where, cause, "Omit them to use 0.001 and 1000")
    history = torch.full((min(int(strata), T), HISTORY_LENGTH), -1.0, dtype=torch.float64)
    return LossAwareSteps(T, uniform_fraction, history)


def _step(t: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The step k nearest to ``t``, and whether ``t`` = k/T with k in 1..T."""
    k = t.double() * T
    return k.round().long(), ((k - k.round()).abs() < 1e-6) & (k > 0.5) & (k < T + 0.5)


@dataclass(frozen=True)
class LogitNormal:
    """logit t ~ N(mean, std²) [Esser24 §3.1]."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.double().clamp(_EDGE, 1 - _EDGE)))

    def log_prob(self, t: Tensor) -> Tensor:
        t = t.double()
        z = (torch.logit(t) - self.mean) / self.std
        inside = (t > 0) & (t < 1)
        density = -0.5 * (z**2 + math.log(2 * math.pi)) - math.log(self.std) - torch.log(t) - torch.log1p(-t)
        return torch.where(inside, density, -math.inf)


@dataclass(frozen=True)
class LogNormalSigma:
    """log(sigma/alpha) ~ N(mean, std²) truncated to the schedule's range [Karras22 table 1: −1.2, 1.2]."""

    schedule: Schedule
    mean: float = -1.2
    std: float = 1.2

    def _range(self) -> tuple[Tensor, Tensor]:
        ends = self.schedule(torch.tensor([self.schedule.t_min, 1.0], dtype=torch.float64)).log_snr
        low, high = torch.special.ndtr((-0.5 * ends - self.mean) / self.std)
        return low, high

    def sample(self, u: Tensor) -> Tensor:
        low, high = self._range()
        z = torch.special.ndtri((low + (high - low) * u.double()).clamp(_EDGE, 1 - _EDGE))
        t = self.schedule.inverse(-2 * (self.mean + self.std * z))
        return t.clamp(min=self.schedule.t_min)

    def log_prob(self, t: Tensor) -> Tensor:
        low, high = self._range()
        t = t.double()
        at = t.clamp(self.schedule.t_min, 1.0)
        z = (-0.5 * self.schedule(at).log_snr - self.mean) / self.std
        density = -0.5 * (z**2 + math.log(2 * math.pi)) - math.log(self.std) - torch.log(high - low)
        inside = (t == at) & torch.isfinite(z)
        return torch.where(inside, density + torch.log(-0.5 * self.schedule.log_snr_rate(at)), -math.inf)


TIME_DISTRIBUTIONS: dict[str, Callable[..., TimeDistribution]] = {  # (schedule, T, settings)
    "steps": lambda schedule, T, **settings: UniformSteps(T, **settings),
    "loss_aware": lambda schedule, T, **settings: loss_aware(T, **settings),
    "uniform": lambda schedule, T, **settings: UniformTime(**{"low": 1.0 / T} | settings),
    "logit_normal": lambda schedule, T, **settings: LogitNormal(**settings),
    "log_normal_sigma": lambda schedule, T, **settings: LogNormalSigma(schedule, **settings),
}


def build(name: str, schedule: Schedule, T: int, **settings: float) -> TimeDistribution:
    """The distribution ``name`` of `TIME_DISTRIBUTIONS` with its settings. Raises `ConfigError`."""
    if name not in TIME_DISTRIBUTIONS:
        raise unknown_name("TIMES", name, "distribution of times", TIME_DISTRIBUTIONS)
    fix = "See the documentation of undiffuse.process.time_sampling"
    try:
        times = TIME_DISTRIBUTIONS[name](schedule, T, **settings)
    except TypeError:
        cause = f"no such setting among {', '.join(settings)}"
        raise ConfigError("TIMES", f"times {name!r}", cause, fix) from None
    if isinstance(times, UniformTime) and not 0 <= times.low <= times.high <= 1:
        raise ConfigError("TIMES", f"times {name!r}", "low and high are not 0 <= low <= high <= 1", fix)
    if isinstance(times, LogitNormal | LogNormalSigma) and not 0 < times.std < math.inf:
        raise ConfigError("TIMES", f"times {name!r}", f"std = {times.std} is not above 0 and finite", fix)
    return times
