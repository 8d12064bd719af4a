"""How much memory training needs at least, checked before it starts: the system kills a process without a message."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.errors import ConfigError
from undiffuse.model.config import TrainConfig
from undiffuse.runtime.machine import available_memory
from undiffuse.training.optimizer import block_matrices
from undiffuse.training.posthoc_ema import SNAPSHOT_LENGTHS

FLOAT_BYTES = 4
"""Bytes of a float32."""
VALUE_BYTES, PASS_BYTES = 1, 2 * FLOAT_BYTES
"""Bytes of a value in a batch, at least, and of its noise and the network's output, which a pass has for its items."""


def check_memory(
    model: Any,
    loss: Callable[[Any, int], Tensor],
    settings: TrainConfig,
    processes: int = 1,
    others: Iterable[nn.Module] = (),
) -> None:
    """Raise `ConfigError` if weights, batch and activations need more memory than is available.

    ``loss`` computes the losses of a model, a copy of ``model``, and so many items: a pass may move the buffers of a
    network, such as those of a batch norm. ``others`` are further models that stay in memory: the one that the run
    starts from, a teacher, an autoencoder. On other devices than the CPU only the values are checked.
    """
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())  # a learned schedule is there in any case
    one_moment = sum(p.numel() for p in block_matrices(model.network)) if settings.optimizer == "muon" else 0
    parameters = sum(p.numel() for p in model.parameters())
    averages = len({settings.ema, *SNAPSHOT_LENGTHS}) if settings.snapshots else 1
    weights = memory_per_process(parameters, averages, one_moment) if on_cpu else 0
    weights += sum({p: p.nbytes for other in others for p in other.parameters()}.values()) if on_cpu else 0
    dims, items = math.prod(model.item_shape), -(-settings.batch // processes // settings.accumulate)
    batch = dims * (VALUE_BYTES * settings.batch + PASS_BYTES * items * on_cpu)
    _require(settings, weights, batch, "Give a smaller batch")
    if on_cpu:
        trial = deepcopy(model)
        activations = measure_activations(trial, partial(loss, trial), items, available_memory() - weights)
        fix = "Give a smaller batch, a larger train.accumulate or a smaller network"
        _require(settings, weights, batch + activations, fix)


def measure_activations(model: nn.Module, loss: Callable[[int], Tensor], items: int, limit: float = math.inf) -> float:
    """Bytes that a forward pass of ``items`` keeps for the backward pass, extrapolated from two items and three.

    A pass of one item is made only where ``items`` is 1: a batch norm of vectors needs two.
    More than ``limit`` is reported as ``limit`` + 1 without finishing the pass. Global random numbers are not touched.
    """
    try:
        few = _saved_bytes(model, loss, min(items, 2), limit)
        return few if items <= 2 else few + (items - 2) * (_saved_bytes(model, loss, 3, limit) - few)
    except MemoryError:
        return limit + 1


def _saved_bytes(model: nn.Module, loss: Callable[[int], Tensor], items: int, limit: float) -> int:
    """Bytes of the distinct storages that autograd saves in a pass, the model's own tensors not counted."""
    counted, total = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}, 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
            if total > limit:
                raise MemoryError
        return tensor

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss(items)
    return total


def _require(settings: TrainConfig, weights: float, items: float, fix: str) -> None:
    if weights + items > available_memory():
        where = f"train.batch = {settings.batch:,}" if items > weights else "model.network"
        need, available = ((bytes_ / 1e9) for bytes_ in (weights + items, available_memory()))
        cause = f"training needs at least {need:,.1f} GB of memory, and {available:,.1f} GB may be used here"
        raise ConfigError("CONFIG", where, cause, fix if items > weights else "Give a smaller network")


def memory_per_process(parameters: int, averages: int = 2, one_moment: int = 0) -> int:
    """Bytes that one process holds throughout, 4 (n (5 + ``averages``) − ``one_moment``) for n float32 ``parameters``.

    These are weights, gradient, two moments, ``averages`` and the averaged model; ``one_moment`` of the parameters,
    those that Muon updates, have one moment. Averages are the model's own and those of snapshots. Activations are not
    included, see `measure_activations`.
    """
    return FLOAT_BYTES * (parameters * (5 + averages) - one_moment)
