"""The memory limit of this machine, checked before large allocations: the system kills a process that exceeds it."""

from __future__ import annotations

from pathlib import Path

import psutil

from undiffuse.errors import ResourceError

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MAX_FRACTION = 0.8
"""Fraction of the memory that one process may use."""


def available_memory() -> float:
    """Bytes that this process may use: 80 % of the machine's memory, or of its container's limit."""
    total = float(psutil.virtual_memory().total)
    try:
        return MAX_FRACTION * min(total, float(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no container, or "max"
        return MAX_FRACTION * total


def require_memory(need: float, what: str, fix: str = "Use less data") -> None:
    """Raise `ResourceError` where ``what`` needs more than `available_memory` bytes."""
    if need > available_memory():
        cause = (
            f"it needs about {need / 1e9:,.1f} GB of memory, and {available_memory() / 1e9:,.1f} GB may be used here"
        )
        raise ResourceError("MEMORY", what, cause, fix)
