"""SIGINT and SIGTERM during a run: the first stops it after the state is saved, the second at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """A signal stopped the run and its state is saved. ``exit_code`` is 128 + the signal.

    Like KeyboardInterrupt it is no Exception, so that no handler of errors swallows it.
    """

    message = "stopped; everything is saved, and the same command continues from here"

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


class StoppedImmediately(Interrupted):
    """A second signal arrived before the state was saved."""

    message = "stopped at once; the last checkpoint is valid"


class StopRequests(list[int]):
    """The numbers of the signals received so far."""

    is_safe = False

    def add(self, number: int, frame: object) -> None:
        """The signal handler: record the first signal; raise at the second one, or inside `safe_to_exit`."""
        if self.is_safe:
            raise Interrupted(number)
        if self:
            raise StoppedImmediately(number)
        self.append(number)

    @contextmanager
    def safe_to_exit(self) -> Iterator[None]:
        """A block in which nothing is unsaved: a signal, also an earlier one, raises `Interrupted` at once."""
        self.is_safe = True
        try:
            if self:
                raise Interrupted(self[0])
            yield
        finally:
            self.is_safe = False


@contextmanager
def sigterm_as_exception() -> Iterator[None]:
    """A block in which SIGTERM raises `StoppedImmediately`, as SIGINT raises KeyboardInterrupt."""

    def stop(number: int, frame: object) -> None:
        raise StoppedImmediately(number)

    with _handling(stop, signal.SIGTERM):
        yield


@contextmanager
def collect_stop_signals() -> Iterator[StopRequests]:
    """A block in which SIGINT and SIGTERM are added to the `StopRequests` that it yields."""
    requests = StopRequests()
    with _handling(requests.add, signal.SIGINT, signal.SIGTERM):
        yield requests


@contextmanager
def _handling(handler: Callable[[int, object], None], *numbers: int) -> Iterator[None]:
    try:
        before = {n: signal.signal(n, handler) for n in numbers}
    except ValueError:  # not in the main thread: signals belong to the program around us
        before = {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
