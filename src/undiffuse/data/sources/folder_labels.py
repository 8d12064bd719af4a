"""Labels of an image folder: sub-folders of the first level, or a table ``labels.csv``."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from undiffuse.data.sources.table_text import encoding_error, open_table, separator_of
from undiffuse.errors import ConfigError, counted, printable
from undiffuse.runtime.file_errors import FileError, FileProblem

LABELS_FILE = "labels.csv"
FILE_COLUMNS, LABEL_COLUMNS = ("file", "filename", "file_name", "path"), ("label", "labels", "class")
"""Names of its two columns, in any case."""
PARTS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""Names of folders for the parts of a data set, in small letters, in the order of its items."""
FIX = "Give a line with file,label and below it one line for each image: its path within the folder, and its label"
MAX_LINE_LENGTH = 1 << 20
MAX_SPARSE_CLASSES = 1000
"""With more classes than this there must be two images per class on average."""

Labels = tuple[tuple[str, ...], np.ndarray | None, list[str]]
"""Class names, labels (N,) int64 (None without classes), and notes."""


def empty_classes(
    root: Path, paths: Iterable[Path], folders: Sequence[str], broken: Iterable[Path]
) -> list[FileProblem]:
    """A problem for each first-level folder without images, if all images are in first-level folders."""
    image_parts = {path.relative_to(root).parts for path in paths}
    if not image_parts or any(len(parts) == 1 for parts in image_parts):
        return []
    filled = {parts[0] for parts in image_parts} | {path.relative_to(root).parts[0] for path in broken if path != root}
    empty = sorted(set(folders) - filled, key=os.fsencode)
    return [FileProblem(root / name, "EMPTY_CLASS", "contains no images, unlike its neighbours") for name in empty]


def part_of(root: Path, path: Path) -> str | None:
    """The key of PARTS that names the first-level folder in which a file lies; None for others."""
    first, *rest = path.relative_to(root).parts
    return part_called(first) if rest else None


def part_called(name: str) -> str | None:
    """The key of PARTS with this ``name`` of a folder or shard."""
    return next((part for part, names in PARTS.items() if name.lower() in names), None)


def check_parts(root: Path, paths: Iterable[Path]) -> None:
    """Raise `ConfigError` unless all images are in folders of PARTS, of which there are training images and others."""
    parts, outside = set(), []
    for path in paths:
        part = part_of(root, path)
        parts.add(part)
        outside += [path] * (part is None)
    if outside or not parts > {"train"}:
        found = f"{outside[0].relative_to(root).as_posix()} is in none" if outside else "there are no two of them"
        cause = f"the images are not all in folders called {', '.join(names[0] for names in PARTS.values())}: {found}"
        raise ConfigError("OPTION", "split_folders", printable(cause), "Leave it out, or move the images")


def parts_note(root: Path, paths: Iterable[Path]) -> list[str]:
    """A warning if training images and others are read as one data set."""
    folders = {path.relative_to(root).parts[0] for path in paths if part_of(root, path)}
    if len(set(map(part_called, folders))) < 2:
        return []
    listed = " and ".join(map(printable, sorted(folders)))
    return [f"the folders {listed} are read as one data set, not as its parts; split_folders=True takes them as such"]


def labels_from_folders(root: Path, paths: Sequence[Path], in_parts: bool = False) -> Labels:
    """The sub-folders of the first level are classes, if there are at least two and each image is in one.

    With ``in_parts`` it is those of the second level, within the folders of PARTS.
    """
    parts = [path.relative_to(root).parts[in_parts:] for path in paths]
    outside = sum(len(p) == 1 for p in parts)
    if outside:
        return (
            (),
            None,
            [f"no labels: {counted(outside, 'image')} outside of all sub-folders"] if outside < len(parts) else [],
        )
    names = sorted({p[0] for p in parts}, key=os.fsencode)
    if len(names) == 1:
        return (), None, ["no labels: all images are in one sub-folder"]
    return indexed_labels([p[0] for p in parts], names, "sub-folders")


def labels_from_table(root: Path, paths: Sequence[Path], skipped: Iterable[Path]) -> Labels:
    """Labels from the table, with one row per image: ``file`` (its path from ``root``) and ``label``.

    Columns may be separated by semicolons or tabs and have the names of FILE_COLUMNS and LABEL_COLUMNS; a path may have
    backslashes and another Unicode normal form than the file, where only one file can be meant. Rows of ``skipped``
    images are ignored. Raises `FileError` (LABELS) with the first five files that are wrong.
    """
    names = [path.relative_to(root).as_posix() for path in paths]
    existing = {*names, *(path.relative_to(root).as_posix() for path in skipped)}
    with_key: dict[str, list[str]] = {}
    for name in sorted(existing):
        with_key.setdefault(path_key(name), []).append(name)
    label_of: dict[str, str] = {}
    repeated, missing, unclear = [], [], []
    for name, label in _rows(root / LABELS_FILE):
        meant = [name] if name in existing else with_key.get(path_key(name), [])
        if len(meant) != 1:
            (unclear if meant else missing).append(name)
        elif label_of.setdefault(meant[0], label) != label:
            repeated.append(meant[0])
    _refuse_any("two different labels", repeated)
    _refuse_any("several images that differ only in their Unicode form", unclear)
    _refuse_any("no such image", missing, _other_case(missing, existing))
    _refuse_any("no row", [name for name in names if name not in label_of])
    _refuse_any("an empty label", [name for name in names if not label_of[name]])
    classes = sorted({label_of[name] for name in names})
    if len(classes) > MAX_SPARSE_CLASSES and len(names) < 2 * len(classes):
        raise FileError("LABELS", f"{len(classes):,} classes for {len(names):,} images{_first(classes)}", FIX)
    return indexed_labels([label_of[name] for name in names], classes, LABELS_FILE)


def path_key(name: str) -> str:
    """A path as all spellings of it share it."""
    return unicodedata.normalize("NFC", name.replace("\\", "/").removeprefix("./"))


def _other_case(missing: Sequence[str], existing: Iterable[str]) -> str:
    """A hint at the file that the first missing name means if small and capital letters are not distinguished."""
    wanted = path_key(missing[0]).casefold() if missing else None
    close = next((name for name in sorted(existing) if path_key(name).casefold() == wanted), None)
    return f" ({printable(close)} is there)" if close else ""


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """(path, label) of each row, the label in the normal form NFC, so that equal texts are one class."""
    try:
        with open_table(table) as stream:
            first = stream.readline(MAX_LINE_LENGTH)
            separator = separator_of(first)
            header = [cell.strip().lower() for cell in next(csv.reader([first], delimiter=separator), [])]
            file, label, length = _place(header, FILE_COLUMNS), _place(header, LABEL_COLUMNS), len(header)
            if file is None or label is None:
                found = printable(first.strip())[:80]
                raise FileError("LABELS", f"its first line does not name the columns file and label: {found!r}", FIX)
            for line, row in enumerate(csv.reader(stream, delimiter=separator), 2):
                if len(row) not in (0, length):
                    cause = f"line {line} has {len(row)} cells, and there are {length} columns"
                    raise FileError("LABELS", cause, f"{FIX}; quote a cell that contains a separator")
                if row:
                    yield row[file].removeprefix("./"), unicodedata.normalize("NFC", row[label].strip())
    except UnicodeError as error:
        raise FileError("LABELS", encoding_error(error), "Save the table as UTF-8") from None
    except csv.Error as error:
        raise FileError("LABELS", f"cannot be read as a table ({error})", FIX) from None


def _place(header: list[str], names: Sequence[str]) -> int | None:
    """The column with the first of the ``names``, or else with the only other one; None if that is unclear."""
    found = [name for name in names if header.count(name) == 1]
    return header.index(found[0]) if found[:1] == [names[0]] or len(found) == 1 else None


def _refuse_any(problem: str, names: Sequence[str], hint: str = "") -> None:
    if names:
        raise FileError("LABELS", f"{problem} for {counted(len(names), 'file')}{_first(names)}{hint}", FIX)


def _first(names: Sequence[str]) -> str:
    return f": {', '.join(map(printable, names[:5]))}" + ", ..." * (len(names) > 5)


def indexed_labels(labels: Sequence[str], classes: Sequence[str], source: str) -> Labels:
    """(``classes``, the number of each of the ``labels``, a note with their counts), ``source`` in words."""
    index, counts = {name: i for i, name in enumerate(classes)}, Counter(labels)
    listed = ", ".join(f"{printable(name)} ({counts[name]})" for name in classes[:5]) + ", ..." * (len(classes) > 5)
    indices = np.array([index[label] for label in labels], np.int64)
    return tuple(map(printable, classes)), indices, [f"{counted(len(classes), 'class')} from {source}: {listed}"]
