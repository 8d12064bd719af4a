"""A run in training, from the files that it writes; the run itself is not touched."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from undiffuse.errors import ResourceError
from undiffuse.studio.commands import command
from undiffuse.training.run_folder import Run

MAX_RECORDS = 2000
"""Records of metrics that the page gets, spread evenly."""
MAX_PICTURE_BYTES = 64 << 20


def training_state(run: Run) -> dict[str, Any]:
    """State, length, records and pictures of ``run``. Raises `CheckpointError` if its folder holds no run."""
    record, records = run.require_record(), run.read_metrics()
    pid = run.training_pid
    settings = record["config"]["train"]
    stride = -(-len(records) // MAX_RECORDS) or 1
    return {
        "state": "finished" if record["finished"] else "training" if pid else "stopped",
        "data": record["data"].get("name", "data"),
        "items": record["data"].get("items"),
        "max_steps": settings.get("max_steps"),
        "minutes": settings.get("minutes"),
        "records": [
            {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no NaN
            for record in records[::-1][::stride][::-1]
        ],
        "pictures": [path.name for path in pictures_of(run)],
        "command": command("watch", run.folder),
    }


def pictures_of(run: Run) -> list[Path]:
    """The PNG files directly in the run's folder of pictures, by name; none where the folder or the file is a link."""
    try:
        if run.pictures.is_symlink():
            return []
        paths = [path for path in run.pictures.iterdir() if path.suffix == ".png" and not path.is_symlink()]
    except OSError:
        return []
    return sorted(path for path in paths if path.is_file())


def read_picture(path: Path) -> bytes:
    """The content of a picture; a link that has taken its place, or that of its folder, is not followed.

    Raises `ResourceError`.
    """
    flags, folder = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0), None
    try:
        if os.open in os.supports_dir_fd:
            folder = os.open(path.parent, flags)
        descriptor = os.open(path if folder is None else path.name, flags, dir_fd=folder)
        with open(descriptor, "rb") as file:
            return file.read(MAX_PICTURE_BYTES)
    except OSError as error:
        raise ResourceError("UNREADABLE", path, f"cannot be read ({error.strerror})", "Load the page again") from None
    finally:
        if folder is not None:
            os.close(folder)
