"""What a step is trained on: its items, its random numbers and what the network is told, from (seed, purpose, step)."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from undiffuse.conditioning import Condition
from undiffuse.config import TrainConfig
from undiffuse.data import Dataset
from undiffuse.data.rows import Rows
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.networks.embedding import Vector
from undiffuse.process.times import low_discrepancy
from undiffuse.randomness import generator
from undiffuse.train.augment import augmented

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Condition | None]


class Batches:
    """The batches of a run, `global_batch` by step, each made in a thread while the one before is trained on.

    ``waited`` is for how many seconds training stood still for them so far.
    """

    def __init__(self, pool: ThreadPoolExecutor, data: Dataset, items: np.ndarray, settings: TrainConfig) -> None:
        self.pool, self.data, self.items, self.settings = pool, data, items, settings
        self.ahead: dict[int, Future[Batch]] = {}
        self.waited = 0.0

    def __call__(self, step: int) -> Batch:
        began = time.perf_counter()
        asked = self.ahead.get(step) or self._ask(step)
        # a decoder sets what a warning is for the whole process, so nothing else may run beside it
        values = self.data.values
        alone = isinstance(values, Rows) and not values.beside
        self.ahead = {} if alone else {step + 1: self._ask(step + 1)}
        batch = asked.result()
        self.waited += time.perf_counter() - began
        return batch

    def _ask(self, step: int) -> Future[Batch]:
        return self.pool.submit(global_batch, self.data, self.items, self.settings, step)


@contextmanager
def batches(data: Dataset, items: np.ndarray, settings: TrainConfig) -> Iterator[Batches]:
    """The `Batches` of a run, whose thread ends with the block."""
    with ThreadPoolExecutor(1, "batches") as pool:
        yield Batches(pool, data, items, settings)


def global_batch(data: Dataset, items: np.ndarray, settings: TrainConfig, step: int) -> Batch:
    """(values, u, eps, z, cond) of a step's whole batch, functions of (seed, step) alone.

    Who is told nothing has a key of its own: conditional training sees the values and the noise of any other.
    """
    chosen = batch_items(items, settings, step)
    values, cond = data.values[chosen], None
    if settings.conditional:
        g = generator(settings.seed, "condition", step)
        cond = data.condition(chosen).drop(torch.rand(settings.batch, generator=g) < settings.condition_dropout)
    g = generator(settings.seed, "train", step)
    u = low_discrepancy(torch.rand((), generator=g, dtype=torch.float64), settings.batch)
    u = u[torch.randperm(settings.batch, generator=g)]
    eps, z = torch.randn(2, *values.shape, generator=g)
    return torch.from_numpy(np.ascontiguousarray(augmented(values, settings, step))), u, eps, z, cond


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
