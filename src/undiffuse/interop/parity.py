"""How far a model is from what it was made of, or from what was made of it: the report of an import or export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from undiffuse.errors import CheckpointError
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition

LIMIT = 1e-5
"""The largest accepted difference of two outputs, as a fraction of the largest output, or of 1 if that is larger."""
FRACTIONS = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
"""The steps at which outputs are compared, as fractions of the last one."""


class Check(NamedTuple):
    """The largest ``difference`` of ``what`` from ``against``, with its ``limit``; None where it was not measured."""

    what: str
    against: str
    difference: float | None
    limit: float

    @property
    def holds(self) -> bool:
        return self.difference is None or self.difference <= self.limit

    def row(self) -> dict[str, Any]:
        """The check as a row of a table."""
        difference = "not measured" if self.difference is None else f"{self.difference:.1e}"
        return {"": self.what, "against": self.against, "difference": difference, "limit": f"{self.limit:.0e}"}


@dataclass(frozen=True)
class Imported:
    """A ``model`` made of another library's file, its ``checks``, ``notes`` for the user, and options of `sample`.

    ``sampling`` are the options of ``undiffuse sample`` that draw as the other library does by default.
    """

    model: Diffusion
    checks: Sequence[Check]
    notes: Sequence[str]
    sampling: str


def check_all(checks: Sequence[Check], place: object) -> None:
    """Raises `CheckpointError` at ``place`` for the first check that does not hold."""
    for check in checks:
        if not check.holds:
            cause = f"{check.what} differ by {check.difference:.1e} from {check.against}, above {check.limit:.0e}"
            fix = "Report this with the configuration: it is a fault of undiffuse, or another version of the format"
            raise CheckpointError("PARITY", str(place), cause, fix)


@torch.no_grad()
def network_difference(
    network: nn.Module,
    other: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    item_shape: Sequence[int],
    steps: Sequence[int],
    classes: int = 0,
) -> float:
    """The largest difference of ``network`` from ``other`` (x, time, label or None), relative as `LIMIT` says.

    Of one item of noise of ``item_shape`` at each of ``steps``, with a random label if there are ``classes``.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for step in steps:
        x = torch.randn((1, *item_shape), generator=generator)
        label = torch.randint(classes, (1,), generator=generator) if classes else None
        ours = network(x, torch.tensor([float(step)]), None if label is None else Condition(label=label))
        theirs = other(x, torch.tensor([step]), label)
        if ours.shape != theirs.shape:
            return float("inf")
        difference = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
        worst = max(worst, difference if difference == difference else float("inf"))  # NaN is a difference
    return worst


def steps_of(chain_length: int) -> list[int]:
    """The steps 0 … T − 1 of a chain at `FRACTIONS`."""
    return sorted({round(fraction * (chain_length - 1)) for fraction in FRACTIONS})
