"""Arrays whose items are read, decoded or converted when they are asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from undiffuse.data.headers import Npy
from undiffuse.data.problems import refusal
from undiffuse.data.seen import Stamp, changed


class Rows:
    """As much of an array of ``shape`` and ``dtype`` as a data set needs, of items that lie elsewhere.

    ``read`` gives the items whose numbers, int64, it is given. ``rows[5]``, ``rows[2:9]``, ``rows[numbers]`` and
    ``rows[mask]`` are arrays in memory, C-contiguous, of which more indices take parts: ``rows[:, 0]``;
    ``np.asarray(rows)`` is all of them. ``beside`` says that a thread may read while others work.
    """

    def __init__(
        self, shape: Sequence[int], dtype: Any, read: Callable[[np.ndarray], np.ndarray], beside: bool = False
    ) -> None:
        self.shape, self.dtype, self.read, self.beside = tuple(shape), np.dtype(dtype), read, beside
        self.ndim, self.size = len(self.shape), math.prod(self.shape)
        self.nbytes = self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, tuple):
            items = self[key[0]]
            return items[(slice(None),) * (items.ndim - self.ndim + 1) + key[1:]]
        numbers = np.arange(*key.indices(len(self))) if isinstance(key, slice) else np.asarray(key)
        if numbers.dtype == bool:
            numbers = np.arange(len(self))[numbers]
        if ((numbers < -len(self)) | (numbers >= len(self))).any():
            raise IndexError(f"there are {len(self)} items")
        if not numbers.size:
            return np.empty(numbers.shape + self.shape[1:], self.dtype)
        found = self.read(np.atleast_1d(numbers % len(self)))
        return np.ascontiguousarray(found.reshape(numbers.shape + self.shape[1:]), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def then(self, change: Callable[[np.ndarray], np.ndarray]) -> Rows:
        """The same rows, with a ``change`` made to each block of them that is read."""
        none = change(np.empty((0, *self.shape[1:]), self.dtype))
        shape = (len(self), *none.shape[1:])
        return Rows(shape, none.dtype, lambda numbers: change(self.read(numbers)), self.beside)


def stored(path: Path, header: Npy, stamp: Stamp) -> Rows:
    """The items of a ``.npy`` file, read anew whenever they are asked for.

    DataError (CHANGED_DURING_RUN) where the file is no longer the one of ``stamp``, before or after they were read. It
    is not mapped into memory, where reading what was cut off kills a process; but for files in Fortran's order, whose
    items lie scattered.
    """
    size = header.dtype.itemsize * math.prod(header.shape[1:])

    def items(file: IO[bytes], numbers: np.ndarray) -> np.ndarray:
        if header.order == "F":
            return np.memmap(file, header.dtype, "r", header.offset, header.shape, "F")[numbers]
        first, count = int(numbers.min()), int(np.ptp(numbers)) + 1
        if count < 2 * len(numbers):  # close together: all between them in one call
            found = np.empty((count, size), np.uint8)
            fill(file, found, first)
            found = found if np.array_equal(numbers, np.arange(first, first + count)) else found[numbers - first]
        else:
            found = np.empty((len(numbers), size), np.uint8)
            for item, number in zip(found, numbers.tolist(), strict=True):
                fill(file, item, number)
        return found.view(header.dtype).reshape(len(numbers), *header.shape[1:])

    def fill(file: IO[bytes], found: np.ndarray, first: int) -> None:
        into, start = found.reshape(-1).data, header.offset + first * size
        while into:
            if not (count := os.preadv(file.fileno(), [into], start)):
                raise changed().at(path)
            into, start = into[count:], start + count

    def read(numbers: np.ndarray) -> np.ndarray:
        try:
            with path.open("rb", buffering=0) as file:
                same(file)
                found = items(file, numbers)
                same(file)
                return found
        except FileNotFoundError:
            raise changed().at(path) from None
        except OSError as error:
            raise refusal(error).at(path) from error

    def same(file: IO[bytes]) -> None:
        if Stamp.of(os.fstat(file.fileno())) != stamp:
            raise changed().at(path)

    return Rows(header.shape, header.dtype, read, beside=True)


def as_array(rows: Rows) -> np.ndarray:
    """The same rows, called an array, since all that a data set does with its values they can do too."""
    return cast(np.ndarray, rows)
