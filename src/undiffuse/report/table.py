"""Tables and bar charts of text, for a terminal, a pipe or a file."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from undiffuse.errors import printable
from undiffuse.runtime.terminal import make_console


def render(rows: Sequence[Mapping[str, Any]], title: str = "", file: IO[str] | None = None) -> None:
    """Prints ``rows`` under the names of their fields, in order of first appearance; missing fields are blank.

    Cells are formatted by `cell`; numbers are aligned to the right. Output goes to ``file``, by default standard
    output, without colour codes, wrapping and spaces at the ends of lines unless it is a terminal.
    """
    out = sys.stdout if file is None else file
    terminal = out.isatty()
    console = make_console(out, force_terminal=terminal, width=None if terminal else 10_000)
    table = Table(title=Text(printable(title), "bold") if title else None, title_justify="left", box=SIMPLE_HEAD)
    for name in dict.fromkeys(name for row in rows for name in row):
        has_text = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(Text(printable(name)), justify="left" if has_text else "right")
    for row in rows:
        table.add_row(*(Text(cell(row.get(str(column.header)))) for column in table.columns))
    if terminal:
        console.print(table)
        return
    with console.capture() as printed:
        console.print(table)
    out.write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))


def cell(value: Any) -> str:
    """``value`` as text: (value, stderr) as value ± stderr to the error's second digit, floats to four digits.

    A stderr that is NaN is left out.
    """
    if value is None:
        return ""
    if isinstance(value, tuple):
        mean, stderr = value
        if math.isnan(stderr):  # of a single item
            return f"{mean:.3f}"
        meaningful = 1e-12 * abs(mean) < stderr < math.inf  # else it is 0 or a rounding error
        digits = 1 - math.floor(math.log10(stderr)) if meaningful else 3
        if digits > MAX_DECIMALS:
            return f"{mean:.3g} ± {stderr:.1g}"
        return f"{mean:.{max(0, digits)}f} ± {stderr:.{max(0, digits)}f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value)) if isinstance(value, str) else f"{value:,}"


MAX_DECIMALS = 8
"""Digits after the point of a number with an error; smaller numbers have an exponent."""
BARS, MAX_BARS = "▁▂▃▄▅▆▇█", 40


def spark(values: Sequence[float]) -> str:
    """``values`` as at most `MAX_BARS` bars, the means of equal parts; blank where a part has no finite value."""
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return ""
    parts = [part[np.isfinite(part)] for part in np.array_split(numbers, min(MAX_BARS, len(numbers)))]
    means = np.array([part.mean() if len(part) else np.nan for part in parts])
    if not np.isfinite(means).any():
        return " " * len(means)
    low, high = np.nanmin(means), np.nanmax(means)
    height = (means - low) / (high - low) if high > low else np.zeros_like(means)
    return "".join(" " if np.isnan(h) else BARS[min(int(h * len(BARS)), len(BARS) - 1)] for h in height)
