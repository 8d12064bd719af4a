"""Files that are written whole or not at all, and the sha256 of files and of plain data."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from undiffuse.errors import ResourceError

REMEDIES = {
    "Free some space": {errno.ENOSPC, errno.EDQUOT, errno.EFBIG},
    "Check the permissions": {errno.EACCES, errno.EPERM, errno.EROFS},
    "Check the path": {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST},
    "Close other programs": {errno.EMFILE, errno.ENFILE, errno.ENOMEM},
}
"""What to do about an error of the operating system, with its numbers."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` as `atomic_file` does."""
    with atomic_file(path, len(content)) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(file.fileno(), rest) :]


def write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write ``rows`` to a CSV file in UTF-8 as `atomic_file` does."""
    with atomic_file(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.writer(text).writerows(rows)
        text.detach()


@contextmanager
def atomic_file(path: Path, size: int = 0) -> Iterator[IO[bytes]]:
    """A binary file that replaces ``path`` when the block ends without an error.

    The bytes go to ``path``.partial, are made durable (fsync), renamed, and the folder is made durable too.
    After an error ``path`` is unchanged and the partial file is removed. An OSError becomes a `ResourceError` with the
    path and the number of bytes: ``size`` where it is given, otherwise those written so far.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
            finally:
                size = size or file.tell()
        os.replace(partial, path)
        fsync_folder(path.parent)
    except OSError as error:
        _remove(partial)
        raise write_error(path, size, error) from None
    except BaseException:
        _remove(partial)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder whose content is that of ``path``, a new or empty folder, when the block ends without an error.

    The files are written into a hidden folder beside ``path``, made durable, and moved. After an error nothing of them
    is left. An OSError becomes a `ResourceError`.
    """
    partial, place = None, path.resolve()  # a path such as . has no name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        content = partial / place.name
        content.mkdir()  # with the usual permissions, which mkdtemp does not give
        yield content
        for file in content.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
        if place.exists():  # empty, and maybe the working folder or a mounted disk: it stays the same folder
            for entry in sorted(content.iterdir()):
                os.replace(entry, place / entry.name)
        else:
            os.replace(content, place)
        fsync_folder(place.parent)
    except OSError as error:
        raise write_error(path, _size(partial), error) from None
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def _size(folder: Path | None) -> int:
    """The bytes of all files below ``folder``."""
    return 0 if folder is None else sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_error(path: Path, size: int, error: OSError) -> ResourceError:
    """The error for a ``path`` whose ``size`` bytes could not be written."""
    cause = f"its {size:,} bytes could not be written ({error.strerror or error})"
    return ResourceError("DISK", path, cause, f"{remedy(error)}; earlier files are unchanged")


def remedy(error: OSError) -> str:
    """What to do about an error of the operating system."""
    return next((fix for fix, numbers in REMEDIES.items() if error.errno in numbers), "Check the disk")


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the system lets this process open a folder: Windows does not."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_digest(data: Any) -> str:
    """sha256 in hex of plain data as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 in hex of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
