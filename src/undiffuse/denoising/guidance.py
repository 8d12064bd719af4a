"""Guidance: denoisers around denoisers, so that each works with every solver and likelihood, in any order.

Without a condition there is nothing to guide to, and the inner denoiser is called as it is. The learned variance is
always that of the inner denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from undiffuse.denoising.denoiser import Denoiser, DenoiserWrapper, Prediction, prediction_from_x
from undiffuse.errors import ConfigError
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.schedule import Schedule

MAX_SCALE = 1000
"""The largest scale of guidance; results of larger ones are noise."""
LogProb = Callable[[Tensor, NoiseLevel, Condition], Tensor]
"""log p(cond|x_t) of each item, (B,) nats, from (x_t, level, cond); 0 for the null label −1."""


class Guide(NamedTuple):
    """Guidance beside the model: ``log_prob(x_t, level, cond)`` of a classifier, (B,) nats, a ``weak`` denoiser and a
    ``negative`` condition of one item, which takes the place of the null condition in classifier-free guidance."""

    log_prob: LogProb | None = None
    weak: Denoiser | None = None
    negative: Condition | None = None

    @property
    def networks(self) -> list[nn.Module]:
        """The network of the weak denoiser, and the module that ``log_prob`` is a method of, where they are known."""
        weak = self.weak
        while isinstance(weak, DenoiserWrapper):
            weak = weak.denoise
        owners = (getattr(weak, "network", None), getattr(self.log_prob, "__self__", None))
        return [owner for owner in owners if isinstance(owner, nn.Module)]


def extrapolate(good: Prediction, poor: Prediction, scale: Tensor | float) -> Prediction:
    """poor + scale (good − poor), as good + (scale − 1)(good − poor), of x̂ and of ε̂; the variance is ``good``'s.

    The weights sum to 1, so x_t = alpha x̂ + sigma ε̂ still holds.
    """
    x, eps = (g + (scale - 1) * (g - p) for g, p in zip(good[:2], poor[:2], strict=True))
    return Prediction(x, eps, good.var_interp)


@dataclass(frozen=True)
class ClassifierFree(DenoiserWrapper):
    """null + scale (conditional − null), one call for both, where low ≤ log_snr < high, else conditional [Ho22 eq. 6].

    ``scale`` 1 is conditional and 0 unconditional; Ho's w is scale − 1. The interval is that of [Kynkäänniemi24 eq. 5],
    theirs in sigma/alpha = exp(−log_snr/2); an end of None is open. The fields of a ``negative`` condition of one item
    take the place of those of the null condition, for all items. ``rescale`` φ brings the standard deviation over
    the item toward that of the conditional x̂: φ std(conditional)/std(x̂) x̂ + (1 − φ) x̂ [Lin23 §3.4]. Raises
    `ConfigError`.
    """

    scale: float
    low: float | None = None
    high: float | None = None
    rescale: float = 0.0
    negative: Condition | None = None

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not 0 <= self.rescale <= 1:
            fix = "Give a number from 0 to 1, such as 0.7"
            raise _guidance_error(f"rescale = {self.rescale}", "it is out of range", fix)
        if not self._low < self._high:
            is_nan = math.isnan(self._low) or math.isnan(self._high)
            cause = "an end of it is NaN" if is_nan else "the interval is empty"
            fix = "Give two numbers, the lower log-SNR first"
            raise _guidance_error(f"the interval {self.low} to {self.high}", cause, fix)

    @property
    def _low(self) -> float:
        return -math.inf if self.low is None else self.low

    @property
    def _high(self) -> float:
        return math.inf if self.high is None else self.high

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        inside = (level.log_snr >= self._low) & (level.log_snr < self._high)
        if cond is None or self.scale == 1 or not bool(inside.any()):
            return self.denoise(x_t, level, cond, next_level)
        next_twice = None if next_level is None else _twice(next_level)
        null, given = self._null(cond, len(x_t)), cond.given()
        added = {name: value.to(x_t.device) for name, value in null.given().items() if name not in given}
        null, none = replace(null, **added), null.null().given()  # ``cond`` may lack fields of the negative one
        cond = replace(cond, **{name: none[name].to(x_t.device) for name in added})
        both = self.denoise(torch.cat([x_t, x_t]), _twice(level), cond.cat(null), next_twice)
        with_cond, without = (Prediction(*(None if v is None else v.chunk(2)[i] for v in both)) for i in range(2))  # type: ignore[arg-type]
        guided = extrapolate(with_cond, without, broadcast_like(torch.where(inside, self.scale, 1.0), x_t))
        if self.rescale == 0:
            return guided
        std = _item_std(guided.x)
        ratio = torch.where(std > 0, _item_std(with_cond.x) / std, 1.0)
        return prediction_from_x(guided.x + self.rescale * (ratio - 1) * guided.x, x_t, level, with_cond.var_interp)

    def _null(self, cond: Condition, items: int) -> Condition:
        """The condition to lead away from, of so many ``items``: null, with the fields of ``negative`` if given."""
        if self.negative is None:
            return cond.null()
        rows = self.negative.map(lambda v: v.expand(items, *v.shape[1:])).given()
        return replace(cond.null(), **{name: v.to(cond.given().get(name, v)) for name, v in rows.items()})


@dataclass(frozen=True)
class Autoguided(DenoiserWrapper):
    """weak + scale (denoise − weak), with the same condition [Karras24b eq. 2].

    The errors of a ``weak`` model are like those of the model, but larger. Raises `ConfigError` if their noise
    processes differ or the scale is not finite.
    """

    weak: Denoiser
    scale: float

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not same_process(self.denoise.schedule, self.weak.schedule):
            cause = "the two models have different noise processes"
            raise _guidance_error("the weak model", cause, "Use an earlier or a smaller model with the same schedule")

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        good = self.denoise(x_t, level, cond, next_level)
        return good if self.scale == 1 else extrapolate(good, self.weak(x_t, level, cond, next_level), self.scale)


@dataclass(frozen=True)
class ClassifierGuided(DenoiserWrapper):
    """ε̂ − scale sigma ∇log p(cond|x_t), and x̂ + scale (sigma²/alpha) ∇log p(cond|x_t) [Dhariwal21 alg. 2].

    The score is then ∇log q(x_t) + scale ∇log p(cond|x_t). ``denoise`` gets the condition too: a conditional model is
    guided as such, unless it is a `ConditionedDenoiser` without a condition. Where alpha is 0, x_t does not depend on
    the condition and nothing is added. Raises `ConfigError`.
    """

    log_prob: LogProb
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        x, eps, var_interp = self.denoise(x_t, level, cond, next_level)
        if cond is None or self.scale == 0:
            return Prediction(x, eps, var_interp)
        at = level.broadcast_like(x_t)
        shift = self.scale * at.sigma * classifier_gradient(self.log_prob, x_t, level, cond)
        return Prediction(x + at.sigma / torch.where(at.alpha > 0, at.alpha, 1.0) * shift, eps - shift, var_interp)


def classifier_gradient(log_prob: LogProb, x_t: Tensor, level: NoiseLevel, cond: Condition) -> Tensor:
    """∇log p(cond|x_t) of ``x_t``'s shape, by autograd, under ``no_grad`` too; 0 where alpha is 0.

    It is differentiable where gradients are on.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x_t if x_t.requires_grad else x_t.detach().requires_grad_()
        gradient = torch.autograd.grad(log_prob(x, level, cond).sum(), x, create_graph=create_graph)[0]
    return torch.where(level.broadcast_like(x_t).alpha > 0, gradient, 0.0)


@dataclass(frozen=True)
class DynamicThreshold(DenoiserWrapper):
    """clamp(x̂, −s, s) limit/s, s = max(limit, the ``quantile`` of |x̂| over the item) [Saharia22 §2.3].

    The quantile is the least |x̂| that at least this fraction of the item's elements do not exceed. Raises
    `ConfigError`.
    """

    quantile: float = 0.995
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.quantile <= 1 and self.limit > 0):
            where, fix = (
                f"quantile = {self.quantile}, limit = {self.limit}",
                "Give a quantile in (0, 1] and a limit above 0",
            )
            raise _guidance_error(where, "these settings are out of range", fix)

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        x, _, var_interp = self.denoise(x_t, level, cond, next_level)
        size = x.abs().flatten(1)
        s = size.kthvalue(math.ceil(self.quantile * size.shape[1]), 1).values.clamp(min=self.limit)
        s = s.reshape(-1, *[1] * (x.ndim - 1))
        return prediction_from_x(torch.minimum(torch.maximum(x, -s), s) * (self.limit / s), x_t, level, var_interp)


def same_process(one: Schedule, two: Schedule) -> bool:
    """Whether two schedules have the same levels at the same times."""
    t = torch.linspace(max(one.t_min, two.t_min), 1, 101, dtype=torch.float64)
    pairs = zip(one(t)[1:3], two(t)[1:3], strict=True)
    return all(torch.allclose(a, b, rtol=1e-6) for a, b in pairs)  # type: ignore[arg-type]


def _twice(level: NoiseLevel) -> NoiseLevel:
    """The levels of a batch concatenated with itself."""
    return NoiseLevel(*(torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for v in level))  # type: ignore[arg-type]


def _item_std(x: Tensor) -> Tensor:
    """The standard deviation over each item, (B, 1, ..., 1)."""
    return x.std(tuple(range(1, x.ndim)), correction=0, keepdim=True)


def check_scale(scale: float) -> None:
    """Raises `ConfigError` unless the absolute value of ``scale`` is at most `MAX_SCALE`."""
    if not abs(scale) <= MAX_SCALE:
        raise _guidance_error(
            f"scale = {scale:g}", f"it is not a number from -{MAX_SCALE} to {MAX_SCALE}", "Give one, such as 2"
        )


def _guidance_error(where: str, cause: str, fix: str) -> ConfigError:
    return ConfigError("GUIDANCE", where, cause, fix)
