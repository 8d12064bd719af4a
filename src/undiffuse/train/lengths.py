"""A run's model with its weights averaged over another length, and which length is the best on held-out items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from undiffuse.checkpoint import fit_tensors, load
from undiffuse.data import Dataset
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError, DataError
from undiffuse.train.profiles import Profile, combine, reconstruct, snapshots
from undiffuse.train.run import Run

LENGTHS = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15, 0.20)
"""Lengths that are compared unless others are asked for, as far as their profiles are met."""
NEAR = 0.1
"""A profile is met if no more of it is missed."""


def model_of(run: Run, length: float, device: str = "cpu") -> tuple[Diffusion, float]:
    """The run's model with the average of ``length``, and the error of its profile as a share of the profile.

    It is the model at the last snapshot, which of a finished run is its end. Raises `CheckpointError`, `ConfigError`.
    """
    tensors, step, error = reconstruct(run.snapshots, length)
    model = load(run.folder, device)
    fit_tensors(run.snapshots, model.state_dict(), tensors)
    model.load_state_dict(tensors)
    model.info |= {"steps": step, "ema": length, "ema_error": error}
    return model, error


def met(run: Run) -> list[float]:
    """Those of `LENGTHS` whose profile is met by the run's snapshots. Raises `CheckpointError`."""
    kept = list(snapshots(run.snapshots))
    last = max(one.step for one in kept)
    return [length for length in LENGTHS if combine(Profile(length, last), kept)[1] <= NEAR]


class Measured(NamedTuple):
    """A ``length``, the ``error`` of its profile, its bound ``bits`` ± ``stderr``, and how far ``behind`` the best."""

    length: float
    error: float
    bits: float
    stderr: float
    behind: float
    behind_stderr: float


def compare(
    run: Run,
    data: Dataset,
    lengths: Sequence[float] | None = None,
    items: int = 256,
    draws: int = 16,
    device: str = "cpu",
    progress: Callable[[float], None] = lambda length: None,
) -> list[Measured]:
    """The bound, bits per dimension, of held-out items for every length, in order, with the same noise for all.

    ``lengths`` are those of `LENGTHS` whose profile is met to within `NEAR` if not given. ``behind`` is the mean over
    items of the difference from the best, whose standard error is smaller than the bounds' own by what they have in
    common. The items are spread over the validation part, that no weight was trained on and no test is made with.
    Raises `ConfigError`, `DataError`, `CheckpointError`.
    """
    if lengths is not None and not lengths:
        raise ConfigError("LENGTH", "lengths", "none is given", "Give at least one")
    found, info = [], load(run.folder).info
    held_out = data.split(float(info.get("held_out", 0.1))).validation
    chosen = held_out[np.linspace(0, len(held_out) - 1, min(items, len(held_out))).round().astype(int)]
    if data.fingerprint != info.get("fingerprint"):
        fix = "Give the data of the run"
        raise DataError("OTHER_DATA", data.name, "the run was not trained on these data: no part is held out", fix)
    if len(chosen) < 2:
        raise DataError("EMPTY", data.name, "fewer than two items are held out", "Train with a larger held_out")
    values = torch.from_numpy(np.ascontiguousarray(data.values[chosen]))
    for length in met(run) if lengths is None else lengths:
        model, error = model_of(run, length, device)
        cond = data.condition(chosen) if _told(model) else None
        found.append((length, error, model.nll(values, draws=draws, cond=cond).bits_per_dim(model.dims)))
        progress(length)
    best = min((bits for *_, bits in found), key=lambda bits: float(bits.mean()))
    return [Measured(length, error, *_mean(bits), *_mean(bits - best)) for length, error, bits in found]


def _told(model: Diffusion) -> bool:
    return any(model.config.network.get(name, 0) for name in ("classes", "vector", "tokens"))


def _mean(each: torch.Tensor) -> tuple[float, float]:
    each = each.double()
    return float(each.mean()), float(each.std()) / math.sqrt(len(each))
