"""A progress bar whose times move with the clock, also while a step of the work takes longer than a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from undiffuse.runtime.side_files import MAX_SECONDS

REFRESHES_PER_SECOND = 4
MAX_SHOWN = 0.999
"""The largest fraction that is shown before the work has ended."""


class ProgressBar:
    """The fraction done, the time since the start and the time left; nothing where ``console`` is no terminal.

    A context manager. Between two calls of `update` the fraction and the time left are extrapolated. ``total`` is the
    amount of work for `advance`.
    """

    def __init__(
        self, console: Console, title: str = "", total: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.restart(title, total)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), _Moving(self))
        self.bar = Progress(
            *columns,
            console=console,
            transient=True,
            disable=not console.is_terminal,
            refresh_per_second=REFRESHES_PER_SECOND,
        )
        self.row = self.bar.add_task(title, total=1.0)

    def __enter__(self) -> ProgressBar:
        self.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def start(self) -> None:
        """Show the bar."""
        self.bar.start()

    def stop(self) -> None:
        """Remove the bar."""
        with suppress(OSError):  # the terminal may be closed
            self.bar.stop()

    def restart(self, title: str, total: float = 1.0) -> None:
        """Begin other work, of an amount of ``total``."""
        self.title, self.text, self.total, self.done = title, "", total, 0.0
        self.began = self.updated = self.clock()
        self.fraction, self.left = 0.0, None

    def advance(self, amount: float) -> None:
        """Add to the work that is done."""
        self.done += amount
        self.update(min(self.done / self.total, 1.0) if self.total else 1.0)

    def update(self, fraction: float, text: str = "", left: float | None = None, title: str | None = None) -> None:
        """Set the ``fraction`` of the work that is done, and the seconds ``left``, by default at the speed so far."""
        self.updated, self.fraction, self.text = self.clock(), fraction, text
        self.title = self.title if title is None else title
        elapsed = self.updated - self.began
        self.left = elapsed * (1 / fraction - 1) if left is None and fraction > 0 else left

    def shown(self) -> tuple[float, str]:
        """The fraction and the text for this moment."""
        now = self.clock()
        since, fraction, times = now - self.updated, self.fraction, format_clock(now - self.began)
        if self.left is not None:
            if self.left > 0:
                fraction += (1 - fraction) * since / self.left
            times = f"{times}, {format_clock(max(self.left - since, 0.0))} left"
        fraction = min(fraction, MAX_SHOWN)
        return fraction, " · ".join(filter(None, (self.text, f"{100 * fraction:.0f} %", times)))


class _Moving(TextColumn):
    """The text of a bar at the moment when it is drawn; it moves the bar too."""

    def __init__(self, bar: ProgressBar) -> None:
        super().__init__("{task.fields[text]}", markup=False)
        self.moving = bar

    def render(self, task):
        task.completed, text = self.moving.shown()
        task.description, task.fields["text"] = self.moving.title, text
        return super().render(task)


def format_clock(seconds: float) -> str:
    """Minutes and seconds, as 2:05, or hours too, as 1:02:05; at most `MAX_SECONDS`."""
    minutes, rest = divmod(round(min(seconds, MAX_SECONDS)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
