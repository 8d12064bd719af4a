"""What this machine's memory can hold, asked before anything is allocated: a system that runs short kills."""

from __future__ import annotations

import os
from pathlib import Path

from undiffuse.errors import ResourceError

LIMIT = Path("/sys/fs/cgroup/memory.max")
SHARE = 0.8
"""How much of the memory may be asked for at once."""


def available() -> float:
    """Bytes that this process may ask for: 80 % of the machine's memory, or of what a container has of it."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        return SHARE * min(total, float(LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return SHARE * total


def require(need: float, what: str, fix: str = "Give less of it") -> None:
    """Raises `ResourceError` where ``what`` needs more bytes than may be asked for."""
    if need > available():
        cause = f"it needs about {need / 1e9:,.1f} GB of memory, and {available() / 1e9:,.1f} GB may be used here"
        raise ResourceError("MEMORY", what, cause, fix)
