"""CSV tables: a line of column names, and numbers in every cell below."""

from __future__ import annotations

import csv
import math
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TextIO

import numpy as np

from undiffuse.data.dataset import Dataset
from undiffuse.data.sources.table_text import encoding_error, open_table, separator_of
from undiffuse.errors import ConfigError, counted, printable
from undiffuse.runtime.file_errors import FileError, file_errors_at

SUFFIXES = (".csv", ".tsv")
LABEL_COLUMNS = ("label", "labels")
LABEL_WORDS = frozenset({*LABEL_COLUMNS, "y", "class", "classes", "target", "targets", "category"})
"""Names, in small letters, of columns that may hold classes: offered unless one of LABEL_COLUMNS is there."""
INDEX_NAME = re.compile(r"(Unnamed: \d+)?")
"""Names of the column in which pandas writes the index of a row: none, or after it was read again, Unnamed: 0."""
FIX = (
    "Give a line of names, and below it one number per column in every line; the column called label, or that of "
    "label_column=NAME, may hold text"
)
MIN_LEVELS = 4096
"""A column whose range has fewer rounding steps of float32 than this gets a note."""
MAX_LINE_LENGTH = 1 << 20
"""In characters."""


def sniff(source: str | Path) -> bool:
    """Whether ``source`` has the extension of a table and exists, not as a folder."""
    return Path(source).suffix.lower() in SUFFIXES and os.path.lexists(source) and not os.path.isdir(source)


def load(source: str | Path, *, label_column: str | None = None) -> Dataset:
    """One item per row: continuous vectors (N, D) with the names of their columns.

    The first line names the columns; they are separated by commas, semicolons or tabs. ``label_column``, or else a
    column called label or labels, holds the classes, as numbers or text. Leading columns without a name that count
    the lines, as pandas writes them, are left out. Raises `DataError` (BAD_HEADER, TABLE, NON_FINITE, LABELS, or the
    file system's) and `ConfigError` (OPTION) for a ``label_column`` that is not there.
    """
    path = Path(source)
    with file_errors_at(path):
        try:
            with open_table(path) as stream:
                return _dataset(path.stem, _limited_lines(stream), label_column)
        except UnicodeError as error:
            raise FileError("TABLE", encoding_error(error), FIX) from None
        except csv.Error as error:
            raise FileError("TABLE", f"cannot be read as a table ({error})", FIX) from None


def _dataset(name: str, lines: Iterator[str], label_column: str | None) -> Dataset:
    first = next(lines, "")
    separator = separator_of(first)
    header = [printable(cell.strip()) for cell in next(csv.reader([first], delimiter=separator), [])]
    indices = list(takewhile(lambda i: INDEX_NAME.fullmatch(header[i]), range(len(header))))
    named = [column for i, column in enumerate(header) if column or i not in indices]
    if not named or len(set(named)) < len(named) or any(not c or _number(c) is not None for c in named):
        raise FileError("BAD_HEADER", "its first line does not name each column once", FIX)
    label_index = _label_index(header, label_column)
    columns = [column for i, column in enumerate(header) if i != label_index]
    if not columns:
        raise FileError("BAD_HEADER", "its only column is that of the labels", FIX)
    cells, label_texts = _cells(csv.reader(lines, delimiter=separator), header, label_index)
    values = np.frombuffer(cells, np.float64).reshape(-1, len(columns))
    if not len(values):
        raise FileError("TABLE", "there is no line below the names", FIX)
    notes = []
    counting = [i for i in indices if i != label_index and _counts_lines(values[:, i])]
    if counting:
        columns, values = columns[len(counting) :], values[:, len(counting) :]
        verb = "counts" if len(counting) == 1 else "count"
        notes.append(f"{counted(len(counting), 'column')} left out that only {verb} the lines (pandas' index)")
    if not columns or "" in columns:
        cause = "its only column counts the lines" if not columns else "its first column has no name"
        raise FileError("BAD_HEADER", cause, "Give each column a name, or write the table without index")
    with np.errstate(over="ignore"):
        packed = np.ascontiguousarray(values, np.float32)
    if len(bad := np.argwhere(~np.isfinite(packed))):
        row, column = map(int, bad[0])
        cause = f"item {row}, column {columns[column]}: {values[row, column]:g} (and {len(bad) - 1} more)"
        raise FileError("NON_FINITE", cause)
    spread, step = values.max(0) - values.min(0), np.spacing(np.abs(packed).max(0))
    if len(coarse := np.flatnonzero((spread > 0) & (spread < MIN_LEVELS * step))):
        rounded = f"column {columns[coarse[0]]} and {len(coarse) - 1} more" if len(coarse) > 1 else columns[coarse[0]]
        notes.append(
            f"stored as float32, which rounds {rounded} to steps of {step[coarse[0]]:.2g} over a range of "
            f"{spread[coarse[0]]:.2g}: subtract a constant first"
        )
    classes, labels = label_classes(label_texts) if label_index is not None else ((), None)
    notes.insert(0, f"{counted(len(columns), 'column')}: {', '.join(columns[:6])}{', ...' * (len(columns) > 6)}")
    if label_index is not None:
        count = counted(len(classes), "class")
        notes.append(f"{count} from the column {header[label_index]}: {', '.join(classes[:6])}")
    elif offered := _offered(columns):
        notes.append(f"no classes; the column {offered} may hold them: label_column={offered} takes it so")
    return Dataset(name, packed, None, labels, classes, tuple(notes), columns=tuple(columns))


def _label_index(header: Sequence[str], label_column: str | None) -> int | None:
    if label_column is None:
        return next((header.index(column) for column in LABEL_COLUMNS if column in header), None)
    if label_column not in header:
        cause = f"{label_column!r} is not one of the columns {', '.join(header[:8])}{', ...' * (len(header) > 8)}"
        raise ConfigError("OPTION", "label_column", cause, "Give the name of the column that holds the classes")
    return header.index(label_column)


def _offered(columns: Sequence[str]) -> str | None:
    """The first column whose name says that it may hold classes."""
    return next((column for column in columns if column.lower() in LABEL_WORDS), None)


def _counts_lines(column: np.ndarray) -> bool:
    """Whether a column holds 0, 1, 2, ... or 1, 2, 3, ..."""
    return column[0] in (0, 1) and np.array_equal(column, np.arange(len(column)) + column[0])


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
                bad.append(f"line {line}, column {header[i] or i + 1}: {cell[:20]!r} is not a number")
            cells.append(math.nan if value is None else value)
    if bad:
        offered = _offered(header) if label_index is None else None
        fix = f"If {offered} holds the classes, give label_column={offered}. {FIX}" if offered else FIX
        raise FileError("TABLE", bad[0] + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""), fix)
    return cells, label_texts


def label_classes(labels: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """(distinct labels, index of each label (N,) int64): by size if all are numbers, otherwise alphabetical.

    Raises `FileError` (LABELS) for empty labels, and for numbers that are equal but written in two ways.
    """
    if "" in labels:
        raise FileError("LABELS", f"{labels.count('')} labels are empty, the first that of item {labels.index('')}")
    classes = sorted(set(labels))
    if all(_number(label) is not None for label in classes):
        classes.sort(key=lambda label: _number(label) or 0.0)
        if same := next((pair for pair in pairwise(classes) if _number(pair[0]) == _number(pair[1])), None):
            cause = f"the labels {printable(same[0])} and {printable(same[1])} are the same number"
            raise FileError("LABELS", cause, "Write equal labels in the same way")
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
