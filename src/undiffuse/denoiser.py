"""Denoisers: what every sampler and likelihood calls, and the network seen as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from undiffuse.conditioning import Condition
from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel, like
from undiffuse.process.schedule import Schedule
from undiffuse.process.target import Target


class Prediction(NamedTuple):
    """x̂ and ε̂, both of x_t's shape, with x_t = alpha x̂ + sigma ε̂.

    ``nu``, where the variance is learned: the unclamped share from the log of the small variance (0)
    to the log of the large one (1).
    """

    x: Tensor
    eps: Tensor
    nu: Tensor | None = None


class Denoiser(Protocol):
    @property
    def schedule(self) -> Schedule: ...

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        """The prediction at ``x_t`` (B, ...), whose ``level`` is () or (B,); ``to`` is the level aimed at."""
        ...


SCALES: dict[str, Callable[[NoiseLevel, float], Tensor]] = {
    "none": lambda level, sigma_data: torch.ones_like(level.alpha),  # Ho20
    "unit": lambda level, sigma_data: 1 / torch.sqrt(level.alpha**2 * sigma_data**2 + level.sigma**2),  # Karras22 c_in
}
TIMES: dict[str, Callable[[NoiseLevel, int], Tensor]] = {
    "t": lambda level, steps: level.t,
    "thousand": lambda level, steps: 1000 * level.t,
    "step": lambda level, steps: steps * level.t - 1,  # Ho20, whose code counts t from 0
    "log_snr": lambda level, steps: level.log_snr.clamp(-30, 30),  # VDM21
    "log_sigma": lambda level, steps: (-0.125 * level.log_snr).clamp(-8, 8),  # Karras22 c_noise = ln(sigma)/4
}


@dataclass(frozen=True)
class Preconditioning:
    """How a network is told x_t and its level: ``scale`` is a row of `SCALES`, ``time`` one of `TIMES`.

    ``step`` is the whole number k − 1 in 0..T−1 for t = k/T, as Ho's network takes it.
    """

    scale: str = "none"
    time: str = "log_snr"
    sigma_data: float = 1.0
    steps: int = 1000

    def __post_init__(self) -> None:
        for field, table in (("scale", SCALES), ("time", TIMES)):
            if getattr(self, field) not in table:
                raise ConfigError(
                    "PRECONDITIONING",
                    f"{field} = {getattr(self, field)!r}",
                    "unknown",
                    f"Use one of {', '.join(table)}",
                )

    def input_scale(self, level: NoiseLevel) -> Tensor:
        """What x_t is multiplied with, float64 of ``level``'s shape."""
        return SCALES[self.scale](level, self.sigma_data)

    def time_input(self, level: NoiseLevel) -> Tensor:
        """The number that the network embeds, float64 of ``level``'s shape."""
        return TIMES[self.time](level, self.steps)


class NetworkDenoiser:
    """A network with its target and preconditioning, as a denoiser.

    The network maps (x_t, time (B,), cond) to y, of x_t's shape, or with a learned variance to twice
    the channels, y and a number that is −1 at the small and 1 at the large variance. One of ``levels``
    (`Lattice`) is told the level too and says x̂ in place of y. It runs in ``autocast`` precision if given;
    all arithmetic around it is float32 at least.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        target: Target,
        preconditioning: Preconditioning,
        learned_variance: bool = False,
        autocast: torch.dtype | None = None,
        levels: bool = False,
    ) -> None:
        self.network, self.schedule, self.target, self.levels = network, schedule, target, levels
        self.preconditioning, self.learned_variance, self.autocast = preconditioning, learned_variance, autocast
        if target.pair and schedule.steps is None:
            raise ConfigError(
                "TARGET",
                f"target {target.name!r}",
                "it is defined by the steps of a chain, and this schedule is a function of time",
                "Use a tabulated schedule, or the target 'x', 'eps' or 'v'",
            )

    def aim(self, level: NoiseLevel) -> NoiseLevel | None:
        """The level s that a pair target was trained with: one step of the table below, else None."""
        if not self.target.pair:
            return None
        steps = self.schedule.steps
        assert steps is not None
        return self.schedule((level.t - 1 / steps).clamp(min=0))

    def outputs(self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None) -> tuple[Tensor, Tensor | None]:
        """(y, nu) as the network says them, in float32 at least."""
        at = level.like(x_t)
        scaled = like(self.preconditioning.input_scale(level), x_t) * x_t
        time = self.preconditioning.time_input(level).to(device=x_t.device, dtype=scaled.dtype).expand(x_t.shape[0])
        precision = contextlib.nullcontext()
        if self.autocast is not None:
            precision = torch.autocast(x_t.device.type, dtype=self.autocast)
        with precision:
            y = self.network(scaled, time, cond, *([x_t, at.alpha, at.sigma] if self.levels else []))
        y, v = y.to(scaled.dtype).split(x_t.shape[1], 1) if self.learned_variance else (y.to(scaled.dtype), None)
        if self.levels:
            y = self.target.encode(y, (x_t - at.alpha * y) / at.sigma, level, self.aim(level))
        return y, None if v is None else (v + 1) / 2

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        y, nu = self.outputs(x_t, level, cond)
        x, eps = self.target.decode(y, x_t, level, self.aim(level))
        return Prediction(x, eps, nu)


@dataclass(frozen=True)
class Clipped:
    """A denoiser whose x̂ is clamped to [low, high], with ε̂ = (x_t − alpha x̂)/sigma to match [Ho20's code]."""

    denoise: Denoiser
    low: float = -1.0
    high: float = 1.0

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        prediction = self.denoise(x_t, level, cond, to)
        x = prediction.x.clamp(self.low, self.high)
        at = level.like(x_t)
        return Prediction(x, (x_t - at.alpha * x) / at.sigma, prediction.nu)


@dataclass(frozen=True)
class Told:
    """A denoiser that is told ``told`` (None: nothing) at every call, whatever condition comes with the call."""

    denoise: Denoiser
    told: Condition | None

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        return self.denoise(x_t, level, self.told, to)
