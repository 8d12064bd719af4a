"""Densities of times: how often training visits a noise level, apart from how much it counts.

Each maps uniform numbers u in [0, 1) to times by its quantile function, so randomness stays an
argument: independent u give independent times, `low_discrepancy` u a set that covers the density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.process.schedule import Schedule

_EDGE = 2.0**-53
RECENT = 10
"""Losses of each stratum that `LossAware` remembers."""


class Times(Protocol):
    def sample(self, u: Tensor) -> Tensor:
        """Times in [0, 1] for uniform numbers ``u`` in [0, 1), float64 of ``u``'s shape."""
        ...

    def log_prob(self, t: Tensor) -> Tensor:
        """log density (of `Steps` and `LossAware`: log probability) at ``t``, nats, −inf outside."""
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
        return _constant(-math.log(self.T), _step(t, self.T)[1])


@dataclass(frozen=True, eq=False)
class LossAware:
    """t = k/T, p(k) = (1 − share) r_k/Σ r + share/T, r_k = √mean(L²) of its last losses [Nichol21 §3.3].

    A loss times `importance` has the mean that it has for uniform steps, and least variance where r_k is
    √E[L²]. ``history`` (strata, 10) holds the squares of the last losses, the newest last, and −1 where there
    is none yet; the density is uniform until all are there. A stratum is one step, or T/strata neighbours.
    It does not change: `observe` makes another.
    """

    T: int
    share: float
    history: Tensor

    def probabilities(self) -> Tensor:
        """p(k) of the steps 1..T, (T,) float64."""
        uniform = torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        if bool((self.history < 0).any()) or not bool(self.history.any()):
            return uniform
        size = torch.sqrt(self.history.mean(1))[self._stratum(torch.arange(1, self.T + 1))]
        return (1 - self.share) * size / size.sum() + self.share * uniform

    def sample(self, u: Tensor) -> Tensor:
        below = torch.searchsorted(self.probabilities().cumsum(0), u.double().contiguous(), right=True)
        return (below + 1).clamp(max=self.T).double() / self.T

    def log_prob(self, t: Tensor) -> Tensor:
        k, on_grid = _step(t, self.T)
        return torch.where(on_grid, torch.log(self.probabilities())[k.clamp(1, self.T) - 1], -math.inf)

    def importance(self, t: Tensor) -> Tensor:
        """1/(T p(k)), what a loss at ``t`` is multiplied with, at most 1/share."""
        return torch.exp(-self.log_prob(t)) / self.T

    def observe(self, t: Tensor, loss: Tensor) -> LossAware:
        """The density that knows these losses (n,) at ``t`` (n,) too, as they were before `importance`."""
        where = self._stratum(_step(t, self.T)[0])
        order = torch.argsort(where, stable=True)
        count = torch.bincount(where, minlength=len(self.history))
        place = RECENT + torch.arange(len(where)) - (count.cumsum(0) - count)[where[order]]
        wide = torch.cat([self.history, self.history.new_full((len(count), int(count.max())), -1)], 1)
        wide[where[order], place] = loss.detach().to(wide)[order] ** 2
        return replace(self, history=wide.gather(1, count[:, None] + torch.arange(RECENT)))

    def _stratum(self, k: Tensor) -> Tensor:
        return (k - 1) * len(self.history) // self.T


def loss_aware(T: int, share: float = 0.001, strata: int = 1000) -> LossAware:
    """A `LossAware` that has seen no loss, of at most ``strata`` strata. Raises `ConfigError`."""
    if not 0 < share <= 1 or strata < 1 or strata % 1:
        where = f"times 'loss_aware', share = {share}, strata = {strata}"
        cause = "share must be above 0 and at most 1, strata a whole number from 1"
        raise ConfigError("TIMES", where, cause, "Leave them out for 0.001 and 1000")
    return LossAware(T, share, torch.full((min(int(strata), T), RECENT), -1.0, dtype=torch.float64))


def _step(t: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The step k nearest to ``t``, and whether ``t`` is k/T of a step of the chain."""
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
    """The density called ``name``: ``steps``, ``loss_aware``, ``uniform`` (on [1/T, 1]), ``logit_normal`` or
    ``log_normal_sigma``."""
    try:
        if name == "steps":
            return Steps(T, **settings)  # type: ignore[arg-type]
        if name == "loss_aware":
            return loss_aware(T, **settings)  # type: ignore[arg-type]
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
    known = "steps, loss_aware, uniform, logit_normal or log_normal_sigma"
    raise ConfigError("TIMES", repr(name), "no such density of times", f"Use {known}")
