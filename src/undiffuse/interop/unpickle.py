"""A child process: ``python -m undiffuse.interop.unpickle IN OUT`` converts a pickle of weights to safetensors.

torch's weights-only unpickler builds tensors and plain data and refuses every other object without running it; the
process has a limit of memory, as a small file may ask for any amount.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from undiffuse.runtime.machine import available_memory

MAX_ENTRIES, MAX_DEPTH, MAX_NAME = 100_000, 8, 500
"""The most entries of a file, the deepest nesting, the longest name."""


def flatten(content: Any, name: str = "", depth: int = 0) -> dict[str, Any]:
    """The entries of nested tables by their names, joined by ``/``; lists are tables of their numbers."""
    if isinstance(content, list | tuple):
        content = {str(i): value for i, value in enumerate(content)}
    if not isinstance(content, Mapping):
        return {name: content}
    if depth >= MAX_DEPTH:
        raise ValueError(f"its tables are nested deeper than {MAX_DEPTH}")
    entries: dict[str, Any] = {}
    for key, value in content.items():
        entries |= flatten(value, f"{name}/{key}"[:MAX_NAME] if name else str(key)[:MAX_NAME], depth + 1)
        if len(entries) > MAX_ENTRIES:
            raise ValueError(f"it has more than {MAX_ENTRIES:,} entries")
    return entries


def convert(source: str, out: str) -> None:
    """Write the tensors of the pickle ``source`` to ``out``, numbers and strings as JSON in its metadata."""
    entries = flatten(torch.load(source, map_location="cpu", weights_only=True))
    tensors = {
        name: value.detach().clone().contiguous() for name, value in entries.items() if isinstance(value, Tensor)
    }
    facts = {name: value for name, value in entries.items() if isinstance(value, int | float | str | bool)}
    save_file(tensors, out, {"facts": json.dumps(facts)})


def main() -> None:
    """Convert the file of the first argument to that of the second; an error is one line."""
    try:
        import resource

        limit = int(available_memory())
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, ValueError, OSError):
        pass  # Windows has no such limit
    try:
        convert(*sys.argv[1:3])
    except Exception as error:
        reason = " ".join(str(error).split())
        start = reason.find("Unsupported")  # what torch's unpickler met, in a text that recommends to run it
        print(f"{type(error).__name__}: {reason[max(start, 0) :][:200]}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
