"""Tables from names to functions and classes whose names can be listed without importing torch.

Help texts and error messages list the names; only a look-up imports the module of a row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple


class Row(NamedTuple):
    """``attribute`` of the module ``undiffuse.<module>``, with leading arguments and defaults of keywords."""

    module: str
    attribute: str
    arguments: tuple[Any, ...]
    settings: Mapping[str, Any]


def row(module: str, attribute: str, *arguments: Any, **settings: Any) -> Row:
    """A `Row`: the caller cannot change the ``arguments``, but can change the ``settings``."""
    return Row(module, attribute, arguments, settings)


class LazyTable(Mapping[str, Callable[..., Any]]):
    """A mapping from each name to what its `Row` describes, imported when it is looked up."""

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        module, attribute, arguments, settings = self._rows[name]
        # `import_module` is banned elsewhere (tests/test_layers.py), because a name from a user or a file could then
        # choose which code runs. Here ``name`` only selects a row; the module is a literal of a row of this package.
        value = getattr(importlib.import_module(f"undiffuse.{module}"), attribute)
        return partial(value, *arguments, **settings) if arguments or settings else value

    def __contains__(self, name: object) -> bool:  # without the look-up of `Mapping`, which imports
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
