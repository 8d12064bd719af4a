"""Integer images split into a lower resolution and the rest, for cascades: two maps, rows of `MAPS`.

A map takes an image x of values 0 .. num_values − 1 to (low, rest). ``low``, the image D(x) of the base, has the same
values and channels, each side divided by ``factor``; ``rest`` is what a super-resolution model learns given ``low``.
All of it is integer arithmetic: nothing is rounded but by the map, and D is a function of the values alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from undiffuse.data.lazy_array import LazyArray, cast_to_array
from undiffuse.errors import ConfigError

MAX_VALUES = 1 << 16
"""The most values of an item, as in `undiffuse.data.transform.IntegerLevels`."""
MAX_BLOCK_ITEMS = 1024
"""Items that are split at a time."""


class ResolutionMap(NamedTuple):
    """A map from the cells of blocks, (cells, ...) int64, to (low (...), rest (pieces, ...)).

    ``synthesise`` is its inverse, None where the rest is the image itself and low a function of it.
    """

    analyse: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    synthesise: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


def rounded_mean(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """low = ⌊mean + 1/2⌋ of the cells; the rest is the cells themselves."""
    n = len(cells)
    return (2 * cells.sum(0) + n) // (2 * n), cells


def haar(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S-transform of pairs of cells, (a, b) → (⌊(a + b)/2⌋, a − b), then of pairs of these means, down to one mean.

    The rest is all differences, one less than cells: those of the first axis first, the last one of the means.
    Each is from −(K − 1) to K − 1 for cells of 0 .. K − 1. Raises ValueError unless cells are a power of two.
    """
    details = []
    while len(cells) > 1:
        a, b = cells[0::2], cells[1::2]
        details.append(a - b)
        cells = (a + b) >> 1
    return cells[0], np.concatenate(details)


def inverse_haar(low: np.ndarray, details: np.ndarray) -> np.ndarray:
    """The cells: from mean and difference h of a pair a = mean + ⌊(h + 1)/2⌋, b = a − h."""
    cells, end = low[None], len(details)
    while end > 0:
        h = details[end - len(cells) : end]
        end -= len(cells)
        a = cells + ((h + 1) >> 1)
        cells = np.stack([a, a - h], 1).reshape(2 * len(a), *a.shape[1:])
    return cells


MAPS: Mapping[str, ResolutionMap] = {
    "mean": ResolutionMap(rounded_mean),
    "haar": ResolutionMap(haar, inverse_haar),
}
"""mean: D(x) is the rounded mean of each block, and the rest is x itself. haar: D(x) is the mean of the integer Haar
transform, the rest its differences + num_values − 1, and x ↔ (D(x), rest) is a bijection."""


@dataclass(frozen=True)
class ResolutionSplit:
    """The row ``map`` of `MAPS` for images of ``item_shape`` (C, *size) with ``num_values`` values.

    Raises `ConfigError` unless map, factor and sides fit together.
    """

    map: str
    factor: int
    item_shape: tuple[int, ...]
    num_values: int

    def __post_init__(self) -> None:
        if self.map not in MAPS:
            raise ConfigError("MAP", f"map {self.map!r}"[:80], "there is no such map", f"Use {' or '.join(MAPS)}")
        shape = self.item_shape
        integers = [self.factor, self.num_values, *(shape if isinstance(shape, list | tuple) else [0])]
        if not all(type(n) is int and n >= 1 for n in integers) or len(shape) < 2 or self.factor < 2:
            raise ConfigError("MAP", "resolution", f"{asdict(self)} is not a split"[:200], "Train the model again")
        object.__setattr__(self, "item_shape", tuple(shape))
        if odd := next((n for n in self.item_shape[1:] if n % self.factor), None):
            cause = f"a side of {odd} is not a multiple of {self.factor}"
            raise ConfigError("MAP", "resolution", cause, "Give images with other sides, by --size")
        if self.is_bijection and self.factor != 2:
            cause = f"the map {self.map!r} divides each side by 2, not by {self.factor}"
            raise ConfigError("MAP", "resolution", cause, "Train one stage for each factor of 2, or use the map 'mean'")
        if self.rest_num_values > MAX_VALUES:
            cause = f"its differences have {self.rest_num_values:,} values, more than {MAX_VALUES:,}"
            raise ConfigError("MAP", f"map {self.map!r}", cause, "Use the map 'mean'")

    @property
    def is_bijection(self) -> bool:
        """Whether x can be had from (low, rest) alone and every x has one pair: then the likelihood loses nothing."""
        return MAPS[self.map].synthesise is not None

    @property
    def low_shape(self) -> tuple[int, ...]:
        """The shape of low, (C, *size/factor)."""
        return self.item_shape[0], *(n // self.factor for n in self.item_shape[1:])

    @property
    def rest_shape(self) -> tuple[int, ...]:
        """The shape of the rest: that of x, or (C (2^dims − 1), *size/2) of differences."""
        if not self.is_bijection:
            return self.item_shape
        return self.item_shape[0] * (2 ** len(self.low_shape[1:]) - 1), *self.low_shape[1:]

    @property
    def rest_num_values(self) -> int:
        """The number of values of the rest: that of x, or 2 num_values − 1 of differences."""
        return 2 * self.num_values - 1 if self.is_bijection else self.num_values

    def low(self, values: np.ndarray) -> np.ndarray:
        """D(x) of images (n, *item_shape): (n, *low_shape)."""
        return self._blockwise(lambda x: self._split(x)[0], self.low_shape, self.num_values, values)

    def rest(self, values: np.ndarray) -> np.ndarray:
        """The rest of images (n, *item_shape): (n, *rest_shape)."""
        if not self.is_bijection:
            return values
        return self._blockwise(lambda x: self._split(x)[1], self.rest_shape, self.rest_num_values, values)

    def join(self, low: np.ndarray, rest: np.ndarray) -> np.ndarray:
        """The images of ``low`` and ``rest``, (n, *item_shape); clamped to the values where no image has that pair."""
        synthesise = MAPS[self.map].synthesise
        if synthesise is None:
            return rest
        pieces = self.rest_shape[0] // self.item_shape[0]
        details = rest.astype(np.int64).reshape(len(rest), pieces, *self.low_shape) - (self.num_values - 1)
        cells = synthesise(low.astype(np.int64), np.moveaxis(details, 1, 0))
        dims = len(self.item_shape) - 1
        x = cells.reshape(*[self.factor] * dims, len(low), *self.low_shape)
        order = [dims, dims + 1, *(axis for d in range(dims) for axis in (dims + 2 + d, d))]
        x = x.transpose(order).reshape(len(low), *self.item_shape)
        return x.clip(0, self.num_values - 1).astype(_dtype(self.num_values))

    def _split(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        dims, low = len(self.item_shape) - 1, self.low_shape
        blocks = [n for size in low[1:] for n in (size, self.factor)]
        x = values.astype(np.int64).reshape(len(values), low[0], *blocks)
        order = [*range(3, 2 * dims + 2, 2), 0, 1, *range(2, 2 * dims + 2, 2)]
        cells = x.transpose(order).reshape(self.factor**dims, len(values), *low)
        mean, rest = MAPS[self.map].analyse(cells)
        rest = np.moveaxis(rest + (self.num_values - 1) * self.is_bijection, 0, 1)
        return mean, rest.reshape(len(values), rest.shape[1] * low[0], *low[1:])

    @staticmethod
    def _blockwise(
        function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...], num_values: int, values: np.ndarray
    ) -> np.ndarray:
        """``function`` of blocks of ``values``: at each access of lazy values, else into an array of their type."""
        dtype = _dtype(num_values)
        if isinstance(values, LazyArray):
            return cast_to_array(values.map(lambda x: function(x).astype(dtype).reshape(len(x), *shape)))
        result = np.empty((len(values), *shape), dtype)
        for start in range(0, len(values), MAX_BLOCK_ITEMS):
            part = slice(start, start + MAX_BLOCK_ITEMS)
            result[part] = function(values[part])
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain data, of which `split_from_dict` makes the same object."""
        return {**asdict(self), "item_shape": list(self.item_shape)}


def split_from_dict(plain: Any) -> ResolutionSplit:
    """The split of a model's facts. Raises `ConfigError`."""
    try:
        return ResolutionSplit(*(plain[name] for name in ("map", "factor", "item_shape", "num_values")))
    except (TypeError, LookupError):
        raise ConfigError("MAP", "resolution", "not a split of images", "Train the model again") from None


def _dtype(num_values: int) -> type[np.unsignedinteger]:
    return np.uint8 if num_values <= 256 else np.uint16
