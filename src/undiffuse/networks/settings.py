"""Checks of a network's settings: those that cannot work are refused by name before any weight is allocated."""

from __future__ import annotations

from collections.abc import Iterable

from undiffuse.errors import ConfigError

MAX_SETTING, MAX_LAYERS, MAX_DEPTH = 1 << 24, 1000, 16
"""The largest number in a setting, the most layers, and the most resolutions, each half the size of the one before."""


def require(holds: bool, name: str, cause: str, fix: str) -> None:
    """Raises `ConfigError` about the setting ``network.name`` unless ``holds``."""
    if not holds:
        raise ConfigError("NETWORK", f"network.{name}", cause, fix)


def check_int(name: str, value: object, minimum: int = 1) -> int:
    """``value``, if it is a whole number from ``minimum`` to `MAX_SETTING`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        require(False, name, f"{value!r} is not a whole number of at least {minimum}", "Give such a number")
    require(int(value) <= MAX_SETTING, name, f"{value} is above {MAX_SETTING:,}", "Give a smaller number")  # pyright: ignore[reportArgumentType]
    return int(value)  # pyright: ignore[reportArgumentType]


def check_ints(name: str, values: object, minimum: int = 1) -> tuple[int, ...]:
    """``values`` as a tuple, if it is a list of whole numbers of at least ``minimum``."""
    is_list = isinstance(values, Iterable) and not isinstance(values, str | bytes | dict)
    require(is_list, name, f"{values!r} is not a list of whole numbers", "Give a list such as [64, 128]")
    return tuple(check_int(name, v, minimum) for v in values)  # pyright: ignore[reportGeneralTypeIssues]


def check_layers(name: str, layers: int) -> None:
    """Raises `ConfigError` about the setting ``name`` for more than `MAX_LAYERS` layers."""
    require(layers <= MAX_LAYERS, name, f"{layers:,} layers are more than {MAX_LAYERS:,}", "Give fewer")


def check_depth(name: str, levels: int) -> None:
    """Raises `ConfigError` about the setting ``name`` for no levels and for more than `MAX_DEPTH`."""
    require(0 < levels <= MAX_DEPTH, name, f"{levels} levels", f"Give 1 to {MAX_DEPTH}")


def check_sizes(**sizes: object) -> dict[str, int]:
    """``sizes`` of the conditions by name, whole numbers; 0 for a condition that the network does not accept."""
    return {name: check_int(name, size, 0) for name, size in sizes.items()}


def check_out_channels(value: object, channels: int) -> int:
    """The number of output channels: ``value``, or as many as the input has if it is None."""
    return channels if value is None else check_int("out_channels", value)


def check_dropout(value: object) -> float:
    """``value``, if it is a number in [0, 1)."""
    holds = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
    require(holds, "dropout", f"{value!r} is not a number in [0, 1)", "Give such a number")
    return float(value)  # pyright: ignore[reportArgumentType]
