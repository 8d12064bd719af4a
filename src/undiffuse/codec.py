"""What turns data into x: the map, the edges of each value's bin, the log-determinant. Nothing of diffusion.

A *value* is what a data set holds (a grey level, a temperature); *x* is what a network sees. Tensors are
(B, C, ...) or (B, D); the first dimension after the batch is the channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from undiffuse.errors import ConfigError

if TYPE_CHECKING:
    from undiffuse.data import Dataset


class Codec(Protocol):
    """``encode`` and ``decode`` are inverse maps between values and x, item by item.

    ``edges`` returns the interval of x that stands for each value, or None where the data are continuous
    and have a density instead. ``log_abs_det`` is log |det d encode / d value| of one item, in nats.
    """

    def encode(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor: ...
    def decode(self, x: Tensor) -> Tensor: ...
    def edges(self, x: Tensor) -> tuple[Tensor, Tensor] | None: ...
    def log_abs_det(self, item_shape: tuple[int, ...]) -> float: ...


@dataclass(frozen=True)
class Pixels:
    """x = (2 v − (levels − 1)) / (levels − 1): whole numbers v in 0 .. levels − 1 go to [−1, 1].

    Numerator and denominator are exact in float32, so that x is v's image rounded once. Raises ConfigError
    unless 2 <= levels <= 65536.
    """

    levels: int

    def __post_init__(self) -> None:
        if type(self.levels) is not int or not 2 <= self.levels <= 65536:
            raise ConfigError(
                "LEVELS",
                "codec.levels",
                f"{self.levels!r} is no number of levels",
                "Give a whole number from 2 to 65536",
            )

    def encode(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x = (2 v − (levels − 1)) / (levels − 1), of ``dtype``; TypeError unless the values are integers.

        Values outside 0 .. levels − 1 are the data set's to refuse: they are not looked for in every batch.
        """
        if values.is_floating_point() or values.is_complex():
            raise TypeError(f"Pixels encodes integers, not {values.dtype}")
        return (2 * values.to(dtype) - (self.levels - 1)) / (self.levels - 1)

    def decode(self, x: Tensor) -> Tensor:
        """v = round((x + 1)(levels − 1)/2), kept within 0 .. levels − 1: uint8 up to 256 levels, int32 above.

        What is not a number has no level and becomes 0: look for it in x, not here.
        """
        value = ((x.to(_at_least_float32(x)) + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1)
        return value.nan_to_num(0.0).to(torch.uint8 if self.levels <= 256 else torch.int32)

    def edges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) = (2 v − levels, 2 v + 2 − levels)/(levels − 1), float64, x's shape.

        Half a bin, 1/(levels − 1), on either side of v's image; the outermost bins reach to −inf and +inf, so
        that the bins tile the line. An integer tensor is taken as values, a floating one as x.
        """
        value = (self.decode(x) if x.is_floating_point() else x).to(torch.float64)
        low = (2 * value - self.levels) / (self.levels - 1)
        high = (2 * (value + 1) - self.levels) / (self.levels - 1)
        return low.masked_fill(value <= 0, -math.inf), high.masked_fill(value >= self.levels - 1, math.inf)

    def log_abs_det(self, item_shape: tuple[int, ...]) -> float:
        """0: the bins' probabilities are probabilities of values, and no volume is left to account for."""
        return 0.0


@dataclass(frozen=True)
class Standardised:
    """x = (v − mean)/std, one mean and one std for each channel (each coordinate, for vectors).

    −log p(v) = −log p(x) − ``log_abs_det``, in nats. Raises ConfigError unless mean and std are equally many
    finite numbers and every std is above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if not isinstance(numbers, tuple | list) or not all(_is_number(n) for n in numbers):
                raise ConfigError(
                    "CODEC",
                    f"codec.{name}",
                    f"{numbers!r} is no list of finite numbers",
                    "Give one for each channel",
                )
            object.__setattr__(self, name, tuple(float(n) for n in numbers))
        if len(self.mean) != len(self.std) or not self.std or min(self.std) <= 0:
            raise ConfigError(
                "CODEC",
                "codec.std",
                "mean and std do not pair up, or a std is not above 0",
                "Give one of each for each channel",
            )

    def _columns(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if like.ndim < 2 or like.shape[1] != len(self.mean):
            raise ValueError(f"Standardised knows {len(self.mean)} channels; the tensor's shape is {tuple(like.shape)}")
        shape = (1, -1) + (1,) * (like.ndim - 2)
        mean, std = (torch.tensor(n, dtype=like.dtype, device=like.device).view(shape) for n in (self.mean, self.std))
        return mean, std

    def encode(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x = (v − mean)/std, of ``dtype``; ValueError if the number of channels is another."""
        values = values.to(dtype)
        mean, std = self._columns(values)
        return (values - mean) / std

    def decode(self, x: Tensor) -> Tensor:
        """v = mean + std x, of x's type but never below float32."""
        x = x.to(_at_least_float32(x))
        mean, std = self._columns(x)
        return mean + std * x

    def edges(self, x: Tensor) -> None:
        """None: continuous values have a density."""

    def log_abs_det(self, item_shape: tuple[int, ...]) -> float:
        """−(numbers a channel) Σ_c log std_c, in nats, for items of ``item_shape`` (C, ...)."""
        if not item_shape or item_shape[0] != len(self.std):
            raise ValueError(f"Standardised knows {len(self.std)} channels; the item's shape is {item_shape}")
        return -math.prod(item_shape[1:]) * math.fsum(map(math.log, self.std))


@dataclass(frozen=True)
class Ranged:
    """x = ((v − low) − (high − v))/(high − low): continuous values from ``low`` to ``high`` go to [−1, 1].

    −log p(v) = −log p(x) − ``log_abs_det``, in nats. Raises ConfigError unless both are finite and low < high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (_is_number(self.low) and _is_number(self.high) and self.low < self.high):
            cause = f"{self.low!r} to {self.high!r} is no range"
            raise ConfigError("CODEC", "codec.low, codec.high", cause, "Give two rising finite numbers")

    def encode(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x = ((v − low) − (high − v))/(high − low), of ``dtype``."""
        values = values.to(dtype)
        return ((values - self.low) - (self.high - values)) / (self.high - self.low)

    def decode(self, x: Tensor) -> Tensor:
        """v = (low + high)/2 + x (high − low)/2, kept within low .. high, of x's type but never below float32."""
        x = x.to(_at_least_float32(x))
        return ((self.low + self.high) / 2 + x * ((self.high - self.low) / 2)).clamp(self.low, self.high)

    def edges(self, x: Tensor) -> None:
        """None: continuous values have a density."""

    def log_abs_det(self, item_shape: tuple[int, ...]) -> float:
        """(numbers an item) log(2/(high − low)), in nats, for items of ``item_shape`` (C, ...)."""
        return math.prod(item_shape) * math.log(2 / (self.high - self.low))


@dataclass(frozen=True)
class Identity:
    """x = v, for continuous data that are to stay in their own units."""

    def encode(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x = v, of ``dtype``."""
        return values.to(dtype)

    def decode(self, x: Tensor) -> Tensor:
        """v = x."""
        return x

    def edges(self, x: Tensor) -> None:
        """None: continuous values have a density."""

    def log_abs_det(self, item_shape: tuple[int, ...]) -> float:
        """0."""
        return 0.0


CODECS: Mapping[str, type[Pixels] | type[Standardised] | type[Ranged] | type[Identity]] = {
    "pixels": Pixels,
    "standardised": Standardised,
    "ranged": Ranged,
    "identity": Identity,
}

BOUNDED = (Pixels, Ranged)
"""Those whose x lies in [−1, 1]."""


def codec_for(data: Dataset, moments: tuple[tuple[float, ...], tuple[float, ...]] | None = None) -> Codec:
    """Pixels(levels) for data with levels, Ranged(*value_range) where there is one, Standardised(*moments) for others.

    ``moments`` are ``data.moments(split.train)``: the training part's alone, or what is held out leaks in.
    TypeError if continuous data come without them.
    """
    if data.levels is not None:
        return Pixels(data.levels)
    if data.value_range is not None:
        return Ranged(*data.value_range)
    if moments is None:
        raise TypeError("continuous data need moments=data.moments(split.train)")
    return Standardised(*moments)


def to_dict(codec: Codec) -> dict[str, Any]:
    """{"kind": name in CODECS, ...its fields}, plain data that JSON can hold; TypeError for other codecs."""
    for kind, cls in CODECS.items():
        if isinstance(codec, cls):
            return {
                "kind": kind,
                **{k: list(v) if isinstance(v, tuple) else v for k, v in asdict(codec).items()},
            }
    raise TypeError(f"{type(codec).__name__} is not one of CODECS")


def from_dict(plain: Mapping[str, Any]) -> Codec:
    """The codec that ``to_dict`` wrote; ConfigError for an unknown kind and for a missing or unknown key."""
    kind = plain.get("kind")
    if not isinstance(kind, str) or kind not in CODECS:
        raise ConfigError("CODEC", "codec.kind", f"{kind!r} is no codec", f"Give one of {', '.join(CODECS)}")
    wanted = {"kind", *(f.name for f in fields(CODECS[kind]))}
    if wrong := sorted(set(plain) ^ wanted, key=str):
        verb = "is missing" if wrong[0] in wanted else "is unknown"
        raise ConfigError(
            "CODEC",
            f"codec.{wrong[0]}",
            f"this key {verb}",
            f"A codec of kind {kind} has {', '.join(sorted(wanted))}",
        )
    return CODECS[kind](**{k: v for k, v in plain.items() if k != "kind"})


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _is_number(n: object) -> bool:
    return isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n)
