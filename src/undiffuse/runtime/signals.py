"""Signals that stop a run: the first one stops it after the state is saved, the second at once.

They are SIGINT, SIGTERM and, where there is one, SIGHUP, which a closed terminal sends. A signal that is ignored when
the block begins (under ``nohup``, or in a script's background job) stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(BaseException):
    """A signal stopped the run and its state is saved. ``exit_code`` is 128 + the signal.

    Like KeyboardInterrupt it is no Exception, so that no handler of errors swallows it.
    """

    message = "stopped; everything is saved, and the same command continues from here"

    def __init__(self, number: int) -> None:
        self.number, self.exit_code = number, 128 + number


class StoppedImmediately(Interrupted):
    """A signal stopped a command that had not saved its state; ``checkpoint`` tells whether there is an older one."""

    message = "stopped"

    def __init__(self, number: int, checkpoint: bool = False) -> None:
        super().__init__(number)
        if checkpoint:
            self.message = "stopped at once; the last checkpoint is valid"


class StopRequests(list[int]):
    """The numbers of the signals received so far; ``has_checkpoint`` tells whether something has been saved."""

    def __init__(self, has_checkpoint: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.is_safe, self.has_checkpoint = False, has_checkpoint

    def add(self, number: int, frame: object) -> None:
        """The signal handler: record the first signal; raise at the second one, or inside `safe_to_exit`."""
        if self.is_safe:
            raise Interrupted(number)
        if self:
            raise StoppedImmediately(number, self.has_checkpoint())
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
def signals_as_exceptions() -> Iterator[None]:
    """A block in which SIGINT raises KeyboardInterrupt, and the others `StoppedImmediately`.

    Some modules that are imported replace these by exceptions of their own; then the block raises `StoppedImmediately`.
    """
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else StoppedImmediately(number)

    with _handling(stop):
        try:
            yield
        except Exception:
            if received:
                raise StoppedImmediately(received[0]) from None
            raise


@contextmanager
def interruptible() -> Iterator[None]:
    """A block whose work is saved as it goes: a signal in it raises `Interrupted`."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None
    except StoppedImmediately as stopped:
        raise Interrupted(stopped.number) from None


@contextmanager
def collect_stop_signals(has_checkpoint: Callable[[], bool] = lambda: False) -> Iterator[StopRequests]:
    """A block in which signals are added to the `StopRequests` that it yields."""
    requests = StopRequests(has_checkpoint)
    with _handling(requests.add):
        yield requests


@contextmanager
def _handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    try:
        handled = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {n: signal.signal(n, handler) for n in handled}
    except ValueError:  # not in the main thread: signals belong to the program around us
        before = {}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
