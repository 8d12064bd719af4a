"""Arrays whose items are read, decoded or converted when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np


class Rows:
    """As much of an array of ``shape`` and ``dtype`` as a data set needs, of items that lie elsewhere.

    ``read`` gives the items whose numbers, int64, it is given. ``rows[5]``, ``rows[2:9]`` and ``rows[numbers]`` are
    arrays in memory, C-contiguous.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, read: Callable[[np.ndarray], np.ndarray]) -> None:
        self.shape, self.dtype, self.read = tuple(shape), np.dtype(dtype), read
        self.ndim, self.size = len(self.shape), math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        numbers = np.arange(len(self))[key]
        found = self.read(np.atleast_1d(numbers))
        return np.ascontiguousarray(found.reshape(numbers.shape + self.shape[1:]), self.dtype)


def as_array(rows: Rows) -> np.ndarray:
    """The same rows, called an array, since all that a data set does with its values they can do too."""
    return cast(np.ndarray, rows)
