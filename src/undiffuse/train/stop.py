"""Signals that ask a run to stop: the first one when all is saved, the second one at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """A signal asked the run to stop; its state is saved. ``exit_code`` is 128 + the signal.

    Like KeyboardInterrupt it is no Exception: nobody who handles errors swallows it.
    """

    said = "stopped; all is saved, and the same command goes on from here"

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


class StoppedAtOnce(Interrupted):
    """A second signal came before all was saved."""

    said = "stopped at once; the last checkpoint is whole"


class Asked(list[int]):
    """The signals that asked so far, by their numbers."""

    saved = False

    def note(self, number: int, frame: object) -> None:
        if self.saved:
            raise Interrupted(number)
        if self:
            raise StoppedAtOnce(number)
        self.append(number)

    @contextmanager
    def all_saved(self) -> Iterator[None]:
        """Within it there is nothing to lose: a signal, also one that came before, stops there and then."""
        self.saved = True
        try:
            if self:
                raise Interrupted(self[0])
            yield
        finally:
            self.saved = False


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it SIGTERM raises `StoppedAtOnce`, as SIGINT raises KeyboardInterrupt, so that commands end in order."""

    def end(number: int, frame: object) -> None:
        raise StoppedAtOnce(number)

    with _handling(end, signal.SIGTERM):
        yield


@contextmanager
def stopping_signals() -> Iterator[Asked]:
    """A list that SIGINT and SIGTERM write their number into; the second one raises `StoppedAtOnce`."""
    asked = Asked()
    with _handling(asked.note, signal.SIGINT, signal.SIGTERM):
        yield asked


@contextmanager
def _handling(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    try:
        before = {n: signal.signal(n, handler) for n in numbers}
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
