"""Tables for a terminal, a pipe or a file."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from undiffuse.errors import printable


def render(rows: Sequence[Mapping[str, Any]], title: str = "", file: IO[str] | None = None) -> None:
    """Print ``rows`` under the names of their fields, in order of first appearance; what is absent is blank.

    A pair (value, stderr) is printed as value ± stderr, to the error's second digit; numbers are put to
    the right. To ``file`` or standard output: no colour codes and no wrapping where that is no terminal.
    """
    out = sys.stdout if file is None else file
    terminal = out.isatty()
    console = Console(file=out, force_terminal=terminal, width=None if terminal else 10_000, highlight=False)
    table = Table(title=Text(printable(title), "bold") if title else None, title_justify="left", box=SIMPLE_HEAD)
    for name in dict.fromkeys(name for row in rows for name in row):
        words = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(Text(printable(name)), justify="left" if words else "right")
    for row in rows:
        table.add_row(*(Text(cell(row.get(str(column.header)))) for column in table.columns))
    console.print(table)


def cell(value: Any) -> str:
    """``value`` as a table shows it: a pair as value ± stderr, a fraction to four significant digits."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        mean, stderr = value
        real = 1e-12 * abs(mean) < stderr < math.inf  # else it is 0, or rounding
        digits = 1 - math.floor(math.log10(stderr)) if real else 3
        return f"{mean:.{max(0, digits)}f} ± {stderr:.{max(0, digits)}f}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value)) if isinstance(value, str) else f"{value:,}"
