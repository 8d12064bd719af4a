"""CSV tables: a line of column names, and numbers in every cell below."""

from __future__ import annotations

import csv
import math
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from undiffuse.data.dataset import Dataset
from undiffuse.errors import printable
from undiffuse.runtime.file_errors import FileError, file_errors_at

SUFFIXES = (".csv", ".tsv")
SEPARATORS = ",;\t"
LABEL_COLUMNS = ("label", "labels", "y")
FIX = "Give a line of names, and below it one number per column in every line; a column called label may hold text"
MAX_LINE_LENGTH = 1 << 20
"""In characters."""


def sniff(source: str | Path) -> bool:
    """Whether ``source`` has the extension of a table and exists, not as a folder."""
    return Path(source).suffix.lower() in SUFFIXES and os.path.lexists(source) and not os.path.isdir(source)


def load(source: str | Path) -> Dataset:
    """One item per row: continuous vectors (N, D) with the names of their columns.

    The first line names the columns; they are separated by commas, semicolons or tabs. A column called label, labels
    or y holds the classes, as numbers or text. Raises `DataError` (BAD_HEADER, TABLE, NON_FINITE, LABELS, or the file
    system's).
    """
    path = Path(source)
    with file_errors_at(path):
        if not path.is_file():
            raise FileError("NOT_A_REGULAR_FILE", "is a folder, a pipe, a socket or a device")
        try:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                return _dataset(path.stem, _limited_lines(stream))
        except UnicodeDecodeError as error:
            raise FileError("TABLE", f"is not UTF-8 text (byte {error.start:,})", FIX) from None
        except csv.Error as error:
            raise FileError("TABLE", f"cannot be read as a table ({error})", FIX) from None


def _dataset(name: str, lines: Iterator[str]) -> Dataset:
    first = next(lines, "")
    separator = max(SEPARATORS, key=first.count)
    header = [printable(cell.strip()) for cell in next(csv.reader([first], delimiter=separator), [])]
    if not header or len(set(header)) < len(header) or any(not c or _number(c) is not None for c in header):
        raise FileError("BAD_HEADER", "its first line does not name each column once", FIX)
    label_index = next((header.index(column) for column in LABEL_COLUMNS if column in header), None)
    columns = [column for i, column in enumerate(header) if i != label_index]
    if not columns:
        raise FileError("BAD_HEADER", "its only column is that of the labels", FIX)
    cells, label_texts = _cells(csv.reader(lines, delimiter=separator), header, label_index)
    values = np.frombuffer(cells, np.float64).reshape(-1, len(columns))
    if not len(values):
        raise FileError("TABLE", "there is no line below the names", FIX)
    with np.errstate(over="ignore"):
        packed = values.astype(np.float32)
    if len(bad := np.argwhere(~np.isfinite(packed))):
        row, column = map(int, bad[0])
        cause = f"item {row}, column {columns[column]}: {values[row, column]:g} (and {len(bad) - 1} more)"
        raise FileError("NON_FINITE", cause)
    classes, labels = label_classes(label_texts) if label_index is not None else ((), None)
    notes = [f"{len(columns)} columns: {', '.join(columns[:6])}{', ...' * (len(columns) > 6)}"]
    if label_index is not None:
        notes.append(f"{len(classes)} classes from the column {header[label_index]}: {', '.join(classes[:6])}")
    return Dataset(name, packed, None, labels, classes, tuple(notes), columns=tuple(columns))


def _cells(rows: Iterator[list[str]], header: list[str], label_index: int | None) -> tuple[array[float], list[str]]:
    """(all numbers, line by line; all labels); raises `FileError` with the first cell that is not a number."""
    cells, label_texts, bad = array("d"), [], []
    for line, row in enumerate(rows, 2):
        if not row:
            continue  # an empty line
        if len(row) != len(header):
            raise FileError("TABLE", f"line {line} has {len(row)} cells, and there are {len(header)} columns", FIX)
        for i, cell in enumerate(row):
            if i == label_index:
                label_texts.append(printable(cell.strip()))
                continue
            value = _number(cell)
            if value is None:
                bad.append(f"line {line}, column {header[i]}: {cell[:20]!r} is not a number")
            cells.append(math.nan if value is None else value)
    if bad:
        raise FileError("TABLE", bad[0] + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""), FIX)
    return cells, label_texts


def label_classes(labels: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """(distinct labels, index of each label (N,) int64): by size if all are numbers, otherwise alphabetical."""
    if "" in labels:
        raise FileError("LABELS", f"{labels.count('')} labels are empty, the first that of item {labels.index('')}")
    classes = sorted(set(labels))
    if all(_number(label) is not None for label in classes):
        classes.sort(key=lambda label: _number(label) or 0.0)
    index = {label: i for i, label in enumerate(classes)}
    return tuple(classes), np.array([index[label] for label in labels], np.int64)


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _limited_lines(stream: TextIO) -> Iterator[str]:
    """The lines of ``stream``; raises `FileError` at one of more than MAX_LINE_LENGTH characters."""
    while line := stream.readline(MAX_LINE_LENGTH + 1):
        if len(line) > MAX_LINE_LENGTH:
            raise FileError("TABLE", f"a line has more than {MAX_LINE_LENGTH:,} characters", FIX)
        yield line
