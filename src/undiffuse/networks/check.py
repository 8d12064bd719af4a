"""Settings that cannot work are refused by name, in one line, before a weight is made."""

from __future__ import annotations

from collections.abc import Iterable

from undiffuse.errors import ConfigError


def require(holds: bool, name: str, cause: str, fix: str) -> None:
    """Nothing, or ``ConfigError`` about the setting ``network.name``."""
    if not holds:
        raise ConfigError("NETWORK", f"network.{name}", cause, fix)


MOST, DEEPEST, LEVELS = 1 << 24, 1000, 16
"""The largest number that a setting may be, the most layers, and the most levels, each half the size of the last."""


def whole(name: str, value: object, least: int = 1) -> int:
    """``value``, if it is a whole number of at least ``least`` and at most `MOST`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        require(False, name, f"{value!r} is not a whole number of at least {least}", "Give such a number")
    require(int(value) <= MOST, name, f"{value} is above {MOST:,}", "Give a smaller number")  # pyright: ignore[reportArgumentType]
    return int(value)  # pyright: ignore[reportArgumentType]


def wholes(name: str, values: object, least: int = 1) -> tuple[int, ...]:
    """``values`` as a tuple, if it is a list of whole numbers of at least ``least``."""
    listed = isinstance(values, Iterable) and not isinstance(values, str | bytes | dict)
    require(listed, name, f"{values!r} is not a list of whole numbers", "Give a list such as [64, 128]")
    return tuple(whole(name, v, least) for v in values)  # pyright: ignore[reportGeneralTypeIssues]


def share(name: str, value: object) -> float:
    """``value``, if it is a number in [0, 1)."""
    holds = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    require(holds, name, f"{value!r} is not a number in [0, 1)", "Give such a number")
    return float(value)  # pyright: ignore[reportArgumentType]
