"""The errors that a user can act on. Each is one line: ``error[CODE] place: cause. What to do.``

UndiffuseError
├── ConfigError      exit 2   a flag, a configuration or a combination that cannot work
├── DataError        exit 3   the user's data
├── CheckpointError  exit 4   a file or folder that should hold a model
├── NonFiniteError   exit 5   values that became NaN or infinite
└── ResourceError    exit 6   disk, memory, locks
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class UndiffuseError(Exception):
    """Base of all errors that a user can act on.

    ``code`` names the kind in capitals (``TRUNCATED``), ``where`` the file, flag or field, ``cause`` the problem and
    ``fix`` what to do about it. ``cause`` and ``fix`` are sentences without a full stop.
    """

    exit_code = 1

    def __init__(self, code: str, where: str | Path, cause: str, fix: str) -> None:
        self.code, self.where, self.cause, self.fix = code, printable(str(where)), printable(cause), printable(fix)
        super().__init__(str(self))

    def __str__(self) -> str:
        return f"error[{self.code}] {self.where}: {self.cause}. {self.fix}."


class ConfigError(UndiffuseError):
    exit_code = 2


class DataError(UndiffuseError):
    exit_code = 3


class CheckpointError(UndiffuseError):
    exit_code = 4


class NonFiniteError(UndiffuseError):
    exit_code = 5


class ResourceError(UndiffuseError):
    exit_code = 6


def unknown_name(code: str, name: str, noun: str, names: Iterable[str]) -> ConfigError:
    """The error for a ``name`` that is not among the ``names`` of a table; ``noun`` says what the table holds."""
    return ConfigError(code, repr(name), f"no such {noun}", f"Use one of {', '.join(names)}")


def printable(text: str) -> str:
    """``text`` on one line: control characters, direction marks and lone surrogates become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def counted(number: float, noun: str) -> str:
    """``number`` with its ``noun``, which is given in the singular, as 1 minute, 2.5 minutes, 1,000 classes."""
    text = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{text} {noun}" if number == 1 else f"{text} {noun}{'es' if noun.endswith('s') else 's'}"
