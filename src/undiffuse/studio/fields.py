"""The content of a request, field by field: every field has a type and limits, and an unknown one is an error."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from undiffuse.errors import ConfigError

MAX_SEED = 2**31 - 1


class Fields:
    """The fields of a JSON object. Each method takes a field out and checks it; raises `ConfigError`."""

    def __init__(self, plain: Any, where: str = "request") -> None:
        if not isinstance(plain, dict):
            raise ConfigError("REQUEST", where, "it is not a JSON object", "Send one")
        self._fields, self._where = dict(plain), where

    @classmethod
    def parse(cls, body: bytes) -> Fields:
        """The fields of a JSON text."""
        try:
            return cls(json.loads(body))
        except (ValueError, RecursionError):
            raise ConfigError("REQUEST", "request", "it is not JSON", "Send a JSON object") from None

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._take(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self._error(name, value, f"it is not a whole number from {low:,} to {high:,}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._take(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self._error(name, value, f"it is not a number from {low:g} to {high:g}")
        return float(value)

    def choice(self, name: str, options: Collection[str], default: str | None = None) -> str:
        value = self._take(name, default)
        if not isinstance(value, str) or value not in options:
            raise self._error(name, value, f"it is not one of {', '.join(filter(None, options))}")
        return value

    def text(self, name: str, longest: int, default: str | None = None) -> str:
        value = self._take(name, default)
        if not isinstance(value, str) or len(value) > longest or not value.isprintable():
            raise self._error(name, value, f"it is not a text of one line and at most {longest} characters")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """None where the field is missing or null."""
        if self._fields.get(name) is None:
            self._fields.pop(name, None)
            return None
        return self.integer(name, low, high)

    def object(self, name: str) -> Fields:
        return Fields(self._take(name, None), f"{name} of the request")

    def objects(self, name: str, most: int) -> list[Fields]:
        value = self._take(name, None)
        if not isinstance(value, list) or not 1 <= len(value) <= most:
            raise self._error(name, value, f"it is not a list of 1 to {most} objects")
        return [Fields(each, f"{name} of the request") for each in value]

    def has(self, name: str) -> bool:
        return name in self._fields

    def done(self) -> None:
        """Raises `ConfigError` for a field that no method took."""
        if self._fields:
            raise ConfigError("REQUEST", next(iter(self._fields))[:60], "no such field", "Leave it out")

    def _take(self, name: str, default: Any) -> Any:
        if name not in self._fields and default is None:
            raise ConfigError("REQUEST", name, f"it is missing in the {self._where}", "Give it")
        return self._fields.pop(name, default)

    def _error(self, name: str, value: Any, cause: str) -> ConfigError:
        shown = json.dumps(value)
        return ConfigError("REQUEST", f"{name} = {shown[:60]}", cause, "Change it")
