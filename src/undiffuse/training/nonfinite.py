"""Steps with a NaN or infinite loss or gradient: stop the run, or skip the step.

A GPU waits whenever a number of it is read. So there the numbers of the steps of a run that stops are kept as tensors
(`UnreadSteps`) and are read together before anything is written; on a CPU, where reading is free, they are read at
once. A run that skips steps reads the losses and the norms of each step in one copy, before the weights move.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse.data.dataset import Dataset
from undiffuse.errors import ConfigError, NonFiniteError, counted, printable
from undiffuse.model.config import TrainConfig
from undiffuse.training.batches import batch_items
from undiffuse.training.distributed import full_tensor, local_shard
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import checkpoint_folders
from undiffuse.training.task import Task

MAX_SKIPPED_IN_A_ROW = 5
"""Consecutive steps that may be skipped; more are not the accident of a batch."""
MAX_NAMED_ITEMS = 5
"""Items of a batch that a message names."""


class NonFinite(NamedTuple):
    """The ``part`` that is NaN or infinite, ``loss`` or ``gradient``, and the ``items`` concerned, (B,) of bool."""

    part: str
    items: np.ndarray


def reading_waits(device: torch.device) -> bool:
    """Whether reading a number on ``device`` waits until everything before it is computed."""
    return device.type != "cpu"


def find_nonfinite(losses: Tensor, norms: Sequence[Tensor]) -> NonFinite | None:
    """What is NaN or infinite among the ``losses`` (B,) of a batch and the norms of its gradient; None if nothing is.

    A gradient belongs to every item of its batch. All are read in one copy.
    """
    return _nonfinite(*read_together([losses, *norms]))


def _nonfinite(losses: np.ndarray, *norms: np.ndarray) -> NonFinite | None:
    bad = ~np.isfinite(losses)
    if bad.any():
        return NonFinite("loss", bad)
    return None if np.isfinite(norms).all() else NonFinite("gradient", ~bad)


def read_together(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """The ``tensors`` as one-dimensional arrays, copied from the device of the first one at once."""
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    flat = torch.cat([tensor.detach().reshape(-1).to(tensors[0].device, dtype) for tensor in tensors]).cpu().numpy()
    return np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])


class UnreadSteps:
    """Losses, norms of the gradient and the norm of the weights of the steps since the last reading, as tensors.

    Of a training of ``model`` into ``folder``; none are kept unless reading ``waits``. With ``check_first`` losses and
    norms are read before the step is made: where reading is free, and where a step may be skipped or updates more than
    weights.
    """

    def __init__(self, task: Task, model: nn.Module, folder: Path, waits: bool) -> None:
        self.model, self.settings, self.folder, self.waits = model, task.config.train, folder, waits
        self.check_first = not waits or self.settings.on_nonfinite == "skip" or bool(task.extra_state(model))
        self.steps: list[tuple[int, list[Tensor]]] = []

    def add(self, step: int, losses: Tensor, norms: Sequence[Tensor]) -> None:
        """Keep those of ``step``, counted from 0, after which the weights are those that the model has now.

        Unless reading ``waits``, the weights are read at once: raises `NonFiniteError`.
        """
        if self.waits:
            self.steps.append((step, [losses.detach(), *norms, weights_norm(self.model)]))
        elif not math.isfinite(float(weights_norm(self.model))):  # this step cannot be undone
            raise _weights_error(self.model, step + 1, self.folder)

    def require_finite(self, progress: Progress, data: Dataset, items: np.ndarray) -> None:
        """Read them in one copy. Raises `NonFiniteError` for the first step with one that is not finite.

        Batches are of the ``items`` of ``data``.
        """
        steps, self.steps = self.steps, []
        if not steps:
            return
        values = iter(read_together([tensor for _, tensors in steps for tensor in tensors]))
        for step, tensors in steps:
            losses, *norms, weights = (next(values) for _ in tensors)
            if problem := _nonfinite(losses, *norms):
                names = data.item_names(batch_items(items, self.settings, step))
                skip_step(problem, names, replace(progress, step=step), self.settings, self.folder)
            if not np.isfinite(weights).all():
                raise _weights_error(self.model, step + 1, self.folder)


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
        fix = f"Look at these items, lower train.lr or {retry}; {checkpoint_status(folder / 'checkpoints')}"
        raise NonFiniteError("NON_FINITE", folder, f"{cause}: {listed}", fix)
    return f"step skipped: {cause}: {listed}"


def weights_norm(model: nn.Module) -> Tensor:
    """The norm of all weights, over all shards."""
    on_cpu_last = sorted(model.parameters(), key=lambda p: p.device.type == "cpu")  # all norms go to the first device
    return full_tensor(nn.utils.get_total_norm(on_cpu_last))


def _weights_error(model: nn.Module, step: int, folder: Path) -> NonFiniteError:
    weights = model.named_parameters()
    name = next((n for n, weight in weights if not bool(torch.isfinite(local_shard(weight)).all())), None)
    cause = f"weights are not finite after step {step}: {name or 'their norm overflows'}"
    return NonFiniteError("NON_FINITE", folder, cause, f"Lower train.lr; {checkpoint_status(folder / 'checkpoints')}")


def checkpoint_status(checkpoints: Path) -> str:
    """Whether the run of the folder ``checkpoints`` can be resumed, as a clause."""
    return "the last checkpoint is good" if checkpoint_folders(checkpoints) else "there is no checkpoint yet"


def require_finite_state(model: nn.Module) -> None:
    """Raise `ConfigError` for the first weight or buffer that is NaN or infinite: no checkpoint stores it."""
    weights = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        if torch.isfinite(tensor).all():
            continue
        cause, fix = "this weight is NaN or infinite before the first step", "Correct how the network initializes it"
        if name not in weights:
            cause = "this buffer of the network holds NaN or infinite values, and checkpoints store none"
            fix = "Leave it out of checkpoints: register_buffer(..., persistent=False)"
        raise ConfigError("NETWORK", name, cause, fix)
