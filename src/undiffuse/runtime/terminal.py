"""Output for terminals and pipes: text is printed as it is, in any encoding."""

from __future__ import annotations

import codecs
import os
import shlex
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console

REPLACEMENTS = {
    **dict(zip("▁▂▃▄▅▆▇█", "_.-:=+*#", strict=True)),
    **{"≤": "<=", "≥": ">=", "±": "+-", "×": "x", "−": "-", "–": "-", "—": "-", "·": ".", "…": "...", "≈": "~"},
    **{"α": "alpha", "β": "beta", "ε": "eps", "λ": "lambda", "σ": "sigma", "φ": "phi", "√": "sqrt"},
}
"""What is printed for a character that the encoding of the output lacks."""


def as_argument(path: Path | str) -> str:
    """``path`` as a word of a command: quoted, and with ./ where it begins as a flag does."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def flags(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """The words of a command for ``options`` that differ from ``defaults`` (None if not there); lists repeat a flag."""
    words = []
    for name, value in options.items():
        if value != defaults.get(name):
            flag, values = f"--{name.replace('_', '-')}", value if isinstance(value, list) else [value]
            words += [flag] if value is True else [word for one in values for word in (flag, str(one))]
    return words


def make_console(file: IO[str] | None = None, **settings: Any) -> Console:
    """A console that prints square brackets, colons and numbers as they are; ``settings`` as of rich's."""
    return Console(file=file, highlight=False, markup=False, emoji=False, **settings)


def replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """Error handler of codecs: `REPLACEMENTS`, else the letter without its accent, else an escape or "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(character: str) -> str:
    if character in REPLACEMENTS:
        return REPLACEMENTS[character]
    if "\ud800" <= character <= "\udfff":  # a byte of a path that is no UTF-8
        return character.encode("unicode_escape", "backslashreplace").decode()
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return plain or "?"


codecs.register_error("undiffuse.replace", replace_unencodable)


def prepare_streams() -> None:
    """Make standard output and error accept every character; where one of them is closed, discard its text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="undiffuse.replace")


def flush_streams() -> None:
    """Write what is buffered. Raises OSError where the output is closed or full; nothing is written later then."""
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        raise
