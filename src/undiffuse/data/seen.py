"""What a source was seen to hold beside its values, and whether its files are still the same."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from undiffuse.data.problems import Problem, Refused
from undiffuse.errors import printable


class Stamp(NamedTuple):
    """What tells that a file is the one that was listed."""

    device: int
    inode: int
    size: int
    modified: int  # ns

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Seen:
    """``formats`` and ``sizes`` (as "width x height") of files with how many have each; files ``ignored`` (not named
    as data) and ``hidden``; files ``skipped`` with the reason; and ``mapped``, files that values are still read from.
    """

    formats: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    ignored: int = 0
    hidden: int = 0
    skipped: tuple[Problem, ...] = ()
    mapped: Mapping[Path, Stamp] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes ``skipped`` to a JSON file, whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(plain(self.skipped), indent=1), encoding="utf-8")
        os.replace(partial, path)

    def check(self) -> None:
        """Raises DataError (CHANGED_DURING_RUN) where a file that values are read from is no longer what it was."""
        for path, stamp in self.mapped.items():
            try:
                same = Stamp.of(os.stat(path)) == stamp
            except OSError:
                same = False
            if not same:
                raise changed().at(path)


def changed() -> Refused:
    return Refused("CHANGED_DURING_RUN", "was changed, replaced or deleted since it was listed")


def plain(problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """``problems`` as plain data: path, code and reason of each."""
    return [{"path": printable(str(p.path)), "code": p.code, "reason": printable(p.reason)} for p in problems]
