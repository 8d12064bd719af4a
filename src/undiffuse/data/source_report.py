"""What a source of data contains apart from the values, and whether its files are unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from undiffuse.errors import printable
from undiffuse.runtime.atomic_file import write_atomic
from undiffuse.runtime.file_errors import FileError, FileProblem


class FileStamp(NamedTuple):
    """Identity, size and modification time of a file; another stamp means that the file was changed or replaced."""

    device: int
    inode: int
    size: int
    modified: int  # ns

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class SourceReport:
    """Files of a source.

    formats, sizes  number of files of each format, and of each size "width x height"
    ignored         number of files whose names do not mark them as data
    hidden          number of hidden and system files
    skipped         files that could not be used, with the reason
    files           stamps of the files from which values are read at each access
    source          name of a built-in set or absolute path that was read; empty for an array in memory
    options         options that were given, as plain data
    """

    formats: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    ignored: int = 0
    hidden: int = 0
    skipped: tuple[FileProblem, ...] = ()
    files: Mapping[Path, FileStamp] = field(default_factory=dict)
    source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write ``skipped`` to a JSON file, atomically."""
        write_atomic(path, json.dumps(plain_problems(self.skipped), indent=1).encode())

    def check_unchanged(self) -> None:
        """Raise `DataError` (CHANGED_DURING_RUN) if one of ``files`` was changed, replaced or deleted."""
        for path, stamp in self.files.items():
            try:
                same = FileStamp.of(os.stat(path)) == stamp
            except OSError:
                same = False
            if not same:
                raise changed_error().at(path)


def changed_error() -> FileError:
    """The error for a file that is not as it was when the source was listed; `FileError.at` adds its path."""
    return FileError("CHANGED_DURING_RUN", "was changed, replaced or deleted since it was listed")


def plain_problems(problems: Sequence[FileProblem]) -> list[dict[str, Any]]:
    """Path, code and reason of each problem, as data that JSON can represent."""
    return [{"path": printable(str(p.path)), "code": p.code, "reason": printable(p.reason)} for p in problems]
