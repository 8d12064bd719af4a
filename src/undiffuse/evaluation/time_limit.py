"""Measurements that take a given time: as many items as fit, by the pace that is measured meanwhile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypeVar

from undiffuse.runtime.device import halve_while_out_of_memory

Part = TypeVar("Part")

RELIABLE_CALLS = 256
"""Network calls whose time is worth more than a guess; fewer may be slow for a cold start or a small batch."""


class Pace:
    """How long a network call for one item takes: a ``guess`` times a ``factor`` that measurements have shown."""

    def __init__(self) -> None:
        self.guess, self.factor = 0.0, 1.0

    @property
    def seconds(self) -> float:
        """The seconds of a call; 0 until something is known."""
        return self.guess * self.factor

    def follow(self, guess: float) -> None:
        """Adopt a new ``guess``, from what the machine does now; the factor stays."""
        self.guess = guess

    def learn(self, calls: float, seconds: float) -> None:
        """Update the factor by ``calls`` that took ``seconds``; fewer than `RELIABLE_CALLS` have a smaller weight."""
        measured = max(seconds / calls, 1e-12)
        if not self.guess:
            self.guess = measured
        self.factor *= (measured / self.seconds) ** min(1.0, calls / RELIABLE_CALLS)


class TimeLimit:
    """``seconds`` from now, by ``clock``, for a measurement; infinitely many for one of full size.

    ``pace`` comes from earlier measurements of the same model; `in_parts` updates it.
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
        """How many network calls for one item fit into the time that is left, at its pace so far."""
        seconds = self.spent / self.calls if self.calls else self.pace.seconds
        return max(self.left, 0.0) / seconds if seconds else math.inf

    def share(self, fraction: float) -> TimeLimit:
        """The limit of a part of the measurement that may take this ``fraction`` of what is left."""
        return TimeLimit(self.left * fraction, self.pace, self.clock)

    def in_parts(self, compute: Callable[[slice], Part], items: int, calls: float) -> list[Part]:
        """``compute`` for consecutive parts of ``items`` until all are done or the time is over.

        An item takes ``calls`` network calls. A part is what fits into half of the time left, so that a wrong guess of
        the pace costs little; without a limit it is everything. Parts that the memory of the GPU is too small for are
        halved: ``compute`` then begins again at their first item.
        """
        parts, start, most = [], 0, items
        while start < items and (fitting := self.calls_left / calls) >= 1:
            size = min(items - start if fitting / 2 >= items - start else max(1, int(fitting / 2)), most)
            began, here = self.clock(), lambda batch, start=start: compute(slice(start, start + batch))
            part, computed = halve_while_out_of_memory(here, size, lambda line: None)
            parts.append(part)
            most = most if computed == size else computed
            seconds, done = self.clock() - began, computed * calls
            start, self.spent, self.calls = start + computed, self.spent + seconds, self.calls + done
            self.pace.learn(done, seconds)
        return parts
