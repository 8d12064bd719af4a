"""`Dataset`: items in one array with labels, conditions and notes, which every source of data returns."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from undiffuse.data.caption_embeddings import CaptionEmbeddings, prompt_bytes, text_rows, text_setting
from undiffuse.data.source_report import SourceReport
from undiffuse.errors import ConfigError, DataError
from undiffuse.networks.condition import Condition

MAX_CHUNK_ITEMS, MAX_CHUNK_BYTES = 4096, 1 << 24
"""Limits of what is read at a time, so that data may be larger than memory."""


@dataclass(frozen=True)
class Split:
    """Indices of the items of each part: int64, increasing, disjoint, together 0 .. N − 1."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def shown(self) -> np.ndarray:
        """Validation items, or training items where none are held out: those that pictures are drawn of."""
        return self.validation if len(self.validation) else self.train


@dataclass(frozen=True, eq=False)
class Dataset:
    """N items in one array, channels first, in the type in which they are stored.

    - ``values``: (N, C, *size) or (N, D): uint8 or uint16 for integers in 0 .. num_values − 1, float32 for
      continuous data. May be a `LazyArray`: no method here reads more than a chunk of it at a time
    - ``num_values``: number of values of integer data (2 .. 65536), None for continuous data
    - ``labels``: (N,) int64 in 0 .. len(classes) − 1, or None
    - ``notes``: sentences about what was noticed and changed when the data were read
    - ``test_from``: index of the first item of an official test part, which goes on to the end
    - ``validation_from``: index of the first item of an official validation part, which ends before the test part
    - ``cond``: (N, D) float32 vectors, or (N, L, D) float32 tokens with ``mask`` (N, L), True where a token counts
    - ``value_range``: (low, high), declared limits of continuous data
    - ``columns``: names of the D numbers of an item (N, D)
    - ``names``: name of each item in its source (the path of a file within its folder); empty for arrays
    - ``report``: formats, sizes and skipped files of the source
    - ``captions``: of each item a tuple of one or more texts; empty without captions
    - ``embeddings``: of the captions by a text encoder; None: the network gets their bytes

    Raises ValueError if these contradict one another. User data are checked earlier, by `from_array` and the loaders.
    """

    name: str
    values: np.ndarray
    num_values: int | None
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    test_from: int | None = None
    cond: np.ndarray | None = None
    mask: np.ndarray | None = None
    value_range: tuple[float, float] | None = None
    columns: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    report: SourceReport = field(default_factory=SourceReport)
    validation_from: int | None = None
    captions: tuple[tuple[str, ...], ...] = ()
    embeddings: CaptionEmbeddings | None = None

    def __post_init__(self) -> None:
        dtype = "float32" if self.num_values is None else "uint8" if self.num_values <= 256 else "uint16"
        if self.values.ndim < 2 or not self.values.size or self.values.dtype.name != dtype:
            raise ValueError(
                f"num_values={self.num_values} needs {dtype} items, not {self.values.dtype} {self.values.shape}"
            )
        if self.labels is not None and (self.labels.shape != (len(self),) or self.labels.dtype != np.int64):
            raise ValueError(f"labels must be ({len(self)},) int64, not {self.labels.shape} {self.labels.dtype}")
        if self.labels is not None and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"labels {self.labels.min()} to {self.labels.max()} of {len(self.classes)} classes")
        starts = [start for start in (0, self.validation_from, self.test_from, len(self)) if start is not None]
        if not all(type(start) is int for start in starts) or starts != sorted(set(starts)):
            raise ValueError(f"{len(self)} items with official parts from {starts[1:-1]}")
        if self.names and len(self.names) != len(self):
            raise ValueError(f"{len(self.names)} names for {len(self)} items")
        if self.captions and (
            len(self.captions) != len(self) or not all(map(all, self.captions)) or () in self.captions
        ):
            raise ValueError(f"captions of {len(self.captions)} items, some of them empty, for {len(self)} items")
        if self.embeddings is not None and (self.cond is not None or not self.captions):
            raise ValueError("embeddings of captions take the place of vectors or tokens, and need captions")
        if self.value_range is not None:  # 0 and 0.0 would give two fingerprints
            object.__setattr__(self, "value_range", tuple(map(float, self.value_range)))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def item_shape(self) -> tuple[int, ...]:
        """(C, *size) or (D,)."""
        return self.values.shape[1:]

    @property
    def condition_sizes(self) -> dict[str, int]:
        """Settings of a network that accepts all conditions of these data: classes, vector, tokens, text."""
        sizes = {"classes": len(self.classes)} if self.labels is not None else {}
        if self.cond is not None:
            sizes[_condition_field(self.cond)] = self.cond.shape[-1]
        if self.embeddings is not None:
            return sizes | self.embeddings.sizes
        return sizes | ({"text": text_setting(self.longest_caption)} if self.captions else {})

    @cached_property
    def longest_caption(self) -> int:
        """The bytes of the longest caption; 0 without captions."""
        return prompt_bytes(self.captions)

    def tensor(self, indices: np.ndarray) -> torch.Tensor:
        """The values of the items ``indices``, (n, *item_shape), in the type in which they are stored."""
        return torch.from_numpy(np.ascontiguousarray(self.values[indices]))

    def condition(self, indices: np.ndarray, u: np.ndarray | None = None) -> Condition:
        """The labels, vectors or tokens, and a caption each, of the items ``indices``.

        Of several captions of an item it is the one at the fraction ``u`` (n,), in [0, 1), the first without ``u``.
        """
        fields = {"label": self.labels, "mask": self.mask}
        if self.cond is not None:
            fields[_condition_field(self.cond)] = self.cond
        cond = Condition(**{name: torch.from_numpy(v[indices]) for name, v in fields.items() if v is not None})
        if not self.captions:
            return cond
        choices, fractions = [self.captions[i] for i in indices], np.zeros(len(indices)) if u is None else u
        texts = [each[int(fraction * len(each))] for each, fraction in zip(choices, fractions, strict=True)]
        if self.embeddings is None:
            return replace(cond, text=text_rows(texts, self.longest_caption))
        return replace(self.embeddings.condition(texts), label=cond.label)

    def condition_vectors(self, indices: np.ndarray) -> np.ndarray | None:
        """The vectors that are conditions of the items ``indices``, of each caption one; None without vectors."""
        if self.embeddings is not None:
            return self.embeddings.vectors([text for i in indices for text in self.captions[i]])
        return self.cond[indices] if self.cond is not None and self.cond.ndim == 2 else None

    @property
    def text_encoder(self) -> dict[str, Any] | None:
        """What turns captions into conditions: ``name`` and, of a pretrained encoder, ``digest``; None without."""
        return (self.embeddings.encoder if self.embeddings else {"name": "bytes"}) if self.captions else None

    def given_condition(self, indices: np.ndarray, conditional: bool, u: np.ndarray | None = None) -> Condition | None:
        """The condition that a model of these data gets, that of `condition` only if ``conditional``."""
        return self.condition(indices, u) if conditional else None

    def item_names(self, indices: np.ndarray) -> np.ndarray:
        """The names of the items ``indices``; the indices themselves if items have no names."""
        return np.array([self.names[i] for i in indices], object) if self.names else indices

    def with_notes(self, *notes: str) -> Dataset:
        """The same data with more ``notes``; digests that were computed are kept."""
        other = copy.copy(self)
        object.__setattr__(other, "notes", (*self.notes, *notes))
        return other

    def with_origin(self, source: str, options: Mapping[str, Any]) -> Dataset:
        """The same data, whose report says from which ``source`` and with which ``options`` they were read."""
        other = copy.copy(self)
        object.__setattr__(other, "report", replace(self.report, source=source, options=options))
        return other

    @property
    def digests(self) -> np.ndarray:
        """(N,) uint64: BLAKE2b of the bytes of each item, cut to 8 bytes."""
        return self._scan[0]

    @property
    def fingerprint(self) -> str:
        """sha256 in hex over dtype, shape, num_values, value_range, labels, conditions, captions, parts and values."""
        return self._scan[1]

    @property
    def constant_channels(self) -> np.ndarray:
        """Indices of the channels that have one value in all items, int64."""
        return self._scan[2]

    @cached_property
    def _scan(self) -> tuple[np.ndarray, str, np.ndarray]:
        """Digests, fingerprint and constant channels, from one pass over the values."""
        head = (self.values.dtype.name, self.values.shape, self.num_values, self.labels is not None)
        digest = hashlib.sha256(json.dumps(head + (self.value_range,) * (self.value_range is not None)).encode())
        if self.labels is not None:
            digest.update(_bytes(self.labels))
        for array in (self.cond, self.mask):
            if array is not None:
                digest.update(json.dumps(array.shape).encode() + _bytes(array))
        if self.captions:
            digest.update(json.dumps([self.captions, self.embeddings and self.embeddings.encoder["digest"]]).encode())
        if (parts := (self.validation_from, self.test_from)) != (None, None):
            digest.update(json.dumps({"official parts from": parts}).encode())
        size = self.values.dtype.itemsize * math.prod(self.item_shape)
        item_digests, first, is_constant = bytearray(), self._first, np.ones(self.item_shape[0], bool)
        for chunk in chunks(self.values):
            block = _bytes(chunk)
            digest.update(block)
            for start in range(0, len(block), size):
                item_digests += hashlib.blake2b(block[start : start + size], digest_size=8).digest()
            is_constant &= (chunk == first).all((0, *range(2, chunk.ndim)))
        digests = np.frombuffer(bytes(item_digests), "<u8").astype(np.uint64)
        return digests, digest.hexdigest(), np.flatnonzero(is_constant)

    @property
    def _first(self) -> np.ndarray:
        """The first value of each channel, (1, C, 1, ...)."""
        return self.values[:1][(slice(None), slice(None), *(slice(1),) * (self.values.ndim - 2))]

    @property
    def num_distinct(self) -> int:
        """Number of distinct items, without those of an official validation or test part."""
        return len(np.unique(self.digests[: self.official_from]))

    @property
    def official_from(self) -> int:
        """Index of the first item of an official validation or test part; N if there is none."""
        return min(len(self) if start is None else start for start in (self.validation_from, self.test_from))

    def may_be_of(self, info: Mapping[str, Any]) -> bool:
        """Whether a model with the facts ``info`` was trained on these data, or on others of their name.

        The latter may be these before a change, in which an item stays in its part.
        """
        return self.name == info.get("name") or self.fingerprint == info.get("fingerprint")

    def held_out_fraction(self, requested: float) -> tuple[float, str | None]:
        """(requested, None), or (0, a sentence) if there are fewer distinct items than parts of `split`."""
        n, kind = self.num_distinct, "item" if self.num_distinct == len(self) else "distinct item"
        if requested == 0 or n >= 1 + (self.validation_from is None) + (self.test_from is None):
            return requested, None
        count = f"one {kind}" if n == 1 else f"{n} {kind}s"
        return 0.0, f"{count} only: nothing is held out, nothing is measured"

    def split(self, held_out: float = 0.1) -> Split:
        """Training, validation and test parts; the content of an item decides its part.

        The digest of an item is a number u in [0, 1): u < held_out is test, u >= 1 − held_out is validation. So equal
        items share a part, order and labels do not matter, and a new item moves no other one. If a part would be empty,
        it gets the distinct item with the nearest u. Official parts stay as they are. With held_out = 0 all other items
        are training data. Raises `ConfigError` unless 0 <= held_out < 0.5, `DataError` (TOO_FEW_ITEMS) if there
        are fewer distinct items than parts.
        """
        if not 0 <= held_out < 0.5:
            raise ConfigError(
                "HELD_OUT", "held_out", f"{held_out} is not in [0, 0.5)", "Give a number from 0 to below 0.5"
            )
        distinct, rank = np.unique(self.digests[: self.official_from], return_inverse=True)
        u = (distinct >> np.uint64(11)) * 2.0**-53
        min_validation = int(held_out > 0 and self.validation_from is None)
        min_test = int(held_out > 0 and self.test_from is None)
        parts = 1 + min_validation + min_test
        if len(distinct) < parts:
            raise DataError(
                "TOO_FEW_ITEMS",
                self.name,
                f"{len(distinct)} distinct items are too few for {parts} parts",
                "Give more items, or held_out=0 to train on all of them without measuring",
            )
        tests = int((u < held_out).sum()) if min_test else 0
        tests = min(max(tests, min_test), len(distinct) - 1 - min_validation)
        validations = int((u >= 1 - held_out).sum()) if min_validation else 0
        validations = min(max(validations, min_validation), len(distinct) - 1 - tests)
        is_test, is_validation = rank < tests, rank >= len(distinct) - validations
        official = np.arange(len(rank), len(self))
        is_official_test = official >= (len(self) if self.test_from is None else self.test_from)
        return Split(
            train=np.flatnonzero(~is_test & ~is_validation),
            validation=np.concatenate([np.flatnonzero(is_validation), official[~is_official_test]]),
            test=np.concatenate([np.flatnonzero(is_test), official[is_official_test]]),
        )

    def moments(self, indices: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) of each channel over the items ``indices``, (C,) each, summed in float64.

        std = √(mean of squared deviations), and 1 for a constant channel, so that it can be standardized.
        """
        first = self._first.astype(np.float64)
        axes = (0, *range(2, self.values.ndim))
        count = len(indices) * math.prod(self.item_shape[1:])

        def average(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            total = np.zeros_like(first)
            for chunk in chunks(self.values, indices):
                total += function(chunk.astype(np.float64)).sum(axes, keepdims=True)
            return total / count

        mean = first + average(lambda v: v - first)  # exact for constant channels
        std = np.sqrt(average(lambda v: (v - mean) ** 2))
        return tuple(mean.ravel().tolist()), tuple(np.where(std > 0, std, 1.0).ravel().tolist())

    def counts(self, indices: np.ndarray) -> np.ndarray:
        """(C, num_values) int64: how often each value occurs in each channel of the items ``indices``."""
        assert self.num_values is not None
        total = np.zeros((self.item_shape[0], self.num_values), np.int64)
        for chunk in chunks(self.values, indices):
            for channel, values in enumerate(np.moveaxis(chunk, 1, 0)):
                total[channel] += np.bincount(values.ravel(), minlength=self.num_values)
        return total


def with_observations(data: Dataset) -> Dataset:
    """The same data with notes on repeated items, constant channels and a single item."""
    notes = ["there is only one item"] if len(data) == 1 else []
    if repeats := len(data) - len(np.unique(data.digests)):
        notes.append(f"{repeats} of {len(data)} items repeat{'s' * (repeats == 1)} another one exactly")
    if constant := describe_constant_channels(data):
        note = f"the same value everywhere in channel {constant}"
        unbounded = data.num_values is None and len(data) > 1
        notes.append(f"{note}; a density has no upper bound there: leave it out to measure one" if unbounded else note)
    return data.with_notes(*notes)


def describe_constant_channels(data: Dataset) -> str:
    """Names, or numbers, of the first constant channels, and how many there are more; "" if there are none."""
    constant = data.constant_channels
    names = [data.columns[i] if data.columns else str(i) for i in constant[:5]]
    return ", ".join(names) + (f" and {len(constant) - 5} more" if len(constant) > 5 else "")


def chunks(values: np.ndarray, indices: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Consecutive parts of ``values``, or of its items ``indices``, within MAX_CHUNK_ITEMS and MAX_CHUNK_BYTES."""
    size = max(1, min(MAX_CHUNK_ITEMS, MAX_CHUNK_BYTES // max(values.dtype.itemsize * math.prod(values.shape[1:]), 1)))
    for start in range(0, len(values) if indices is None else len(indices), size):
        part = slice(start, start + size)
        yield values[part if indices is None else indices[part]]


def _condition_field(cond: np.ndarray) -> str:
    return "vector" if cond.ndim == 2 else "tokens"


def _bytes(array: np.ndarray) -> memoryview:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data
