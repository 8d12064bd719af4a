"""Rows of tables that other installed packages add, by entry points of the groups `GROUPS`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from undiffuse.errors import ConfigError

GROUPS = ("undiffuse.solvers", "undiffuse.networks", "undiffuse.sources", "undiffuse.metrics")
"""The groups of entry points that are read: in ``pyproject.toml`` [project.entry-points."undiffuse.solvers"]."""
T = TypeVar("T")


@functools.cache
def plugins(group: str) -> dict[str, EntryPoint]:
    """The entry points of installed packages in ``group``, by name, in alphabetical order. Imports none of them."""
    return {entry.name: entry for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)}


def load_plugin(entry: EntryPoint) -> Any:
    """What ``entry`` names, whose module is imported. Raises `ConfigError` where that fails.

    The module runs as code, like any installed package. No file that undiffuse reads can name it: a file selects at
    most one of the names that are installed.
    """
    try:
        return entry.load()
    except Exception as error:
        package = entry.dist.name if entry.dist else entry.value
        cause = f"importing {entry.value} fails ({type(error).__name__}: {error})"
        fix = f"Correct or uninstall the package {package}"
        raise ConfigError("PLUGIN", f"{entry.group} {entry.name!r}", cause[:300], fix) from error


class WithPlugins(Mapping[str, T]):
    """``rows``, then the plugins of ``group``, each imported when it is looked up. A plugin replaces no row."""

    def __init__(self, rows: Mapping[str, T], group: str) -> None:
        self.rows, self.group = rows, group

    def __getitem__(self, name: str) -> T:
        return self.rows[name] if name in self.rows else load_plugin(plugins(self.group)[name])

    def __contains__(self, name: object) -> bool:  # without the look-up of `Mapping`, which imports
        return name in self.rows or name in plugins(self.group)

    def __iter__(self) -> Iterator[str]:
        yield from self.rows
        yield from (name for name in plugins(self.group) if name not in self.rows)

    def __len__(self) -> int:
        return len(list(iter(self)))
