"""Arrays whose items are read, decoded or converted at each access."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from undiffuse.data.source_report import FileStamp, changed_error
from undiffuse.runtime.file_errors import file_errors_at
from undiffuse.runtime.file_headers import NpyHeader


class LazyArray:
    """The part of the array interface that `Dataset` uses, for items that are not in memory.

    ``read(indices)`` returns the items at int64 indices. ``rows[5]``, ``rows[2:9]``, ``rows[indices]`` and
    ``rows[mask]`` are C-contiguous arrays in memory; further indices apply to these: ``rows[:, 0]``.
    ``np.asarray(rows)`` reads everything. ``thread_safe``: another thread may read while this one computes.
    """

    def __init__(
        self, shape: Sequence[int], dtype: Any, read: Callable[[np.ndarray], np.ndarray], thread_safe: bool = False
    ) -> None:
        self.shape, self.dtype, self.read, self.thread_safe = tuple(shape), np.dtype(dtype), read, thread_safe
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, tuple):
            items = self[key[0]]
            return items[(slice(None),) * (items.ndim - self.ndim + 1) + key[1:]]
        indices = np.arange(*key.indices(len(self))) if isinstance(key, slice) else np.asarray(key)
        if indices.dtype == bool:
            indices = np.arange(len(self))[indices]
        if ((indices < -len(self)) | (indices >= len(self))).any():
            raise IndexError(f"there are {len(self)} items")
        if not indices.size:
            return np.empty(indices.shape + self.shape[1:], self.dtype)
        items = self.read(np.atleast_1d(indices % len(self)))
        return np.ascontiguousarray(items.reshape(indices.shape + self.shape[1:]), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> LazyArray:
        """The array of ``function(items)``, applied to each block (n, ...) of items when it is read."""
        empty = function(np.empty((0, *self.shape[1:]), self.dtype))
        shape = (len(self), *empty.shape[1:])
        return LazyArray(shape, empty.dtype, lambda indices: function(self.read(indices)), self.thread_safe)


def npy_rows(path: Path, header: NpyHeader, stamp: FileStamp) -> LazyArray:
    """The items of a ``.npy`` file, read from disk at each access.

    Raises `DataError` (CHANGED_DURING_RUN) if the file no longer has this ``stamp`` before or after a read. Only files
    in Fortran order, whose items are scattered, are mapped into memory: a process that reads a mapped file beyond its
    new end is killed by the system.
    """
    size = header.dtype.itemsize * math.prod(header.shape[1:])

    def items(file: IO[bytes], indices: np.ndarray) -> np.ndarray:
        if header.order == "F":
            return np.memmap(file, header.dtype, "r", header.offset, header.shape, "F")[indices]
        first, count = int(indices.min()), int(np.ptp(indices)) + 1
        if count < 2 * len(indices):  # dense: one read of the whole interval
            rows = np.empty((count, size), np.uint8)
            fill(file, rows, first)
            rows = rows if np.array_equal(indices, np.arange(first, first + count)) else rows[indices - first]
        else:
            rows = np.empty((len(indices), size), np.uint8)
            for row, index in zip(rows, indices.tolist(), strict=True):
                fill(file, row, index)
        return rows.view(header.dtype).reshape(len(indices), *header.shape[1:])

    def fill(file: IO[bytes], rows: np.ndarray, first: int) -> None:
        buffer, start = rows.reshape(-1).data, header.offset + first * size
        file.seek(start)
        while buffer:
            if not (count := file.readinto(buffer)):  # pyright: ignore[reportAttributeAccessIssue]
                raise changed_error()
            buffer = buffer[count:]

    def read(indices: np.ndarray) -> np.ndarray:
        with file_errors_at(path):
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                raise changed_error() from None
            with file:
                check_unchanged(file)
                rows = items(file, indices)
                check_unchanged(file)
                return rows

    def check_unchanged(file: IO[bytes]) -> None:
        if FileStamp.of(os.fstat(file.fileno())) != stamp:
            raise changed_error()

    return LazyArray(header.shape, header.dtype, read, thread_safe=True)


def cast_to_array(rows: LazyArray) -> np.ndarray:
    """The same object, typed as an array: it supports everything that `Dataset` does with its values."""
    return cast(np.ndarray, rows)
