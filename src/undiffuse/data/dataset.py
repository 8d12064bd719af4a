"""What every source of data becomes: one packed array that says what was done to it."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from undiffuse.conditioning import Condition
from undiffuse.data.seen import Seen
from undiffuse.errors import ConfigError, DataError

CHUNK, CHUNK_BYTES = 4096, 1 << 24
"""Items, and bytes, that are read at a time, so that data larger than memory never lie in it as a whole."""


@dataclass(frozen=True)
class Split:
    """Three increasing index arrays, int64, that share no item and together hold all."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True, eq=False)
class Dataset:
    """N items in one array, channels first, in the type that they are stored in.

    ``values`` (N, C, *size) or (N, D): uint8 or uint16 for data with ``levels`` (whole numbers in
    0 .. levels − 1), float32 for continuous data (``levels`` None). ``labels`` (N,) int64 in
    0 .. len(classes) − 1, or None. ``notes`` are sentences that say what was seen and done. Items from
    ``test_from`` on are an official test part. ``cond`` float32 is what else is known of each item: a vector
    (N, D), or a sequence of tokens (N, L, D) with ``mask`` (N, L), True where one counts. ``value_range`` (low, high)
    is where continuous values are said to lie, ``columns`` what the numbers of a vector are called, ``names`` what each
    item is called in its source (a file by its path in the folder; none in an array), ``seen`` what the source held
    beside. ValueError where these do not fit each other: the loaders (and ``from_array``) are what checks a person's
    data.

    ``values`` may lie on the disk (`undiffuse.data.rows.Rows`): nothing here reads more than a chunk of them at a time.
    """

    name: str
    values: np.ndarray
    levels: int | None
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    test_from: int | None = None
    cond: np.ndarray | None = None
    mask: np.ndarray | None = None
    value_range: tuple[float, float] | None = None
    columns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    seen: Seen = field(default_factory=Seen)

    def __post_init__(self) -> None:
        kinds = ("float32",) if self.levels is None else ("uint8",) if self.levels <= 256 else ("uint16",)
        if self.values.ndim < 2 or not self.values.size or self.values.dtype.name not in kinds:
            raise ValueError(f"no data of {self.levels} levels: {self.values.dtype} {self.values.shape}")
        if self.labels is not None and (self.labels.shape != (len(self),) or self.labels.dtype != np.int64):
            raise ValueError(f"labels must be ({len(self)},) int64, not {self.labels.shape} {self.labels.dtype}")
        if self.names and len(self.names) != len(self):
            raise ValueError(f"{len(self.names)} names of {len(self)} items")

    def __len__(self) -> int:
        return len(self.values)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """(C, *size) or (D,)."""
        return self.values.shape[1:]

    @property
    def hearing(self) -> dict[str, int]:
        """The settings of a network that hears all that these data tell of an item: classes, vector, tokens."""
        said = {"classes": len(self.classes)} if self.labels is not None else {}
        return said if self.cond is None else {**said, _kind(self.cond): self.cond.shape[-1]}

    def condition(self, items: np.ndarray) -> Condition:
        """All that these data tell of the ``items``."""
        told = {"label": self.labels, "mask": self.mask}
        if self.cond is not None:
            told[_kind(self.cond)] = self.cond
        return Condition(**{name: torch.from_numpy(v[items]) for name, v in told.items() if v is not None})

    def called(self, items: np.ndarray) -> np.ndarray:
        """What the ``items`` are called in their source; their own numbers where it has no names."""
        return np.array([self.names[i] for i in items], object) if self.names else items

    def noted(self, *notes: str) -> Dataset:
        """The same data with ``notes`` added; hashes already worked out are kept."""
        other = copy.copy(self)
        object.__setattr__(other, "notes", (*self.notes, *notes))
        return other

    @property
    def digests(self) -> np.ndarray:
        """(N,) uint64: the first eight bytes of BLAKE2b over each item's own bytes and nothing else."""
        return self._read[0]

    @property
    def fingerprint(self) -> str:
        """sha256 in hex over type, shape, levels, range, labels, conditions and bytes: equal for equal data only."""
        return self._read[1]

    @property
    def constant_channels(self) -> np.ndarray:
        """The channels that never change, int64."""
        return self._read[2]

    @cached_property
    def _read(self) -> tuple[np.ndarray, str, np.ndarray]:
        """Digests, fingerprint and constant channels, from one pass over the values."""
        head = (self.values.dtype.name, self.values.shape, self.levels, self.labels is not None)
        digest = hashlib.sha256(json.dumps(head + (self.value_range,) * (self.value_range is not None)).encode())
        if self.labels is not None:
            digest.update(_bytes(self.labels))
        for told in (self.cond, self.mask):
            if told is not None:
                digest.update(json.dumps(told.shape).encode() + _bytes(told))
        size = self.values.dtype.itemsize * math.prod(self.item_shape)
        each, first, still = bytearray(), self._first, np.ones(self.item_shape[0], bool)
        for chunk in chunks(self.values):
            block = _bytes(chunk)
            digest.update(block)
            for start in range(0, len(block), size):
                each += hashlib.blake2b(block[start : start + size], digest_size=8).digest()
            still &= (chunk == first).all((0, *range(2, chunk.ndim)))
        return np.frombuffer(bytes(each), "<u8").astype(np.uint64), digest.hexdigest(), np.flatnonzero(still)

    @property
    def _first(self) -> np.ndarray:
        """The first number of each channel, (1, C, 1, ...)."""
        return self.values[:1][(slice(None), slice(None), *(slice(1),) * (self.values.ndim - 2))]

    @property
    def distinct(self) -> int:
        """How many items differ from all before them, those of an official test part left aside."""
        return len(np.unique(self.digests[: self.test_from]))

    def share_held_out(self, asked: float) -> tuple[float, str | None]:
        """The share that can be held out: ``asked``, or 0 and a sentence where distinct items are fewer than parts."""
        n, kind = self.distinct, "item" if self.distinct == len(self) else "distinct item"
        if asked == 0 or n >= (3 if self.test_from is None else 2):
            return asked, None
        only = f"one {kind}" if n == 1 else f"{n} {kind}s"
        return 0.0, f"{only} only: nothing is held out, nothing is measured"

    def split(self, held_out: float = 0.1) -> Split:
        """Train, validation and test parts, each item's part decided by its own content.

        The digest is a number u in [0, 1): u < ``held_out`` is test, u >= 1 − ``held_out`` validation. So
        equal items share a part, order and labels do not matter, and an item that is added moves no other;
        only where a part would be empty does the distinct item nearest to it step in. An official test part
        stays as it is. ``held_out=0`` leaves all else in train. ConfigError unless 0 <= held_out < 0.5;
        DataError (TOO_FEW_ITEMS) where there are fewer distinct items than parts to fill.
        """
        if not 0 <= held_out < 0.5:
            raise ConfigError("HELD_OUT", "held_out", f"{held_out} is no share", "Give a number from 0 to below 0.5")
        ours = slice(0, self.test_from)
        distinct, rank = np.unique(self.digests[ours], return_inverse=True)
        u = (distinct >> np.uint64(11)) * 2.0**-53
        least = int(held_out > 0)
        least_test = least if self.test_from is None else 0
        if len(distinct) < 1 + least + least_test:
            raise DataError(
                "TOO_FEW_ITEMS",
                self.name,
                f"{len(distinct)} distinct items cannot fill {1 + least + least_test} parts",
                "Give more items, or held_out=0 to train on all of them and measure nothing",
            )
        wanted = int((u < held_out).sum()) if least_test else 0
        tests = min(max(wanted, least_test), len(distinct) - 1 - least)
        validations = min(max(int((u >= 1 - held_out).sum()), least), len(distinct) - 1 - tests)
        is_test, is_validation = rank < tests, rank >= len(distinct) - validations
        official = np.arange(len(rank), len(self))
        return Split(
            train=np.flatnonzero(~is_test & ~is_validation),
            validation=np.flatnonzero(is_validation),
            test=np.concatenate([np.flatnonzero(is_test), official]),
        )

    def moments(self, items: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of each channel over the ``items``, (C,) each, summed in float64.

        std = sqrt(mean of squares about the mean). A channel that never changes has std 1, so that it can
        still be standardised; the notes of ``observed`` say which those are.
        """
        first = self._first.astype(np.float64)
        axes = (0, *range(2, self.values.ndim))
        count = len(items) * math.prod(self.item_shape[1:])

        def average(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            total = np.zeros_like(first)
            for chunk in chunks(self.values, items):
                total += function(chunk.astype(np.float64)).sum(axes, keepdims=True)
            return total / count

        mean = first + average(lambda v: v - first)  # exact where nothing changes, however many are summed
        std = np.sqrt(average(lambda v: (v - mean) ** 2))
        return tuple(mean.ravel().tolist()), tuple(np.where(std > 0, std, 1.0).ravel().tolist())

    def counts(self, items: np.ndarray) -> np.ndarray:
        """How often each level occurs in each channel of the ``items``, (C, levels)."""
        assert self.levels is not None
        total = np.zeros((self.item_shape[0], self.levels), np.int64)
        for chunk in chunks(self.values, items):
            for channel, values in enumerate(np.moveaxis(chunk, 1, 0)):
                total[channel] += np.bincount(values.ravel(), minlength=self.levels)
        return total


def observed(data: Dataset) -> Dataset:
    """The same data, noted: items that are equal, channels that never change, a single item."""
    notes = ["there is only one item"] if len(data) == 1 else []
    if repeats := len(data) - len(np.unique(data.digests)):
        notes.append(f"{repeats} of {len(data)} items repeat another one exactly")
    if len(still := data.constant_channels):
        names = [data.columns[i] if data.columns else str(i) for i in still[:5]]
        more = f" and {len(still) - 5} more" if len(still) > 5 else ""
        notes.append(f"the same value everywhere in channel {', '.join(names)}{more}")
    return data.noted(*notes)


def chunks(values: np.ndarray, items: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Consecutive pieces of ``values``, or of some ``items`` of them: at most CHUNK items, and about CHUNK_BYTES."""
    size = max(1, min(CHUNK, CHUNK_BYTES // max(values.dtype.itemsize * math.prod(values.shape[1:]), 1)))
    for start in range(0, len(values) if items is None else len(items), size):
        here = slice(start, start + size)
        yield values[here if items is None else items[here]]


def _kind(cond: np.ndarray) -> str:
    return "vector" if cond.ndim == 2 else "tokens"


def _bytes(array: np.ndarray) -> memoryview:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data
