"""The conditions of items, from ``--label`` and ``--cond``; the values given are used in turn."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from undiffuse.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from undiffuse.networks.condition import Condition

ConditionFn = Callable[[range], "Condition"]
"""The conditions of some items; each depends on the item's index alone."""


def make_condition(
    classes: Sequence[str], labels: Sequence[str] = (), file: Path | None = None, text: Condition | None = None
) -> ConditionFn | None:
    """The ``cond`` of `Diffusion.sample` as a function of the items, None if no labels, file or text are given.

    ``labels`` are names or indices of ``classes`` (see `parse_labels`); ``file`` holds vectors (N, D) or tokens
    (N, L, D) with their mask; ``text`` is that of prompts, one each. Item i gets the (i mod N)-th. Raises `ConfigError`
    and `DataError`.
    """
    import torch

    from undiffuse.networks.condition import Condition

    if not labels and file is None and text is None:
        return None
    if file is not None and text is not None:
        raise ConfigError("USAGE", "--cond, --prompt", "each determines the condition", "Give one of them")
    label_of = parse_labels(classes, labels) if labels else None
    conditions, rows = (text or Condition(), _rows(text)) if file is None else _read(file)

    def condition(items: range) -> Condition:
        index = torch.tensor(list(items), dtype=torch.int64)
        label = None if label_of is None else label_of[index % len(label_of)]
        return replace(conditions.take(index % rows), label=label)

    return condition


def report_unused_conditions(n: int, log: Callable[[str], None], **given: Sequence[object]) -> None:
    """A line for each kind among ``given``, such as labels, of which there are more than the ``n`` items."""
    for kind, values in given.items():
        if len(values) > n:
            log(f"note: --n {n} uses only the first {n} of {len(values)} {kind}")


def _read(file: Path) -> tuple[Condition, int]:
    """(the conditions of a file, their number)."""
    import torch

    from undiffuse.data.sources.array_files import load_conditions
    from undiffuse.networks.condition import Condition

    if not os.path.lexists(file):
        raise DataError("NOT_FOUND", file, "no such file", "Name an array file of conditions")
    values, mask = load_conditions(file)
    rows = torch.from_numpy(values)
    return Condition(vector=rows) if mask is None else Condition(tokens=rows, mask=torch.from_numpy(mask)), len(values)


def _rows(text: Condition | None) -> int:
    return 1 if text is None else len(next(iter(text.given().values())))


def parse_labels(classes: Sequence[str], labels: Sequence[str]) -> Tensor:
    """The ``labels`` as (n,) int64: names of ``classes``, indices from 0, "all" for each class, "none" for −1.

    A name takes precedence over an index. Case is ignored if that leaves one name. Raises `ConfigError`.
    """
    import torch

    if not classes:
        cause, fix = "the model was trained without labels", "Omit it, or train a model with --conditional"
        raise ConfigError("LABEL", f"--label {labels[0]}", cause, fix)
    return torch.tensor([index for label in labels for index in _indices(list(classes), label)])


def _indices(classes: list[str], label: str) -> list[int]:
    lower = [name.casefold() for name in classes]
    for names, name in ((classes, label), (lower, label.casefold())):
        if names.count(name) == 1:
            return [names.index(name)]
    if label in ("all", "none"):
        return list(range(len(classes))) if label == "all" else [-1]
    if label.isdecimal() and len(label) < 10 and int(label) < len(classes):
        return [int(label)]
    close = [classes[lower.index(name)] for name in difflib.get_close_matches(label.casefold(), lower, cutoff=0.5)]
    fix = f"Did you mean {' or '.join(close)}" if close else f"Labels are {', '.join(classes[:12])}"
    more = ", ..." if not close and len(classes) > 12 else ""
    raise ConfigError("LABEL", f"--label {label}", f"no such label among {len(classes)}", f"{fix}{more}")
