"""Measurements that take a given time: as many items and Monte Carlo samples as fit, measured as they go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

Part = TypeVar("Part")


class Pace:
    """How long a network call for one item takes, in ``seconds``; infinitely little until something is known."""

    def __init__(self) -> None:
        self.seconds, self.guess = 0.0, 0.0

    def follow(self, guess: float) -> None:
        """Adopt a new ``guess`` of the same machine; a pace that was measured changes in proportion to its guess."""
        self.seconds = self.seconds * guess / self.guess if self.guess else guess
        self.guess = guess


class TimeLimit:
    """``seconds`` from now, by ``clock``, for a measurement; infinitely many for one of full size.

    ``pace`` is what earlier measurements of the same model have shown, and is updated by `in_parts`.
    """

    def __init__(
        self, seconds: float = math.inf, pace: Pace | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.pace, self.clock = pace or Pace(), clock
        self.end = clock() + seconds
        self.calls, self.spent = 0.0, 0.0

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.end - self.clock()

    @property
    def calls_left(self) -> float:
        """How many network calls for one item fit into the time that is left, at the pace so far."""
        return max(self.left, 0.0) / self.pace.seconds if self.pace.seconds else math.inf

    def share(self, fraction: float) -> TimeLimit:
        """The limit of a part of the measurement that may take this ``fraction`` of what is left."""
        return TimeLimit(self.left * fraction, self.pace, self.clock)

    def in_parts(self, compute: Callable[[slice], Part], items: int, calls: float) -> list[Part]:
        """``compute`` for consecutive parts of ``items`` until all are done or the time is over.

        An item takes ``calls`` network calls. A part is what fits into half of the time left, so that a wrong guess of
        the pace costs little; without a limit it is everything.
        """
        parts, start = [], 0
        while start < items and (fitting := self.calls_left / calls) >= 1:
            stop = items if fitting / 2 >= items - start else start + max(1, int(fitting / 2))
            began = self.clock()
            parts.append(compute(slice(start, stop)))
            self.spent, self.calls = self.spent + self.clock() - began, self.calls + (stop - start) * calls
            self.pace.seconds, start = self.spent / self.calls, stop
        return parts
