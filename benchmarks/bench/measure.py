"""Times of alternatives, run in turn, and the statistics of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)


class Spread(NamedTuple):
    """The median of ``n`` numbers with their quartiles."""

    median: float
    low: float
    high: float
    n: int

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def spread(numbers: Sequence[float]) -> Spread:
    """`Spread` of at least one number."""
    if len(numbers) == 1:
        return Spread(numbers[0], numbers[0], numbers[0], 1)
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return Spread(middle, low, high, len(numbers))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """The `Spread` of theirs/ours, pair by pair: of neighbouring times, so that a slower minute cancels."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)])


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(exponent b, R²) of the least-squares line log y = a + b log x; R² is NaN if no y differs from the others."""
    u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    u, v = u - u.mean(), v - v.mean()
    slope = float(u @ v / (u @ u))
    total = float(v @ v)
    return slope, 1 - float(((v - slope * u) ** 2).sum()) / total if total else math.nan


def alternate(
    rows: Mapping[Key, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[Key, list[float]]:
    """Seconds of every row, one number a round. The rows run in turn, in the opposite order every other round.

    ``clock`` is by default the processor time of this process, which depends least on other processes.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in rows}
    for number in range(-warm_up, rounds):
        for name in list(rows)[:: -1 if number % 2 else 1]:
            began = clock()
            rows[name]()
            if number >= 0:
                seconds[name].append(clock() - began)
    return seconds
