"""Captions of images: beside them in files, or as texts of a table's column."""

from __future__ import annotations

import csv
import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from undiffuse.data.sources.folder_labels import FILE_COLUMNS, MAX_LINE_LENGTH, path_key
from undiffuse.data.sources.table_text import encoding_error, open_table, separator_of
from undiffuse.errors import counted, printable
from undiffuse.runtime.file_errors import FIXES, FileError, FileProblem, file_errors_at

TABLES = ("metadata.csv", "metadata.jsonl")
"""Tables of captions, in the folder of the images that they name or above it."""
TEXT_COLUMNS = ("text", "caption", "captions", "texts")
"""Names of a column of captions, in any case; the first that is there is read."""
MAX_CAPTION_BYTES, MAX_CAPTIONS, MAX_TEXT_FILE_BYTES = 1024, 1000, 1 << 20
"""The longest caption in UTF-8, the most captions of an item, and the largest text file beside an image."""
FIX = FIXES["CAPTIONS"]
JSON_FIX = 'Write each line as one object, such as {"file_name": "a.png", "text": "a red disc"}'
LABELS_LEFT_OUT = "left out: captions take their place, and with_labels=True keeps both"
"""The end of a note about labels of data that are read with captions."""

Captions = tuple[str, ...]


def check_captions(texts: Any) -> Captions:
    """The captions of one item: NFC, without spaces at the ends, each once. Raises `FileError` (CAPTIONS)."""
    texts = [texts] if isinstance(texts, str) or texts is None else texts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) or text is None for text in texts):
        raise FileError("CAPTIONS", "its caption is neither text nor a list of texts", FIX)
    if len(texts) > MAX_CAPTIONS:
        raise FileError("CAPTIONS", f"it has {len(texts):,} captions, more than {MAX_CAPTIONS:,}", FIX)
    cleaned = [unicodedata.normalize("NFC", text or "").strip() for text in texts]
    if not texts:
        raise FileError("CAPTIONS", "it has no caption", FIX)
    if not all(cleaned):
        raise FileError("CAPTIONS", "its caption is empty", FIX)
    for text in cleaned:
        try:
            length = len(text.encode())
        except UnicodeEncodeError:
            raise FileError("CAPTIONS", "its caption holds half of a surrogate pair", FIX) from None
        if length > MAX_CAPTION_BYTES:
            raise FileError("CAPTIONS", f"its caption has {length:,} bytes, more than {MAX_CAPTION_BYTES:,}", FIX)
    return tuple(dict.fromkeys(cleaned))


def parse_text(content: bytes) -> Captions:
    """The captions in a text file: its lines that are not empty. Raises `FileError` (CAPTIONS)."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError("CAPTIONS", f"its caption is not text in UTF-8 (byte {error.start:,})", FIX) from None
    return check_captions([line for line in text.splitlines() if line.strip()] or [""])


def captions_of_folder(root: Path, images: Iterable[Path]) -> tuple[dict[Path, Captions], list[FileProblem], set[Path]]:
    """(captions by image, problems, files that were read) of the images in a folder, all below ``root``.

    They come from the `TABLES` in the folders of the images and above, up to ``root``, which name images relative to
    themselves; without any table from a text file beside each image. Raises `DataError` for a table that is not
    readable.
    """
    images = list(images)
    tables = [folder / name for folder in _folders(root, images) for name in TABLES if (folder / name).exists()]
    captions: dict[Path, list[str]] = {}
    problems: list[FileProblem] = []
    bad: set[Path] = set()
    if not tables:
        files = {image: image.with_suffix(".txt") for image in images}
        for image, file in files.items():
            try:
                captions[image] = list(_read_file(file))
            except FileError as error:
                problems.append(FileProblem(image, error.code, error.reason))
        read = {file for file in files.values() if file.is_file()}
        return {image: tuple(texts) for image, texts in captions.items()}, problems, read
    below: dict[Path, list[Path]] = {table.parent: [] for table in tables}
    for image in images:
        for folder in image.parents:
            if folder in below:
                below[folder].append(image)
    for table in tables:
        meant = {path_key(image.relative_to(table.parent).as_posix()): image for image in below[table.parent]}
        with file_errors_at(table):
            rows = list(_rows(table))
        for line, name, texts in rows:
            image = meant.get(path_key(name))
            if image is None:
                reason = f"line {line:,} names no image: {printable(name)[:80]}"
                problems.append(FileProblem(table, "CAPTIONS", reason))
                continue
            try:
                captions.setdefault(image, []).extend(check_captions(texts))
            except FileError as error:
                reason = f"{error.reason} ({table.name}, line {line:,})"
                problems += [FileProblem(image, error.code, reason)] * (image not in bad)
                bad.add(image)
    names = " and ".join(dict.fromkeys(table.name for table in tables))
    for image in images:
        if image not in captions and image not in bad:
            problems.append(FileProblem(image, "CAPTIONS", f"no row of {names} names it"))
        elif image.with_suffix(".txt").is_file():
            problems.append(FileProblem(image, "CAPTIONS", f"both {names} and {image.stem}.txt hold captions of it"))
            bad.add(image)
    kept = {image: tuple(dict.fromkeys(texts)) for image, texts in captions.items() if image not in bad}
    return kept, problems, set(tables)


def captions_note(captions: Sequence[Captions], source: str) -> str:
    """How many captions there are, in one sentence."""
    total = sum(map(len, captions))
    return f"{counted(total, 'caption')} for {counted(len(captions), 'item')} from {source}"


def column_of(columns: Iterable[str]) -> str | None:
    """The column that holds captions, by its name; None without one."""
    lower = {column.lower(): column for column in columns}
    return next((lower[name] for name in TEXT_COLUMNS if name in lower), None)


def _folders(root: Path, images: Iterable[Path]) -> list[Path]:
    """The folders of the images and those above them up to ``root``, in the order of their paths."""
    folders = {folder for image in images for folder in image.parents if folder.is_relative_to(root)}
    return sorted(folders, key=os.fsencode)


def _read_file(file: Path) -> Captions:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError("CAPTIONS", f"{file.name} is a folder, a pipe, a socket or a device", FIX)
        if status.st_size > MAX_TEXT_FILE_BYTES:
            raise FileError("CAPTIONS", f"{file.name} is larger than {MAX_TEXT_FILE_BYTES:,} bytes", FIX)
        return parse_text(file.read_bytes())
    except FileNotFoundError:
        raise FileError(
            "CAPTIONS", f"there is no caption: no {file.name} beside it, and no metadata.csv", FIX
        ) from None
    except OSError as error:
        raise FileError("CAPTIONS", f"{file.name} cannot be read ({error.strerror})", FIX) from None


def _rows(table: Path) -> Iterator[tuple[int, str, Any]]:
    """(line, path of the image, caption or list of captions) of each row. Raises `FileError` (CAPTIONS)."""
    try:
        with open_table(table) as stream:
            yield from (_csv_rows if table.suffix == ".csv" else _json_rows)(stream)
    except UnicodeError as error:
        raise FileError("CAPTIONS", encoding_error(error), "Save the table as UTF-8") from None
    except csv.Error as error:
        raise FileError("CAPTIONS", f"cannot be read as a table ({error})", FIX) from None


def _csv_rows(stream: Any) -> Iterator[tuple[int, str, Any]]:
    first = stream.readline(MAX_LINE_LENGTH)
    separator = separator_of(first)
    header = [cell.strip() for cell in next(csv.reader([first], delimiter=separator), [])]
    lower, text = [cell.lower() for cell in header], column_of(header)
    file = next((lower.index(name) for name in ("file_name", *FILE_COLUMNS) if name in lower), None)
    if file is None or text is None:
        found = printable(first.strip())[:80]
        cause = f"its first line does not name the columns file_name and text: {found!r}"
        raise FileError("CAPTIONS", cause, "Write file_name,text in its first line, and below it a row for each image")
    place, reader, line = header.index(text), csv.reader(stream, delimiter=separator), 2
    try:
        for row in reader:
            if len(row) not in (0, len(header)):
                last = reader.line_num + 1
                rows = f"line {line:,}" if line == last else f"the row of lines {line:,} to {last:,}"
                cause = f"{rows} has {counted(len(row), 'cell')}, and there are {counted(len(header), 'column')}"
                raise FileError("CAPTIONS", cause, "Quote a cell that contains a separator, and close each quote")
            if row:
                yield line, row[file], row[place]
            line = reader.line_num + 2
    except csv.Error as error:
        cause = f"the row that begins in line {line:,} cannot be read ({error})"
        raise FileError("CAPTIONS", cause, "Close each quote, or shorten the cell") from None


def _json_rows(stream: Any) -> Iterator[tuple[int, str, Any]]:
    for line, content in enumerate(iter(lambda: stream.readline(MAX_LINE_LENGTH), ""), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError):
            raise FileError("CAPTIONS", f"line {line:,} is not JSON", JSON_FIX) from None
        keys = {str(key).lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
        name, text = next((keys[key] for key in ("file_name", *FILE_COLUMNS) if key in keys), None), column_of(keys)
        if not isinstance(name, str) or text is None:
            raise FileError("CAPTIONS", f"line {line:,} has no file_name and text", JSON_FIX)
        yield line, name, keys[text]
