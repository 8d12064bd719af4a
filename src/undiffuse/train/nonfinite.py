"""What happens to a step whose loss or gradient is no number: the run stops, or the step is left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse.config import TrainConfig
from undiffuse.errors import NonFiniteError, printable
from undiffuse.train.parallel import own, whole
from undiffuse.train.state import Progress

MOST_IN_A_ROW = 5
"""Steps that may be left out one after the other: more are no accident of a batch."""
NAMED = 5


class Wrong(NamedTuple):
    """What is not finite, ``loss`` or ``gradient``, and with which of the batch's items, (B,) of bool."""

    part: str
    which: np.ndarray


def whats_wrong(losses: Tensor, norms: Sequence[float]) -> Wrong | None:
    """What is not finite of the ``losses`` (B,) of a batch and the norms of its gradients; None where all is."""
    bad = ~torch.isfinite(losses).cpu().numpy()
    if bad.any():
        return Wrong("loss", bad)
    return None if all(map(math.isfinite, norms)) else Wrong("gradient", ~bad)


def leave_out(wrong: Wrong, items: np.ndarray, progress: Progress, settings: TrainConfig, folder: Path) -> str:
    """A line that says that the step to come is left out. Raises `NonFiniteError` where it may not be.

    ``items`` (B,) are what the data call those of the batch (`Dataset.called`).
    """
    which = items[wrong.which]
    more = f" and {len(which) - NAMED} more" if len(which) > NAMED else ""
    named = ", ".join(printable(str(item)) for item in which[:NAMED]) + more
    cause = f"the {wrong.part} of step {progress.step + 1} is not finite, for {len(which)} of its {len(items)} items"
    progress.left_out += 1
    if settings.on_nonfinite == "stop" or progress.left_out > MOST_IN_A_ROW:
        again = "leave such steps out (--on-nonfinite skip)" if progress.left_out == 1 else "train in float32"
        fix = f"Look at these items, lower train.lr or {again}; {_standing(folder)}"
        raise NonFiniteError("NON_FINITE", folder, f"{cause}: {named}", fix)
    return f"left out: {cause}: {named}"


def require_finite(diffusion: nn.Module, step: int, folder: Path) -> None:
    """Raises `NonFiniteError` where a weight is no number after the optimiser's ``step``: it can not be left out."""
    weights = dict(diffusion.named_parameters())
    if math.isfinite(float(whole(nn.utils.get_total_norm(weights.values())))):
        return
    named = next((name for name, weight in weights.items() if not bool(torch.isfinite(own(weight)).all())), "some")
    cause = f"weights are not finite after step {step}: {named}"
    raise NonFiniteError("NON_FINITE", folder, cause, f"Lower train.lr; {_standing(folder)}")


def _standing(folder: Path) -> str:
    """What the run can go on from."""
    kept = any((folder / "checkpoints").glob("step-*"))
    return "the last checkpoint is good" if kept else "there is no checkpoint yet"
