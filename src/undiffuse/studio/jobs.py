"""Jobs of the page: one queue and one thread, so that models are never called by two jobs at a time."""

from __future__ import annotations

import secrets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from undiffuse.errors import ResourceError, UndiffuseError, printable

MAX_WAITING = 16
"""Jobs that may wait; a further one is refused."""
MAX_KEPT = 8
"""Ended jobs whose events are kept, for a page that reconnects."""
PROGRESS_SECONDS = 0.1
"""The least time between two events of progress."""

Event = dict[str, Any]
Work = Callable[["Job"], Mapping[str, Any]]
"""What a job does: it emits events, calls `Job.check` often, and returns the content of the last event."""


class Cancelled(Exception):
    """The job was cancelled."""


class Job:
    """One job: its ``state`` (waiting, running, done, failed, cancelled) and its ``events``, oldest first.

    The thread of the queue appends events; readers take those from an index on, and get a call of their listener after
    each new one.
    """

    def __init__(self, title: str, work: Work) -> None:
        self.id, self.title, self.work = secrets.token_hex(8), title, work
        self.state = "waiting"
        self.events: list[Event] = []
        self.listeners: set[Callable[[], None]] = set()
        self.abandoned = False
        """The page has read events and then gone."""
        self._cancelled = threading.Event()
        self._last_progress = 0.0

    @property
    def ended(self) -> bool:
        return self.state not in ("waiting", "running")

    def emit(self, kind: str, **content: Any) -> None:
        """Append an event and call the listeners."""
        self.events.append({"kind": kind, **content})
        for listener in list(self.listeners):
            listener()

    def check(self) -> None:
        """Raises `Cancelled` if the job was cancelled."""
        if self._cancelled.is_set():
            raise Cancelled

    def progress(self, done: float, total: float) -> None:
        """Emit the fraction that is done, not too often; raises `Cancelled`."""
        self.check()
        now = time.monotonic()
        if now - self._last_progress >= PROGRESS_SECONDS:
            self._last_progress = now
            self.emit("progress", fraction=min(done / max(total, 1), 1.0))

    def request_cancel(self) -> None:
        self._cancelled.set()

    def end(self, state: str, **content: Any) -> None:
        """Set the final ``state`` and emit the last event."""
        if not self.ended:
            self.state = state
            self.emit(state, **content)


class JobQueue:
    """Runs jobs one after the other in a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._ended: deque[Job] = deque(maxlen=MAX_KEPT)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="studio jobs", daemon=True)
        self._thread.start()

    def submit(self, title: str, work: Work) -> Job:
        """Add a job at the end, and cancel those before it that are abandoned.

        Raises `ResourceError` if too many wait, or the queue is closed.
        """
        with self._changed:
            for old in self.jobs():
                if old.abandoned:
                    self.cancel(old)
            if self._closed or len(self._waiting) >= MAX_WAITING:
                cause = "it is stopping" if self._closed else f"{MAX_WAITING} jobs are waiting already"
                raise ResourceError("BUSY", "studio", cause, "Wait for them, or cancel some")
            job = Job(title, work)
            self._waiting.append(job)
            self._announce()
            self._changed.notify_all()
        return job

    def find(self, id: str) -> Job | None:
        """The job with this id, if it is still known."""
        return next((job for job in self.jobs() if job.id == id), None)

    def jobs(self) -> list[Job]:
        """The jobs that ended, that runs, and those that wait, in this order."""
        with self._changed:
            return [*self._ended, *([self._running] if self._running else []), *self._waiting]

    def cancel(self, job: Job) -> None:
        """Cancel a waiting job at once, and a running one at its next network call; an ended one stays as it is."""
        with self._changed:
            job.request_cancel()
            if job in self._waiting:
                self._waiting.remove(job)
                self._ended.append(job)
                job.end("cancelled")
                self._announce()

    def close(self, seconds: float = 10.0) -> None:
        """Cancel all jobs and wait until the thread has ended, ``seconds`` at most."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for job in self.jobs():
            self.cancel(job)
        self._thread.join(seconds)

    def _announce(self) -> None:
        """Tell each waiting job how many are before it; called with the lock held."""
        before = 1 if self._running else 0
        for position, job in enumerate(self._waiting, start=before):
            job.emit("waiting", before=position)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
                job.state = "running"
                job.emit("running")
                self._announce()
            run(job)
            with self._changed:
                self._running = None
                self._ended.append(job)
                self._announce()


def run(job: Job) -> None:
    """Do the work of ``job``; whatever stops it becomes its last event."""
    try:
        job.check()
        result = job.work(job)
        job.end("done", **result)
    except Cancelled:
        job.end("cancelled")
    except UndiffuseError as error:
        job.end("failed", error=str(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            _report_bug(job, error)
        else:
            job.end("failed", error="error[MEMORY] studio: out of memory. Use fewer images or steps.")
    except Exception as error:
        _report_bug(job, error)


def _report_bug(job: Job, error: Exception) -> None:
    """The traceback goes to the terminal, one line to the page: the server continues."""
    traceback.print_exception(error, file=sys.stderr)
    cause = printable(f"{type(error).__name__}: {error}")[:300]
    job.end("failed", error=f"error[BUG] studio: {cause}. The terminal shows where; please report it.")
