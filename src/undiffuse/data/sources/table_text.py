"""Tables as text: their encoding and their separator, found in the file."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from undiffuse.runtime.file_errors import FileError

SEPARATORS = ",;\t"


def open_table(path: Path) -> TextIO:
    """The text of a table in UTF-8, or in UTF-16 as spreadsheets save it, with or without a byte-order mark.

    Raises `FileError` (NOT_A_REGULAR_FILE) for pipes and devices, which could be read without end.
    """
    if not path.is_file():
        raise FileError("NOT_A_REGULAR_FILE", "is a folder, a pipe, a socket or a device")
    with path.open("rb") as stream:
        start = stream.read(2)
    encoding = "utf-8-sig"
    if start in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif len(start) == 2 and b"\0" in start and start != b"\0\0":
        encoding = "utf-16-le" if start[1] == 0 else "utf-16-be"
    return path.open(encoding=encoding, newline="")


def separator_of(line: str) -> str:
    """The separator that occurs most often in a line of column names."""
    return max(SEPARATORS, key=line.count)


def encoding_error(error: UnicodeError) -> str:
    """The cause of an error for text in another encoding."""
    place = f" (byte {error.start:,})" if isinstance(error, UnicodeDecodeError) else ""
    return f"is not text in UTF-8 or UTF-16{place}"
