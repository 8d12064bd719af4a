"""Which class each image of a folder is of: by sub-folders of the first level, or by a table ``labels.csv``."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from undiffuse.data.problems import Problem, Refused
from undiffuse.errors import printable

TABLE = "labels.csv"
MANY = 1000
"""Classes of which each needs two images on average; fewer are taken as they are."""

Labelled = tuple[tuple[str, ...], np.ndarray | None, list[str]]
"""Names of classes, labels (N,) int64 and notes."""


def empty_classes(root: Path, files: Iterable[Path], folders: Sequence[str], broken: Iterable[Path]) -> list[Problem]:
    """A problem for each of the first level's ``folders`` without an image, where all images are in its neighbours."""
    first = {path.relative_to(root).parts for path in files}
    names = {parts[0] for parts in first} | {path.relative_to(root).parts[0] for path in broken if path != root}
    if not first or any(len(parts) == 1 for parts in first):
        return []
    empty = sorted(set(folders) - names, key=os.fsencode)
    return [Problem(root / name, "EMPTY_CLASS", "holds no images, but its neighbours do") for name in empty]


def by_folder(root: Path, files: Sequence[Path]) -> Labelled:
    """The first level's sub-folders, where there are at least two and every one of ``files`` is in one."""
    parts = [path.relative_to(root).parts for path in files]
    loose = sum(len(p) == 1 for p in parts)
    if loose:
        return (), None, [f"no labels: {loose} images lie outside sub-folders"] if loose < len(parts) else []
    names = sorted({p[0] for p in parts}, key=os.fsencode)
    if len(names) == 1:
        return (), None, ["no labels: all images are in one sub-folder"]
    return _numbered([p[0] for p in parts], names, "sub-folders")


def by_table(root: Path, files: Sequence[Path], bad: Iterable[Path]) -> Labelled:
    """The labels that the table says, a row for each image: ``file`` (its path from ``root``) and ``label``.

    Rows of ``bad`` files are let be. Refused (LABELS) with the first five offenders.
    """
    said: dict[str, str] = {}
    twice: list[str] = []
    for name, label in _rows(root / TABLE):
        if said.setdefault(name, label) != label:
            twice.append(name)
    names = [path.relative_to(root).as_posix() for path in files]
    there = {*names, *(path.relative_to(root).as_posix() for path in bad)}
    _refuse_any("has two labels", twice)
    _refuse_any("names no image here", [name for name in said if name not in there])
    _refuse_any("has no row", [name for name in names if name not in said])
    _refuse_any("has an empty label", [name for name in names if not said[name]])
    classes = sorted({said[name] for name in names})
    if len(classes) > MANY and len(names) < 2 * len(classes):
        raise Refused("LABELS", f"{len(classes):,} classes of {len(names):,} images{_first(classes)}")
    return _numbered([said[name] for name in names], classes, TABLE)


def _rows(table: Path) -> Iterable[tuple[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise Refused("LABELS", "its first line does not name the columns file and label")
            for row in reader:
                yield (row["file"] or "").removeprefix("./"), (row["label"] or "").strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refused("LABELS", f"cannot be read as a table ({error})") from None


def _refuse_any(what: str, names: Sequence[str]) -> None:
    if names:
        raise Refused("LABELS", f"{len(names)} {'file' if len(names) == 1 else 'files'}: {what}{_first(names)}")


def _first(names: Sequence[str]) -> str:
    return f": {', '.join(map(printable, names[:5]))}" + ", ..." * (len(names) > 5)


def _numbered(each: Sequence[str], names: Sequence[str], source: str) -> Labelled:
    number, counts = {name: label for label, name in enumerate(names)}, Counter(each)
    shown = ", ".join(f"{printable(name)} ({counts[name]})" for name in names[:5]) + ", ..." * (len(names) > 5)
    labels = np.array([number[name] for name in each], np.int64)
    return tuple(map(printable, names)), labels, [f"{len(names)} classes from {source}: {shown}"]
