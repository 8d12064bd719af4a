"""Run a function in a forked child: as another user, within limits of memory and time."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

NOBODY = 65534


def forget(*packages: str) -> None:
    """Forget that modules of ``packages`` were imported, so that a child imports them as a new process does."""
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]


def in_child(work: Callable[[], Any], seconds: float = 60, user: int | None = None, memory: int | None = None) -> Any:
    """The plain data that ``work()`` returns, run by a child as ``user`` with at most ``memory`` more bytes.

    AssertionError if it raises, is killed by a signal or takes longer than ``seconds``.
    """
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(out)
            if memory is not None:
                with open("/proc/self/statm") as file:
                    has = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (has + memory, has + memory))
            if user is not None:
                os.setgroups([])
                os.setegid(user)
                os.seteuid(user)
            outcome = {"result": work()}
        except BaseException:
            outcome = {"error": traceback.format_exc()}
        with os.fdopen(into, "w") as file:
            json.dump(outcome, file)
        os._exit(0)
    os.close(into)
    end, text = time.monotonic() + seconds, b""
    with os.fdopen(out, "rb", buffering=0) as file:
        while True:
            ready, _, _ = select.select([file], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                break
            if not (more := file.read(1 << 16)):
                break
            text += more
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"killed by signal {os.WTERMSIG(status)}, after {text[-200:]!r}"
    outcome = json.loads(text)
    assert "error" not in outcome, outcome["error"]
    return outcome["result"]
