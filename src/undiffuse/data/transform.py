"""Maps between data and x: the map, its inverse, the interval of x of each value, the log-determinant.

A *value* is a number of the data (a grey level, a temperature), *x* is what a network sees. Tensors are (B, C, ...) or
(B, D); the first dimension after the batch is the channel. Nothing here depends on diffusion.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.runtime.device import to_device

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset


class DataTransform(Protocol):
    """``to_model`` and ``to_data`` are inverse maps between values and x.

    ``edges`` returns the interval of x of each value, or None for continuous data, which have a density instead.
    ``log_abs_det`` is log |det dx/dvalue| of one item, in nats. Values and x are (B, C, ...) or (B, D); `IntegerLevels`
    raises TypeError for values that are no integers, `Standardized` ValueError for other channels. A transform whose x
    has another shape than the values, or that is no bijection, also has ``x_shape`` and ``values``
    (`undiffuse.model.latent.LatentTransform`).
    """

    def to_model(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor: ...
    def to_data(self, x: Tensor) -> Tensor: ...
    def edges(self, x: Tensor) -> tuple[Tensor, Tensor] | None: ...
    def log_abs_det(self, item_shape: tuple[int, ...]) -> float: ...


@dataclass(frozen=True)
class IntegerLevels:
    """x = (2 v − (num_values − 1))/(num_values − 1): integers v in 0 .. num_values − 1 become numbers in [−1, 1].

    Numerator and denominator are exact in float32, so x is rounded once. Raises `ConfigError` unless
    2 <= num_values <= 65536.
    """

    num_values: int

    def __post_init__(self) -> None:
        if type(self.num_values) is not int or not 2 <= self.num_values <= 65536:
            cause = f"{self.num_values!r} is not an integer from 2 to 65536"
            raise ConfigError("NUM_VALUES", "transform.num_values", cause, "Give the number of values of the data")

    def to_model(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x = (2 v − (num_values − 1))/(num_values − 1) in ``dtype``; TypeError unless the values are integers.

        Values outside of 0 .. num_values − 1 are rejected when data are loaded, and not searched for in each batch.
        """
        if values.is_floating_point() or values.is_complex():
            raise TypeError(f"IntegerLevels takes integers, not {values.dtype}")
        return (2 * values.to(dtype) - (self.num_values - 1)) / (self.num_values - 1)

    def to_data(self, x: Tensor) -> Tensor:
        """v = round((x + 1)(num_values − 1)/2), clamped to 0 .. num_values − 1; uint8 up to 256 values, else int32.

        NaN becomes 0: callers check x.
        """
        value = ((x.to(_at_least_float32(x)) + 1) * ((self.num_values - 1) / 2)).round().clamp(0, self.num_values - 1)
        return value.nan_to_num(0.0).to(torch.uint8 if self.num_values <= 256 else torch.int32)

    def edges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) = (2 v − num_values, 2 v + 2 − num_values)/(num_values − 1), float64, x's shape.

        Each interval reaches 1/(num_values − 1) to either side of the x of v; the outermost ones reach to −inf and
        +inf, so that they tile the line. Integer tensors are values, floating-point ones are x.
        """
        value = (self.to_data(x) if x.is_floating_point() else x).to(torch.float64)
        low = (2 * value - self.num_values) / (self.num_values - 1)
        high = (2 * (value + 1) - self.num_values) / (self.num_values - 1)
        return low.masked_fill(value <= 0, -math.inf), high.masked_fill(value >= self.num_values - 1, math.inf)

    def log_abs_det(self, item_shape: tuple[int, ...]) -> float:
        """0: probabilities of the intervals are probabilities of the values."""
        return 0.0


@dataclass(frozen=True)
class Standardized:
    """x = (v − mean)/std, with one mean and one std per channel (per coordinate, for vectors).

    −log p(v) = −log p(x) − ``log_abs_det``, in nats. Raises `ConfigError` unless mean and std are equally many finite
    numbers and each std is positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if not isinstance(numbers, tuple | list) or not all(_is_finite_number(n) for n in numbers):
                cause = f"{numbers!r} is not a list of finite numbers"
                raise ConfigError("TRANSFORM", f"transform.{name}", cause, "Give one number per channel")
            object.__setattr__(self, name, tuple(float(n) for n in numbers))
        if len(self.mean) != len(self.std) or not self.std or min(self.std) <= 0:
            cause = "mean and std differ in length, or a std is not positive"
            raise ConfigError("TRANSFORM", "transform.std", cause, "Give one of each per channel")

    def _broadcast_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim < 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"Standardized has {len(self.mean)} channels, the tensor has shape {tuple(x.shape)}")
        shape = (1, -1) + (1,) * (x.ndim - 2)
        mean, std = (to_device(torch.tensor(n, dtype=x.dtype), x.device).view(shape) for n in (self.mean, self.std))
        return mean, std

    def to_model(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x = (v − mean)/std in ``dtype``; ValueError if the number of channels differs."""
        values = values.to(dtype)
        mean, std = self._broadcast_moments(values)
        return (values - mean) / std

    def to_data(self, x: Tensor) -> Tensor:
        """v = mean + std x, in x's dtype or float32, whichever is wider."""
        x = x.to(_at_least_float32(x))
        mean, std = self._broadcast_moments(x)
        return mean + std * x

    def edges(self, x: Tensor) -> None:
        """None: continuous values have a density."""

    def log_abs_det(self, item_shape: tuple[int, ...]) -> float:
        """−n Σ_c log std_c, in nats, for items of ``item_shape`` (C, ...) with n numbers per channel."""
        if not item_shape or item_shape[0] != len(self.std):
            raise ValueError(f"Standardized has {len(self.std)} channels, the item has shape {item_shape}")
        return -math.prod(item_shape[1:]) * math.fsum(map(math.log, self.std))


@dataclass(frozen=True)
class MinMax:
    """x = ((v − low) − (high − v))/(high − low): continuous values in [low, high] become x in [−1, 1].

    −log p(v) = −log p(x) − ``log_abs_det``, in nats. Raises `ConfigError` unless both are finite and low < high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (_is_finite_number(self.low) and _is_finite_number(self.high) and self.low < self.high):
            cause = f"{self.low!r} to {self.high!r} is not a range"
            raise ConfigError(
                "TRANSFORM", "transform.low, transform.high", cause, "Give two finite numbers, the smaller first"
            )

    def to_model(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x = ((v − low) − (high − v))/(high − low) in ``dtype``."""
        values = values.to(dtype)
        return ((values - self.low) - (self.high - values)) / (self.high - self.low)

    def to_data(self, x: Tensor) -> Tensor:
        """v = (low + high)/2 + x (high − low)/2, clamped to [low, high], in x's dtype or float32 if that is wider."""
        x = x.to(_at_least_float32(x))
        return ((self.low + self.high) / 2 + x * ((self.high - self.low) / 2)).clamp(self.low, self.high)

    def edges(self, x: Tensor) -> None:
        """None: continuous values have a density."""

    def log_abs_det(self, item_shape: tuple[int, ...]) -> float:
        """n log(2/(high − low)), in nats, for items of ``item_shape`` (C, ...) with n numbers."""
        return math.prod(item_shape) * math.log(2 / (self.high - self.low))


@dataclass(frozen=True)
class Identity:
    """x = v, for continuous data whose units are to be kept."""

    def to_model(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x = v in ``dtype``."""
        return values.to(dtype)

    def to_data(self, x: Tensor) -> Tensor:
        """v = x."""
        return x

    def edges(self, x: Tensor) -> None:
        """None: continuous values have a density."""

    def log_abs_det(self, item_shape: tuple[int, ...]) -> float:
        """0."""
        return 0.0


TRANSFORMS: Mapping[str, type[IntegerLevels] | type[Standardized] | type[MinMax] | type[Identity]] = {
    "integer": IntegerLevels,
    "standardized": Standardized,
    "min_max": MinMax,
    "identity": Identity,
}


def values_transform(transform: DataTransform) -> DataTransform:
    """The transform of the values themselves: ``transform``, or the one before the autoencoder of latents."""
    return getattr(transform, "values", transform)


def is_latent(transform: DataTransform) -> bool:
    """Whether x are latents of an autoencoder."""
    return values_transform(transform) is not transform


def x_shape(transform: DataTransform, item_shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of x: that of an item, or of the latents of an autoencoder."""
    return getattr(transform, "x_shape", tuple(item_shape))


BOUNDED = (IntegerLevels, MinMax)
"""Transforms whose x lies in [−1, 1]."""


def transform_for(data: Dataset, moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None) -> DataTransform:
    """IntegerLevels for integers, MinMax for continuous data with a declared range, otherwise Standardized(*moments).

    ``moments`` are ``data.moments(split.train)``, of the training part only, so that no held-out data leak in.
    TypeError if they are needed and missing.
    """
    if data.num_values is not None:
        return IntegerLevels(data.num_values)
    if data.value_range is not None:
        return MinMax(*data.value_range)
    if moments is None:
        raise TypeError("continuous data need moments=data.moments(split.train)")
    return Standardized(*moments)


def to_dict(transform: DataTransform) -> dict[str, Any]:
    """{"kind": name in TRANSFORMS, field: value, ...}, which JSON can represent; TypeError for other classes."""
    for kind, cls in TRANSFORMS.items():
        if isinstance(transform, cls):
            values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(transform).items()}
            return {"kind": kind, **values}
    raise TypeError(f"{type(transform).__name__} is not one of TRANSFORMS")


def from_dict(plain: Mapping[str, Any]) -> DataTransform:
    """The transform that `to_dict` described; `ConfigError` for an unknown kind, a missing or an unknown key."""
    kind = plain.get("kind")
    if not isinstance(kind, str) or kind not in TRANSFORMS:
        fix = f"Give one of {', '.join(TRANSFORMS)}"
        raise ConfigError("TRANSFORM", "transform.kind", f"{kind!r} is not a data transform", fix)
    expected = {"kind", *(f.name for f in fields(TRANSFORMS[kind]))}
    if wrong := sorted(set(plain) ^ expected, key=str):
        cause = "this key is missing" if wrong[0] in expected else "this key is unknown"
        fix = f"A transform of kind {kind} has the keys {', '.join(sorted(expected))}"
        raise ConfigError("TRANSFORM", f"transform.{wrong[0]}", cause, fix)
    return TRANSFORMS[kind](**{name: value for name, value in plain.items() if name != "kind"})


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _is_finite_number(n: object) -> bool:
    return isinstance(n, int | float) and not isinstance(n, bool) and abs(n) <= sys.float_info.max
