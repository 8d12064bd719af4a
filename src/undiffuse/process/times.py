"""Densities of times: how often training visits a noise level, apart from how much it counts.

Each maps uniform numbers u in [0, 1) to times by its quantile function, so randomness stays an
argument: independent u give independent times, `low_discrepancy` u a set that covers the density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.process.schedule import Schedule

_EDGE = 2.0**-53


class Times(Protocol):
    def sample(self, u: Tensor) -> Tensor:
        """Times in [0, 1] for uniform numbers ``u`` in [0, 1), float64 of ``u``'s shape."""
        ...

    def log_prob(self, t: Tensor) -> Tensor:
        """log density (of `Steps`: log probability) at ``t``, nats, −inf outside."""
        ...


def low_discrepancy(u: Tensor, n: int) -> Tensor:
    """n numbers (u + i/n) mod 1 that are each uniform and together equally spaced [VDM21 app. I.1]; ``u`` is ()."""
    return (u.double() + torch.arange(n, dtype=torch.float64) / n) % 1.0


def _constant(log_prob: float, where: Tensor) -> Tensor:
    return torch.where(where, torch.tensor(log_prob, dtype=torch.float64), -math.inf)


@dataclass(frozen=True)
class Uniform:
    """t uniform on [low, high]."""

    low: float = 0.0
    high: float = 1.0

    def sample(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * u.double()

    def log_prob(self, t: Tensor) -> Tensor:
        inside = (t >= self.low) & (t <= self.high)
        return _constant(-math.log(self.high - self.low), inside)


@dataclass(frozen=True)
class Steps:
    """t = k/T with k uniform on 1..T [Ho20 algorithm 1]."""

    T: int

    def sample(self, u: Tensor) -> Tensor:
        return (torch.floor(u.double() * self.T) + 1).clamp(max=self.T) / self.T

    def log_prob(self, t: Tensor) -> Tensor:
        k = t.double() * self.T
        on_grid = ((k - k.round()).abs() < 1e-6) & (k > 0.5) & (k < self.T + 0.5)
        return _constant(-math.log(self.T), on_grid)


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
    """log(sigma/alpha) ~ N(mean, std²) cut to the schedule's range [Karras22 table 1: −1.2, 1.2]."""

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


def build(name: str, schedule: Schedule, T: int, **settings: float) -> Times:
    """The density called ``name``: ``steps``, ``uniform`` (on [1/T, 1]), ``logit_normal`` or ``log_normal_sigma``."""
    try:
        if name == "steps":
            return Steps(T, **settings)  # type: ignore[arg-type]
        if name == "uniform":
            return Uniform(**({"low": 1.0 / T} | settings))
        if name == "logit_normal":
            return LogitNormal(**settings)
        if name == "log_normal_sigma":
            return LogNormalSigma(schedule, **settings)
    except TypeError:
        raise ConfigError(
            "TIMES",
            f"times {name!r}",
            f"no such setting among {', '.join(settings)}",
            "See the documentation of undiffuse.process.times",
        ) from None
    raise ConfigError(
        "TIMES", repr(name), "no such density of times", "Use steps, uniform, logit_normal or log_normal_sigma"
    )
