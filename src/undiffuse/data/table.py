"""Tables as a data set: a text file with a line of names and a number in every cell below."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from undiffuse.data.dataset import Dataset
from undiffuse.data.problems import Refused, refusal
from undiffuse.errors import printable

SUFFIXES = (".csv", ".tsv")
SEPARATORS = ",;\t"
LABEL = ("label", "labels", "y")
FIX = "Give a line of names, and below it as many numbers in every line; a column called label may hold words"
LONGEST = 1 << 20
"""Characters that a line may have."""


def load_table(path: str | Path) -> Dataset:
    """A row an item: continuous vectors (N, D) with the names of their columns.

    The first line names the columns; commas, semicolons or tabs part them. A column called label, labels or y holds
    the classes, numbers or words. DataError with code BAD_HEADER, TABLE, NON_FINITE or the file system's.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise Refused("NOT_A_REGULAR_FILE", "is a folder, a pipe, a socket or a device")
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return _dataset(path.stem, _short(lines))
    except UnicodeDecodeError as error:
        raise Refused("TABLE", f"is no text in UTF-8 (byte {error.start:,})", FIX).at(path) from None
    except csv.Error as error:
        raise Refused("TABLE", f"cannot be read as a table ({error})", FIX).at(path) from None
    except OSError as error:
        raise refusal(error).at(path) from error
    except Refused as refused:
        raise refused.at(path) from None


def _dataset(name: str, lines: Iterator[str]) -> Dataset:
    first = next(lines, "")
    separator = max(SEPARATORS, key=first.count)
    names = [printable(name.strip()) for name in next(csv.reader([first], delimiter=separator), [])]
    if not names or len(set(names)) < len(names) or any(not name or _number(name) is not None for name in names):
        raise Refused("BAD_HEADER", "its first line does not name each column once", FIX)
    label = next((names.index(name) for name in LABEL if name in names), None)
    columns = [name for i, name in enumerate(names) if i != label]
    if not columns:
        raise Refused("BAD_HEADER", "it has no column but that of the labels", FIX)
    cells, words = _cells(csv.reader(lines, delimiter=separator), names, label)
    values = np.frombuffer(cells, np.float64).reshape(-1, len(columns))
    if not len(values):
        raise Refused("TABLE", "it has no line below the names", FIX)
    with np.errstate(over="ignore"):
        packed = values.astype(np.float32)
    if len(bad := np.argwhere(~np.isfinite(packed))):
        row, column = map(int, bad[0])
        cause = f"item {row}, column {columns[column]}: {values[row, column]:g} (and {len(bad) - 1} more)"
        raise Refused("NON_FINITE", cause)
    classes, labels = named(words) if label is not None else ((), None)
    notes = [f"{len(columns)} columns: {', '.join(columns[:6])}{', ...' * (len(columns) > 6)}"]
    if label is not None:
        notes.append(f"{len(classes)} classes from the column {names[label]}: {', '.join(classes[:6])}")
    return Dataset(name, packed, None, labels, classes, tuple(notes), columns=tuple(columns))


def _cells(rows: Iterator[list[str]], names: list[str], label: int | None) -> tuple[array[float], list[str]]:
    """All numbers line by line, and the labels; Refused where a cell is no number, with a count of such cells."""
    cells, words, bad = array("d"), [], []
    for number, row in enumerate(rows, 2):
        if not row:
            continue  # an empty line
        if len(row) != len(names):
            raise Refused("TABLE", f"line {number} has {len(row)} cells, and there are {len(names)} columns", FIX)
        for i, cell in enumerate(row):
            if i == label:
                words.append(printable(cell.strip()))
                continue
            value = _number(cell)
            if value is None:
                bad.append(f"line {number}, column {names[i]}: {cell[:20]!r} is no number")
            cells.append(math.nan if value is None else value)
    if bad:
        raise Refused("TABLE", bad[0] + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""), FIX)
    return cells, words


def named(words: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The distinct ``words``, numbers in the order of size, and which each is."""
    if "" in words:
        raise Refused("LABELS", f"{words.count('')} are empty, first that of item {words.index('')}")
    distinct = sorted(set(words))
    by_size = all(_number(word) is not None for word in distinct)
    order = sorted(distinct, key=lambda word: _number(word) or 0.0) if by_size else distinct
    number = {word: i for i, word in enumerate(order)}
    return tuple(order), np.array([number[word] for word in words], np.int64)


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _short(lines: TextIO) -> Iterator[str]:
    """The ``lines``, unless one is longer than a table's: then it is some other file."""
    while line := lines.readline(LONGEST + 1):
        if len(line) > LONGEST:
            raise Refused("TABLE", f"a line has more than {LONGEST:,} characters", FIX)
        yield line
