"""A lock on a folder, so that one process at a time writes into it, and which process that is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from undiffuse.errors import ResourceError
from undiffuse.runtime.atomic_file import write_error

LOCK_FILES = ("lock.pid", "lock")
"""The number of the process that locked the folder, and the file that is locked, in the order of their removal."""
PATIENCE, INTERVAL = 0.1, 0.01
"""Seconds for which locking is tried, and between two attempts: `lock_holder` of another process locks for a moment."""


@contextmanager
def lock_folder(folder: Path, activity: str) -> Iterator[None]:
    """Hold the lock of ``folder``, which exists, as a block that ends it; a killed process releases it.

    Raises `ResourceError`, with the code BUSY if another process holds it: "process N is ``activity`` this folder".
    """
    lock, pid = FileLock(folder / "lock"), folder / "lock.pid"
    try:
        lock.acquire(timeout=PATIENCE, poll_interval=INTERVAL)
    except Timeout:
        cause = f"process {_read_pid(pid)} is {activity} this folder"
        raise ResourceError("BUSY", folder, cause, "Wait for it, stop it, or give another --out") from None
    except OSError as error:
        raise write_error(folder / "lock", 0, error) from None
    try:
        try:
            pid.write_text(f"{os.getpid()}\n")
        except OSError as error:
            raise write_error(pid, len(str(os.getpid())) + 1, error) from None
        yield
    finally:
        for name in LOCK_FILES:  # once "lock" is removed, "lock.pid" may be that of the next process
            with suppress(OSError):  # Windows removes a locked file only after its release, and filelock does it
                (folder / name).unlink()
        lock.release()


def lock_holder(folder: Path) -> str | None:
    """The number of the process that holds the lock of ``folder``; None if no process does, whatever the files say.

    Where the lock may not be opened for writing, as in another user's folder, it is the number in the file.
    """
    lock, pid = folder / "lock", folder / "lock.pid"
    if not lock.is_file():
        return None
    try:
        with FileLock(lock).acquire(timeout=PATIENCE, poll_interval=INTERVAL):
            return None
    except Timeout:
        return _read_pid(pid)
    except OSError:
        return _read_pid(pid) if pid.is_file() else None


def _read_pid(path: Path) -> str:
    """The number that the holder of the lock writes just after locking."""
    for _ in range(100):
        with suppress(OSError, ValueError):
            return str(int(path.read_text()))
        time.sleep(0.01)
    return "unknown"
