"""What a model is told of each item, from ``--label`` and ``--cond``: what is given, in turn."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.data import load_conditions
from undiffuse.errors import ConfigError

Tell = Callable[[range], Condition]
"""The conditions of some items, each a function of the item's own number."""


def tell(classes: Sequence[str], labels: Sequence[str] = (), file: Path | None = None) -> Tell | None:
    """What `Diffusion.sample` takes as ``cond`` for any items, None where nothing is given.

    ``labels`` are names or numbers of ``classes`` (see `labels_for`); ``file`` holds vectors (N, D) or tokens
    (N, L, D) with their mask. Item i has the (i mod N)-th. Raises `ConfigError` and `DataError`.
    """
    if not labels and file is None:
        return None
    each = labels_for(classes, labels) if labels else None
    known, rows = (Condition(), 1) if file is None else _read(file)

    def told(items: range) -> Condition:
        numbers = torch.tensor(list(items), dtype=torch.int64)
        label = None if each is None else each[numbers % len(each)]
        return replace(known.take(numbers % rows), label=label)

    return told


def _read(file: Path) -> tuple[Condition, int]:
    """The conditions of a file, and how many they are."""
    cond, mask = load_conditions(file)
    told = torch.from_numpy(cond)
    return Condition(vector=told) if mask is None else Condition(tokens=told, mask=torch.from_numpy(mask)), len(cond)


def labels_for(classes: Sequence[str], asked: Sequence[str]) -> Tensor:
    """The labels (n,) int64 that are ``asked`` for: names of ``classes``, numbers from 0, "all" of them, "none": −1.

    A name goes before a number, and capitals do not matter where only one name is meant. Raises `ConfigError`.
    """
    if not classes:
        cause, fix = "the model was trained without labels", "Leave it out, or train one with --conditional"
        raise ConfigError("LABEL", f"--label {asked[0]}", cause, fix)
    return torch.tensor([label for name in asked for label in _labels(list(classes), name)])


def says_something(classes: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether any of the labels that are ``asked`` for is more than "none"."""
    return bool(asked) and bool((labels_for(classes, asked) >= 0).any())


def _labels(classes: list[str], name: str) -> list[int]:
    small = [c.casefold() for c in classes]
    for names, wanted in ((classes, name), (small, name.casefold())):
        if names.count(wanted) == 1:
            return [names.index(wanted)]
    if name in ("all", "none"):
        return list(range(len(classes))) if name == "all" else [-1]
    if name.isdecimal() and int(name) < len(classes):
        return [int(name)]
    close = [classes[small.index(c)] for c in difflib.get_close_matches(name.casefold(), small, cutoff=0.5)]
    known = f"Did you mean {' or '.join(close)}" if close else f"Labels are {', '.join(classes[:12])}"
    more = ", ..." if not close and len(classes) > 12 else ""
    raise ConfigError("LABEL", f"--label {name}", f"no such label among {len(classes)}", f"{known}{more}")
