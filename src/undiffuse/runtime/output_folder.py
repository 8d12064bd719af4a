"""Folders that results are written into. A record lists our files there, so that no other file is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from undiffuse.errors import ConfigError
from undiffuse.runtime.folder_lock import LOCK_FILES


def listed_files(record: Mapping[str, Any] | None) -> set[str] | None:
    """The names of the ``files`` that a record lists; None without a record."""
    files = None if record is None else record.get("files")
    return set(files) if isinstance(files, dict | list) else None


def check_output_folder(
    folder: Path, record: Path, ours: Collection[str] | None, writes: Collection[str], left: Collection[str] = ()
) -> None:
    """Raise `ConfigError` if writing the files ``writes`` into ``folder`` would mix them with files of the user.

    ``ours`` are the names that the file ``record`` lists. None if there is no such record: then ``folder`` has to be
    new, empty, or what a process left that was killed before it wrote the record: a lock, and the names ``left``.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        cause = "it, or a part of its path, is a file"
        raise ConfigError("OUT", folder, cause, "Give --out a new folder") from None
    except OSError as error:
        raise ConfigError("OUT", folder, f"cannot be read ({error.strerror})", "Give --out a new folder") from None
    if ours is None:
        others = names - {f"{record.name}.partial", *LOCK_FILES, *left}
    else:
        others = names.intersection(writes) - {*ours, record.name}
    if record.name in others:
        cause = f"its {record.name} is damaged, edited or not ours: our files cannot be distinguished from others"
        raise ConfigError("OUT", folder, cause, "Give --out a new folder, or move this one away")
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        cause = f"it holds {min(others)}{more}, which {'were' if more else 'was'} not written by this command"
        raise ConfigError("OUT", folder, cause, "Give --out a new folder")
