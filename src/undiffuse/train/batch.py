"""What a step is trained on: its items, its random numbers and what the network is told, from (seed, purpose, step)."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.config import TrainConfig
from undiffuse.data import Dataset
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.networks.embedding import Vector
from undiffuse.process.times import low_discrepancy
from undiffuse.randomness import generator


def global_batch(
    data: Dataset, items: np.ndarray, settings: TrainConfig, step: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Condition | None]:
    """(values, u, eps, z, cond) of a step's whole batch, functions of (seed, step) alone.

    Who is told nothing has a key of its own: conditional training sees the values and the noise of any other.
    """
    chosen = batch_items(items, settings, step)
    values, cond = data.values[chosen], None
    data.seen.check()
    if settings.conditional:
        g = generator(settings.seed, "condition", step)
        cond = data.condition(chosen).drop(torch.rand(settings.batch, generator=g) < settings.condition_dropout)
    g = generator(settings.seed, "train", step)
    u = low_discrepancy(torch.rand((), generator=g, dtype=torch.float64), settings.batch)
    u = u[torch.randperm(settings.batch, generator=g)]
    eps, z = torch.randn(2, *values.shape, generator=g)
    if settings.flip:
        mirrored = (torch.rand(settings.batch, generator=g) < 0.5).numpy()
        values = np.where(mirrored.reshape(-1, *[1] * (values.ndim - 1)), values[..., ::-1], values)
    return torch.from_numpy(np.ascontiguousarray(values)), u, eps, z, cond


def standardise_vectors(diffusion: Diffusion, data: Dataset, items: np.ndarray) -> None:
    """Tells the network that hears vectors the moments of those of the ``items``."""
    for module in diffusion.network.modules():
        if isinstance(module, Vector):
            assert data.cond is not None
            told = torch.from_numpy(data.cond[items]).double()
            std = told.std(0, correction=0)
            module.start_from(told.mean(0), torch.where(std > 0, std, 1.0))


def batch_items(items: np.ndarray, settings: TrainConfig, step: int) -> np.ndarray:
    """Which of the ``items`` the step's batch holds, in its order."""
    return np.sort(items[batch_order(len(items), settings.batch, settings.seed, step)])


def batch_order(n: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The step's places in the list of items: epochs are permutations of their own, laid end to end."""
    places = []
    for epoch in range(step * batch // n, ((step + 1) * batch - 1) // n + 1):
        order = _epoch(n, seed, epoch)
        places.append(order[max(step * batch - epoch * n, 0) : (step + 1) * batch - epoch * n])
    return np.concatenate(places)


@functools.lru_cache(2)
def _epoch(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


def shares(settings: TrainConfig, processes: int, index: int) -> list[slice]:
    """This process's micro-batches of the global batch."""
    if settings.batch % (processes * settings.accumulate):
        fix = "Choose a batch that they divide"
        cause = f"{processes} processes times accumulate = {settings.accumulate} do not divide the batch"
        raise ConfigError("BATCH", f"train.batch = {settings.batch}", cause, fix)
    size = settings.batch // processes // settings.accumulate
    first = index * settings.batch // processes
    return [slice(first + i * size, first + (i + 1) * size) for i in range(settings.accumulate)]
