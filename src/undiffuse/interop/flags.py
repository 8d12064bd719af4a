"""Flags of the library that trained a model, which are in none of its files: ``--set`` of ``undiffuse import``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from undiffuse.errors import ConfigError


def check_flags(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``known``, the flags with their defaults, with those ``given``; a default of None is a truth value without one.

    Raises `ConfigError` for an unknown flag, or a value of another type than the default's.
    """
    for name, value in given.items():
        if name not in known:
            raise ConfigError("FLAG", f"--set {name}", "no such flag", f"Use {', '.join(known)}")
        wanted = bool if known[name] is None else type(known[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            cause = f"{value!r} is not of the type {wanted.__name__}"
            raise ConfigError("FLAG", f"--set {name}", cause, "Correct the value; truth values are true and false")
    return {**known, **given}
