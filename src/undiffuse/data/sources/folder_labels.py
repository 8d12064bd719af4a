"""Labels of an image folder: sub-folders of the first level, or a table ``labels.csv``."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from undiffuse.errors import printable
from undiffuse.runtime.file_errors import FileError, FileProblem

LABELS_FILE = "labels.csv"
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


def labels_from_folders(root: Path, paths: Sequence[Path]) -> Labels:
    """The sub-folders of the first level are classes, if there are at least two and each image is in one."""
    parts = [path.relative_to(root).parts for path in paths]
    outside = sum(len(p) == 1 for p in parts)
    if outside:
        return (), None, [f"no labels: {outside} images are not in a sub-folder"] if outside < len(parts) else []
    names = sorted({p[0] for p in parts}, key=os.fsencode)
    if len(names) == 1:
        return (), None, ["no labels: all images are in one sub-folder"]
    return _indexed([p[0] for p in parts], names, "sub-folders")


def labels_from_table(root: Path, paths: Sequence[Path], skipped: Iterable[Path]) -> Labels:
    """Labels from the table, with one row per image: ``file`` (its path from ``root``) and ``label``.

    Rows of ``skipped`` images are ignored. Raises `FileError` (LABELS) with the first five files that are wrong.
    """
    label_of: dict[str, str] = {}
    repeated: list[str] = []
    for name, label in _rows(root / LABELS_FILE):
        if label_of.setdefault(name, label) != label:
            repeated.append(name)
    names = [path.relative_to(root).as_posix() for path in paths]
    existing = {*names, *(path.relative_to(root).as_posix() for path in skipped)}
    _refuse_any("two different labels", repeated)
    _refuse_any("no such image", [name for name in label_of if name not in existing])
    _refuse_any("no row", [name for name in names if name not in label_of])
    _refuse_any("an empty label", [name for name in names if not label_of[name]])
    classes = sorted({label_of[name] for name in names})
    if len(classes) > MAX_SPARSE_CLASSES and len(names) < 2 * len(classes):
        raise FileError("LABELS", f"{len(classes):,} classes for {len(names):,} images{_first(classes)}")
    return _indexed([label_of[name] for name in names], classes, LABELS_FILE)


def _rows(table: Path) -> Iterable[tuple[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise FileError("LABELS", "its first line does not name the columns file and label")
            for row in reader:
                yield (row["file"] or "").removeprefix("./"), (row["label"] or "").strip()
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileError("LABELS", f"cannot be read as a table ({error})") from None


def _refuse_any(problem: str, names: Sequence[str]) -> None:
    if names:
        raise FileError("LABELS", f"{problem} for {len(names)} file{'s' * (len(names) > 1)}{_first(names)}")


def _first(names: Sequence[str]) -> str:
    return f": {', '.join(map(printable, names[:5]))}" + ", ..." * (len(names) > 5)


def _indexed(labels: Sequence[str], classes: Sequence[str], source: str) -> Labels:
    index, counts = {name: i for i, name in enumerate(classes)}, Counter(labels)
    listed = ", ".join(f"{printable(name)} ({counts[name]})" for name in classes[:5]) + ", ..." * (len(classes) > 5)
    indices = np.array([index[label] for label in labels], np.int64)
    return tuple(map(printable, classes)), indices, [f"{len(classes)} classes from {source}: {listed}"]
