"""The lock of a folder: one holder at a time, none after a kill, and errors of one line."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from undiffuse.errors import ResourceError
from undiffuse.runtime import folder_lock
from undiffuse.runtime.folder_lock import lock_folder, lock_holder

HOLD = """
import sys, time
from pathlib import Path
from undiffuse.runtime.folder_lock import lock_folder
with lock_folder(Path(sys.argv[1]), "writing into"):
    print("held", flush=True)
    time.sleep(60)
"""


def lock(folder):
    return lock_folder(folder, "writing into")


def test_one_process_holds_it(tmp_path):
    assert lock_holder(tmp_path) is None
    with lock(tmp_path):
        assert lock_holder(tmp_path) == str(os.getpid())
        cause, fix = f"process {os.getpid()} is writing into this folder", "Wait for it, stop it, or give another --out"
        message = rf"^error\[BUSY\] {tmp_path}: {cause}\. {fix}\.$"
        with pytest.raises(ResourceError, match=message), lock(tmp_path):
            raise AssertionError("two holders")
        assert lock_holder(tmp_path) == str(os.getpid())
    assert lock_holder(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_holds_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        assert lock_holder(tmp_path) == str(process.pid)
        with pytest.raises(ResourceError, match=f"process {process.pid} is writing"), lock(tmp_path):
            raise AssertionError("two holders")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert (tmp_path / "lock.pid").read_text() == f"{process.pid}\n"
    assert lock_holder(tmp_path) is None
    with lock(tmp_path):
        assert lock_holder(tmp_path) == str(os.getpid())


def test_a_look_at_the_moment_of_locking_does_not_hinder(tmp_path):
    """`lock_holder` of another process holds the lock for a moment."""
    look = FileLock(tmp_path / "lock", thread_local=False)
    look.acquire()
    threading.Timer(0.03, look.release).start()
    with lock(tmp_path):
        assert not look.is_locked


@pytest.mark.parametrize("text", [None, "", "no number", "12 34"])
def test_a_holder_that_has_not_written_its_number(tmp_path, monkeypatch, text):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    holder = FileLock(tmp_path / "lock")
    with holder.acquire():
        if text is not None:
            (tmp_path / "lock.pid").write_text(text)
        assert lock_holder(tmp_path) == "unknown"
        monkeypatch.setattr(folder_lock.time, "sleep", lambda _: (tmp_path / "lock.pid").write_text("7\n"))
        assert lock_holder(tmp_path) == "7"


def full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", full)
        with pytest.raises(ResourceError, match=r"lock: its 0 bytes could not be written \(No space"), lock(tmp_path):
            raise AssertionError("no lock")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResourceError, match=r"lock\.pid: its \d bytes could not be written \(No space"), lock(tmp_path):
        raise AssertionError("no lock")
    assert lock_holder(tmp_path) is None


def test_a_lock_that_may_not_be_opened(tmp_path, monkeypatch):
    """In another user's folder only the number in the file is known."""
    (tmp_path / "lock").touch()
    monkeypatch.setattr(FileLock, "acquire", full)
    assert lock_holder(tmp_path) is None
    (tmp_path / "lock.pid").write_text("12\n")
    assert lock_holder(tmp_path) == "12"
