"""Denoisers: what every sampler and likelihood calls; a network as a denoiser, and the base of wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from undiffuse.errors import ConfigError
from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import weight_dtype
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.schedule import Schedule
from undiffuse.process.target import Target
from undiffuse.runtime.device import to_device
from undiffuse.runtime.precision import autocast


class Prediction(NamedTuple):
    """x̂ and ε̂, both of x_t's shape, with x_t = alpha x̂ + sigma ε̂.

    ``var_interp`` is v of [Nichol21 eq. 15] where the variance is learned: the weight, not clamped, from the log of the
    small variance (0) to the log of the large one (1).
    """

    x: Tensor
    eps: Tensor
    var_interp: Tensor | None = None


class Denoiser(Protocol):
    @property
    def schedule(self) -> Schedule: ...

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        """The prediction at ``x_t`` (B, ...), whose ``level`` is () or (B,); a step goes to ``next_level``."""
        ...


def predicts_at_data(denoise: Denoiser) -> bool:
    """Whether ``denoise`` returns a finite ε̂ at sigma = 0, as its attribute ``predicts_at_data`` says; default False.

    Denoisers that compute ε̂ as (x_t − alpha x̂)/sigma do not: a clamped or guided x̂, and x̂ as the network's output.
    """
    return getattr(denoise, "predicts_at_data", False)


INPUT_SCALES: dict[str, Callable[[NoiseLevel, float], Tensor]] = {
    "none": lambda level, sigma_data: torch.ones_like(level.alpha),  # Ho20
    "unit": lambda level, sigma_data: 1 / torch.sqrt(level.alpha**2 * sigma_data**2 + level.sigma**2),  # Karras22 c_in
}
TIME_INPUTS: dict[str, Callable[[NoiseLevel, int], Tensor]] = {
    "t": lambda level, steps: level.t,
    "thousand": lambda level, steps: 1000 * level.t,
    "step": lambda level, steps: steps * level.t - 1,  # Ho20, whose code counts t from 0
    "rescaled_step": lambda level, steps: 1000 * (steps * level.t - 1) / steps,  # Nichol21's code
    "log_snr": lambda level, steps: level.log_snr.clamp(-30, 30),  # VDM21
    "log_sigma": lambda level, steps: (-0.125 * level.log_snr).clamp(-8, 8),  # Karras22 c_noise = ln(sigma)/4
}


@dataclass(frozen=True)
class Preconditioning:
    """The inputs of a network: the scale of x_t, a row of `INPUT_SCALES`, and the time, a row of `TIME_INPUTS`.

    The time ``"step"`` is the integer k − 1 in 0..T−1 for t = k/T, as in Ho's network [Ho20]; the scale ``"unit"`` is
    c_in [Karras22 tab. 1]. Raises `ConfigError` for other names.
    """

    scale: str = "none"
    time: str = "log_snr"
    sigma_data: float = 1.0
    chain_length: int = 1000

    def __post_init__(self) -> None:
        for field, table in (("scale", INPUT_SCALES), ("time", TIME_INPUTS)):
            if getattr(self, field) not in table:
                raise ConfigError(
                    "PRECONDITIONING",
                    f"{field} = {getattr(self, field)!r}",
                    "unknown",
                    f"Use one of {', '.join(table)}",
                )

    def input_scale(self, level: NoiseLevel) -> Tensor:
        """What x_t is multiplied with, float64 of ``level``'s shape."""
        return INPUT_SCALES[self.scale](level, self.sigma_data)

    def time_input(self, level: NoiseLevel) -> Tensor:
        """The time that the network embeds, float64 of ``level``'s shape."""
        return TIME_INPUTS[self.time](level, self.chain_length)


class NetworkDenoiser:
    """A network with its target and preconditioning, as a denoiser. Raises `ConfigError`.

    The network maps (x_t, time (B,), cond) to y, of x_t's shape, or with a learned variance to twice the channels: y
    and values of −1 for the small and 1 for the large variance. With ``divergence`` as many channels follow, the slopes
    of `predict_with_slope`. A ``categorical`` one (`CategoricalHead`) also takes x_t with its level's scales, and
    returns x̂ in place of y. It gets its input in the type of its weights, and runs in ``autocast`` precision if given;
    all arithmetic around it is in x_t's type, float32 at least.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        target: Target,
        preconditioning: Preconditioning,
        learned_variance: bool = False,
        autocast: torch.dtype | None = None,
        categorical: bool = False,
        divergence: bool = False,
    ) -> None:
        self.divergence = divergence
        self.network, self.schedule, self.target, self.categorical = network, schedule, target, categorical
        self.preconditioning, self.learned_variance, self.autocast = preconditioning, learned_variance, autocast
        if target.needs_next_level and schedule.chain_length is None:
            raise ConfigError(
                "TARGET",
                f"target {target.name!r}",
                "it is defined by the steps of a chain, and this schedule is a function of time",
                "Use a tabulated schedule, or the target 'x', 'eps' or 'v'",
            )

    @property
    def predicts_at_data(self) -> bool:
        """Whether the target determines ε̂ at sigma = 0: eps, v, flow and edm do."""
        data = self.schedule(0.0)
        d = self.target.determinant(data, self.next_level(data))
        return not self.categorical and bool(torch.isfinite(d)) and float(d.detach()) != 0

    def next_level(self, level: NoiseLevel) -> NoiseLevel | None:
        """The level s, one step of the table below ``level``, if the target needs it, else None."""
        if not self.target.needs_next_level:
            return None
        chain_length = self.schedule.chain_length
        assert chain_length is not None
        return self.schedule((level.t - 1 / chain_length).clamp(min=0))

    def _call_network(self, x_t: Tensor, level: NoiseLevel, cond: Condition | None, *more: Tensor) -> Tensor:
        """The network's output for x_t in float32 at least; ``more`` are the other inputs of a categorical one.

        At sigma = 0 the network's inputs are those of ``t_min``, the cleanest level of its training. An ``end_time`` of
        the condition is a time of the schedule, which the network gets encoded like the level's own.
        """
        if not bool((level.sigma > 0).all()):
            level = self.schedule(level.t.clamp(min=self.schedule.t_min))
        scaled = broadcast_like(self.preconditioning.input_scale(level), x_t) * x_t
        time = self._time_input(level, scaled)
        if cond is not None and cond.end_time is not None:
            end = self.schedule(cond.end_time.clamp(min=self.schedule.t_min))
            cond = replace(cond, end_time=self._time_input(end, scaled))
        inputs = scaled.to(weight_dtype(self.network, scaled.dtype))
        with autocast(x_t.device, self.autocast):
            return self.network(inputs, time, cond, *more)

    def _time_input(self, level: NoiseLevel, x: Tensor) -> Tensor:
        return to_device(self.preconditioning.time_input(level), x.device, x.dtype).expand(x.shape[0])

    def outputs(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(y, var_interp, slope) as the network returns them, in float32 at least."""
        at = level.broadcast_like(x_t)
        y = self._call_network(x_t, level, cond, *([x_t, at.alpha, at.sigma] if self.categorical else []))
        y, *further = y.to(at.alpha.dtype).split(x_t.shape[1], 1)
        if self.categorical:
            y = self.target.combine(y, (x_t - at.alpha * y) / at.sigma, level, self.next_level(level))
        var_interp = (further.pop(0) + 1) / 2 if self.learned_variance else None
        return y, var_interp, further.pop(0) if self.divergence else None

    def value_log_prob(
        self,
        values: Tensor,
        x_t: Tensor,
        level: NoiseLevel,
        cond: Condition | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """log p(x given x_t) of a ``categorical`` network, nats per element, in ``x_t``'s dtype; see `CategoricalHead`.

        ``values`` (B, ...) are the integers v of x; the network gets x_t as ``dtype``, by default unchanged.
        """
        at = level.broadcast_like(x_t)
        return self._call_network(x_t.to(dtype or x_t.dtype), level, cond, x_t, at.alpha, at.sigma, values)

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        y, var_interp, _ = self.outputs(x_t, level, cond)
        x, eps = self.target.solve(y, x_t, level, self.next_level(level))
        return Prediction(x, eps, var_interp)

    def predict_with_slope(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None
    ) -> tuple[Prediction, Tensor]:
        """The prediction, and alpha ∂x̂_i/∂x_i for each element i, of x_t's shape: (alpha/sigma)² Var(x_i given x_t).

        Of a flow map it is the mean of these over log(sigma/alpha) from the level to the end time of ``cond``. Only
        with ``divergence``.
        """
        y, var_interp, slope = self.outputs(x_t, level, cond)
        assert slope is not None
        x, eps = self.target.solve(y, x_t, level, self.next_level(level))
        return Prediction(x, eps, var_interp), slope


@dataclass(frozen=True)
class DenoiserWrapper:
    """Base of denoisers around a denoiser. They keep x_t = alpha x̂ + sigma ε̂, so they combine in any order."""

    denoise: Denoiser

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        raise NotImplementedError


def prediction_from_x(x: Tensor, x_t: Tensor, level: NoiseLevel, var_interp: Tensor | None) -> Prediction:
    """The prediction of ``x``, with ε̂ = (x_t − alpha x)/sigma."""
    at = level.broadcast_like(x_t)
    return Prediction(x, (x_t - at.alpha * x) / at.sigma, var_interp)


@dataclass(frozen=True)
class Clipped(DenoiserWrapper):
    """x̂ clamped to [low, high], with ε̂ = (x_t − alpha x̂)/sigma to match [Ho20's code]."""

    low: float = -1.0
    high: float = 1.0

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        prediction = self.denoise(x_t, level, cond, next_level)
        return prediction_from_x(prediction.x.clamp(self.low, self.high), x_t, level, prediction.var_interp)


@dataclass(frozen=True)
class ConditionedDenoiser(DenoiserWrapper):
    """A denoiser called with the condition ``cond`` (None: without), in place of the condition of each call.

    The ``end_time`` of the call's condition stays.
    """

    cond: Condition | None

    @property
    def predicts_at_data(self) -> bool:
        return predicts_at_data(self.denoise)

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        own = self.cond
        if cond is not None and cond.end_time is not None:
            own = replace(own or Condition(), end_time=cond.end_time)
        return self.denoise(x_t, level, own, next_level)


def in_float32(denoise: Denoiser) -> Denoiser:
    """A copy of ``denoise`` with the network's own precision, for an ODE solver and for differences of two calls.

    Rounding to bfloat16 costs an ODE more steps than it saves time, and is as large as a difference of near calls.
    """
    if isinstance(denoise, NetworkDenoiser):
        denoise = copy.copy(denoise)
        denoise.autocast = None
    return denoise
