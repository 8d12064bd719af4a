"""Steps with a NaN or infinite loss or gradient: stop the run, or skip the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse.errors import NonFiniteError, counted, printable
from undiffuse.model.config import TrainConfig
from undiffuse.training.distributed import full_tensor, local_shard
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import checkpoint_folders

MAX_SKIPPED_IN_A_ROW = 5
"""Consecutive steps that may be skipped; more are not the accident of a batch."""
MAX_NAMED_ITEMS = 5
"""Items of a batch that a message names."""


class NonFinite(NamedTuple):
    """The ``part`` that is NaN or infinite, ``loss`` or ``gradient``, and the ``items`` concerned, (B,) of bool."""

    part: str
    items: np.ndarray


def find_nonfinite(losses: Tensor, norms: Sequence[float]) -> NonFinite | None:
    """What is NaN or infinite among the ``losses`` (B,) of a batch and the norms of its gradient; None if nothing is.

    A gradient belongs to every item of its batch.
    """
    bad = ~torch.isfinite(losses).cpu().numpy()
    if bad.any():
        return NonFinite("loss", bad)
    return None if all(map(math.isfinite, norms)) else NonFinite("gradient", ~bad)


def skip_step(problem: NonFinite, names: np.ndarray, progress: Progress, settings: TrainConfig, folder: Path) -> str:
    """Count the next step as skipped and return a line about it; ``names`` (B,) are those of the batch's items.

    Raises `NonFiniteError` if ``settings.on_nonfinite`` is "stop" or too many steps in a row were skipped.
    """
    bad = names[problem.items]
    more = f" and {len(bad) - MAX_NAMED_ITEMS} more" if len(bad) > MAX_NAMED_ITEMS else ""
    listed = ", ".join(printable(str(name)) for name in bad[:MAX_NAMED_ITEMS]) + more
    of = f"{len(bad)} of its {counted(len(names), 'item')}"
    cause = f"the {problem.part} of step {progress.step + 1} is not finite, for {of}"
    progress.skipped_in_a_row += 1
    if settings.on_nonfinite == "stop" or progress.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        retry = "skip such steps (--on-nonfinite skip)" if progress.skipped_in_a_row == 1 else "train in float32"
        fix = f"Look at these items, lower train.lr or {retry}; {_checkpoint_status(folder)}"
        raise NonFiniteError("NON_FINITE", folder, f"{cause}: {listed}", fix)
    return f"step skipped: {cause}: {listed}"


def require_finite(model: nn.Module, step: int, folder: Path) -> None:
    """Raise `NonFiniteError` if a weight is NaN or infinite after optimizer step ``step``: it cannot be undone."""
    weights = dict(model.named_parameters())
    if math.isfinite(float(full_tensor(nn.utils.get_total_norm(weights.values())))):
        return
    name = next((n for n, weight in weights.items() if not bool(torch.isfinite(local_shard(weight)).all())), None)
    cause = f"weights are not finite after step {step}: {name or 'their norm overflows'}"
    raise NonFiniteError("NON_FINITE", folder, cause, f"Lower train.lr; {_checkpoint_status(folder)}")


def _checkpoint_status(folder: Path) -> str:
    """Whether the run can be resumed, as a clause."""
    return "the last checkpoint is good" if checkpoint_folders(folder / "checkpoints") else "there is no checkpoint yet"
