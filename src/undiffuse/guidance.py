"""Guidance: denoisers around denoisers, so that each works with every solver and likelihood, in any order.

All keep x_t = alpha x̂ + sigma ε̂. With a condition of None there is nothing to guide to, and the denoiser within
is called as it is; the learned variance is always its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.denoiser import Clipped, Denoiser, Prediction
from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel, like
from undiffuse.process.schedule import Schedule

LogProb = Callable[[Tensor, NoiseLevel, Condition], Tensor]
"""log p(what is told|x_t) of each item, (B,) nats, from (x_t, level, cond); 0 for the null label −1."""

THRESHOLDS = ("none", "static", "dynamic")


def extrapolate(good: Prediction, poor: Prediction, scale: Tensor | float) -> Prediction:
    """poor + scale (good − poor), as good + (scale − 1)(good − poor), of x̂ and of ε̂; nu is ``good``'s.

    The weights sum to 1, so for one x_t both stay x̂ and ε̂ of each other, and so would v or the score.
    """
    x, eps = (g + (scale - 1) * (g - p) for g, p in zip(good[:2], poor[:2], strict=True))
    return Prediction(x, eps, good.nu)


@dataclass(frozen=True)
class ClassifierFree:
    """null + scale (told − null), one call of both where low ≤ log_snr < high, else told [Ho22 eq. 6].

    ``scale`` 1 is conditional and 0 unconditional; Ho's w is scale − 1. The interval [Kynkäänniemi24 eq. 5], theirs in
    sigma/alpha = exp(−log_snr/2), is everything where an end is None. ``rescale`` φ blends in the x̂ with told's spread
    over the item: φ std(told)/std(x̂) x̂ + (1 − φ) x̂ [Lin23 §3.4]. Raises `ConfigError`.
    """

    denoise: Denoiser
    scale: float
    low: float | None = None
    high: float | None = None
    rescale: float = 0.0

    def __post_init__(self) -> None:
        _finite(self.scale)
        if not 0 <= self.rescale <= 1:
            raise _refused(f"rescale = {self.rescale}", "it is a share", "Give a number from 0 to 1, such as 0.7")
        if not self._low < self._high:
            cause = "nothing lies between"
            raise _refused(f"the interval {self.low} to {self.high}", cause, "Give the lower log-SNR first")

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    @property
    def _low(self) -> float:
        return -math.inf if self.low is None else self.low

    @property
    def _high(self) -> float:
        return math.inf if self.high is None else self.high

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        inside = (level.log_snr >= self._low) & (level.log_snr < self._high)
        if cond is None or self.scale == 1 or not bool(inside.any()):
            return self.denoise(x_t, level, cond, to)
        aim = None if to is None else _twice(to)
        both = self.denoise(torch.cat([x_t, x_t]), _twice(level), cond.cat(cond.null()), aim)
        told, null = (Prediction(*(None if v is None else v.chunk(2)[i] for v in both)) for i in range(2))  # type: ignore[arg-type]
        guided = extrapolate(told, null, like(torch.where(inside, self.scale, 1.0), x_t))
        if self.rescale == 0:
            return guided
        spread = _spread(guided.x)
        ratio = torch.where(spread > 0, _spread(told.x) / spread, 1.0)
        return _from_x(guided.x + self.rescale * (ratio - 1) * guided.x, x_t, level, told.nu)


@dataclass(frozen=True)
class Autoguided:
    """weak + scale (denoise − weak), both told the same; a ``weak`` model errs alike, and more [Karras24b eq. 2].

    Raises `ConfigError` where the two are not of one noise process, or the scale is not finite.
    """

    denoise: Denoiser
    weak: Denoiser
    scale: float

    def __post_init__(self) -> None:
        _finite(self.scale)
        if not same_process(self.denoise.schedule, self.weak.schedule):
            cause = "the two models are of different noise processes"
            raise _refused("the weak model", cause, "Use an earlier or a smaller model with the same schedule")

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        good = self.denoise(x_t, level, cond, to)
        return good if self.scale == 1 else extrapolate(good, self.weak(x_t, level, cond, to), self.scale)


@dataclass(frozen=True)
class ClassifierGuided:
    """ε̂ − scale sigma ∇log p(cond|x_t), and x̂ + scale (sigma²/alpha) ∇log p(cond|x_t) [Dhariwal21 alg. 2].

    The score is then ∇log q(x_t) + scale ∇log p(cond|x_t). ``denoise`` is told too: of a model with labels the guided
    one is the conditional, unless it is `Told` nothing. The gradient is by autograd, under ``no_grad`` too, and itself
    differentiable where gradients are on. Where alpha is 0, x_t says nothing of the condition and nothing is added.
    Raises `ConfigError`.
    """

    denoise: Denoiser
    log_prob: LogProb
    scale: float = 1.0

    def __post_init__(self) -> None:
        _finite(self.scale)

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        x, eps, nu = self.denoise(x_t, level, cond, to)
        if cond is None or self.scale == 0:
            return Prediction(x, eps, nu)
        at = level.like(x_t)
        signal = at.alpha > 0
        push = torch.where(signal, self.scale * at.sigma * self._gradient(x_t, level, cond), 0.0)
        return Prediction(x + at.sigma / torch.where(signal, at.alpha, 1.0) * push, eps - push, nu)

    def _gradient(self, x_t: Tensor, level: NoiseLevel, cond: Condition) -> Tensor:
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x_t if x_t.requires_grad else x_t.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(x, level, cond).sum(), x, create_graph=further)[0]


@dataclass(frozen=True)
class Dynamic:
    """clamp(x̂, −s, s) limit/s, s = max(limit, the ``quantile`` of |x̂| over the item) [Saharia22 §2.3].

    The quantile is the least |x̂| that so large a share of an item's numbers does not exceed. Raises `ConfigError`.
    """

    denoise: Denoiser
    quantile: float = 0.995
    limit: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.quantile <= 1 and self.limit > 0):
            where = f"quantile = {self.quantile}, limit = {self.limit}"
            raise _refused(where, "no threshold follows from them", "Give a quantile in (0, 1] and a limit above 0")

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        x, _, nu = self.denoise(x_t, level, cond, to)
        size = x.abs().flatten(1)
        s = size.kthvalue(math.ceil(self.quantile * size.shape[1]), 1).values.clamp(min=self.limit)
        s = s.reshape(-1, *[1] * (x.ndim - 1))
        return _from_x(torch.minimum(torch.maximum(x, -s), s) * (self.limit / s), x_t, level, nu)


@dataclass(frozen=True)
class Guidance:
    """What can be asked for, with nothing asked for: ``build`` makes a denoiser of it."""

    scale: float = 1.0
    low: float | None = None
    high: float | None = None
    rescale: float = 0.0
    classifier_scale: float = 1.0
    weak_scale: float = 2.0
    threshold: str = "none"


def build(
    denoise: Denoiser, guidance: Guidance, log_prob: LogProb | None = None, weak: Denoiser | None = None
) -> Denoiser:
    """``denoise`` with all that is asked for around it: classifier-free, a weak model, a classifier, the threshold.

    From the inside to the outside in this order; what is not asked for is not there. Raises `ConfigError`.
    """
    if guidance.threshold not in THRESHOLDS:
        raise _refused(f"threshold {guidance.threshold!r}", "unknown", f"Use one of {', '.join(THRESHOLDS)}")
    guided = ClassifierFree(denoise, guidance.scale, guidance.low, guidance.high, guidance.rescale)
    denoise = denoise if guidance.scale == 1 else guided
    denoise = denoise if weak is None else Autoguided(denoise, weak, guidance.weak_scale)
    denoise = denoise if log_prob is None else ClassifierGuided(denoise, log_prob, guidance.classifier_scale)
    return {"none": lambda d: d, "static": Clipped, "dynamic": Dynamic}[guidance.threshold](denoise)


def same_process(one: Schedule, two: Schedule) -> bool:
    """Whether two schedules have the same levels at the same times."""
    t = torch.linspace(max(one.t_min, two.t_min), 1, 101, dtype=torch.float64)
    pairs = zip(one(t)[1:3], two(t)[1:3], strict=True)
    return all(torch.allclose(a, b, rtol=1e-6) for a, b in pairs)  # type: ignore[arg-type]


def _twice(level: NoiseLevel) -> NoiseLevel:
    """The levels of a batch that is followed by itself."""
    return NoiseLevel(*(torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim else v for v in level))  # type: ignore[arg-type]


def _spread(x: Tensor) -> Tensor:
    """The standard deviation over each item, (B, 1, ..., 1)."""
    return x.std(tuple(range(1, x.ndim)), correction=0, keepdim=True)


def _from_x(x: Tensor, x_t: Tensor, level: NoiseLevel, nu: Tensor | None) -> Prediction:
    at = level.like(x_t)
    return Prediction(x, (x_t - at.alpha * x) / at.sigma, nu)


def _finite(scale: float) -> None:
    if not math.isfinite(scale):
        raise _refused(f"scale = {scale}", "it is not finite", "Give a number, such as 2")


def _refused(where: str, cause: str, fix: str) -> ConfigError:
    return ConfigError("GUIDANCE", where, cause, fix)
