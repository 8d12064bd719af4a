"""The batch of a step: items, noise and conditions, all of them functions of (seed, purpose, step or item)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from undiffuse.data.dataset import Dataset
from undiffuse.data.lazy_array import LazyArray
from undiffuse.data.resolution import ResolutionSplit
from undiffuse.data.stage_data import StageData, add_image
from undiffuse.errors import ConfigError
from undiffuse.model.config import TrainConfig
from undiffuse.networks.condition import Condition
from undiffuse.process.seeded_noise import ItemNoise, generator, uniform
from undiffuse.process.time_sampling import low_discrepancy
from undiffuse.runtime.device import to_device
from undiffuse.training.augmentation import augment

CPU = torch.device("cpu")
CLEAN_IMAGES = 0.1
"""Fraction of the items of super-resolution that get the low resolution without noise, as likelihoods do."""


class Reader(NamedTuple):
    """What batches are made of.

    ``read``: the values (B, ...) that are trained on, augmented, from (items, settings, step), a function of these
    alone. ``noise_shape``: the shape of an item's noises, by default that of its values.
    """

    read: Callable[[np.ndarray, TrainConfig, int], np.ndarray]
    noise_shape: tuple[int, ...] | None = None


def values_of(data: Dataset) -> Reader:
    """The `Reader` of the values of ``data`` themselves; of the stage of a cascade, of its images before the split."""
    source = data.full if isinstance(data, StageData) and data.low is not None else data
    return Reader(lambda items, settings, step: augment(source.values[items], settings, step))


@dataclass(frozen=True)
class Batch:
    """``values`` (B, ...) of the task's `Reader`, and uniform numbers ``u`` and ``r`` (B,) in [0, 1).

    Those of ``u`` are evenly spaced in a global batch, those of ``r`` independent. The noises ``eps`` and ``z``, of
    ``noise_shape`` for each item, are functions of ``seed`` and the item's number in the run, one of ``numbers``; they
    are made on ``device`` when they are used. ``fraction``: how much of the run was done before this step, in [0, 1).
    """

    values: Tensor
    u: Tensor
    r: Tensor
    cond: Condition | None
    numbers: range
    noise_shape: tuple[int, ...]
    seed: int
    device: torch.device = CPU
    fraction: float = 0.0

    @cached_property
    def eps(self) -> Tensor:
        return self._noise("train")

    @cached_property
    def z(self) -> Tensor:
        return self._noise("train, further noise")

    def _noise(self, purpose: str) -> Tensor:
        return ItemNoise(self.seed, self.numbers, self.noise_shape, purpose, self.device)(1)[0]

    def take(self, part: slice, device: torch.device) -> Batch:
        """The items ``part`` on ``device``, except for u and r, which stay on the CPU."""
        cond, values = self.cond and self.cond.take(part).to(device), to_device(self.values[part], device)
        return replace(
            self, values=values, u=self.u[part], r=self.r[part], cond=cond, numbers=self.numbers[part], device=device
        )


class Batches:
    """The `global_batch` of each step; a thread makes the next one while the current one is trained on.

    Data that are not `LazyArray.thread_safe` are read by the caller's thread when they are needed. ``waited``: seconds
    that training has waited for data so far. A context manager, which ends the thread.
    """

    def __init__(
        self,
        data: Dataset,
        items: np.ndarray,
        settings: TrainConfig,
        clock: Callable[[], float],
        reader: Reader,
    ) -> None:
        self.data, self.items, self.settings, self.clock, self.reader = data, items, settings, clock, reader
        self.pool = ThreadPoolExecutor(1, "batches")
        self.pending: dict[int, Future[Batch]] = {}
        self.waited = 0.0

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *failure: object) -> None:
        self.pool.shutdown()

    def __call__(self, step: int) -> Batch:
        began, values = self.clock(), self.data.values
        # some image decoders change the warning filters of the whole process, so nothing may run beside them
        if isinstance(values, LazyArray) and not values.thread_safe:
            batch = self._make(step)
        else:
            current = self.pending.get(step) or self.pool.submit(self._make, step)
            self.pending = {step + 1: self.pool.submit(self._make, step + 1)}
            batch = current.result()
        self.waited += self.clock() - began
        return batch

    def _make(self, step: int) -> Batch:
        return global_batch(self.data, self.items, self.settings, step, self.reader)


def global_batch(data: Dataset, items: np.ndarray, settings: TrainConfig, step: int, reader: Reader) -> Batch:
    """The whole batch of a step, over all processes: a function of (seed, step) alone, as are its noises.

    Dropped conditions, and the caption of an item with several, are drawn with keys of their own, so that values and
    noise are those of unconditional training, and so is the noise of conditioning images (`image_noise_std`).
    ``reader`` gives the values.
    """
    chosen = batch_items(items, settings, step)
    stage = data if isinstance(data, StageData) and data.low is not None else None
    source = data if stage is None else stage.full
    fractions = uniform(settings.batch, generator(settings.seed, "caption", step))
    cond = source.given_condition(chosen, settings.conditional, fractions.numpy())
    values = reader.read(chosen, settings, step)
    if stage is not None:  # after augmentation, so that the two parts fit together
        values, cond = with_noisy_image(stage.resolution, values, cond, settings, step)
    if settings.conditional and cond is not None:
        g = generator(settings.seed, "condition", step)
        cond = cond.drop(uniform(settings.batch, g) < settings.condition_dropout)
        if source.captions and cond.label is not None:
            g = generator(settings.seed, "label or caption", step)
            cond = drop_label_or_caption(cond, uniform(settings.batch, g), settings.condition_dropout)
    g = generator(settings.seed, "train", step)
    u = low_discrepancy(torch.rand((), generator=g, dtype=torch.float64), settings.batch)
    u = u[torch.randperm(settings.batch, generator=g)]
    r = torch.rand(settings.batch, generator=g, dtype=torch.float64)
    numbers = range(step * settings.batch, (step + 1) * settings.batch)
    shape = tuple(values.shape[1:]) if reader.noise_shape is None else reader.noise_shape
    return Batch(torch.from_numpy(np.ascontiguousarray(values)), u, r, cond, numbers, shape, settings.seed)


def drop_label_or_caption(cond: Condition, u: Tensor, fraction: float) -> Condition:
    """``cond`` without the label where ``u`` (B,) is small, without the caption where it is large.

    These are u < fraction and u >= 1 − fraction. The model then also learns each condition alone.
    """
    no_label = replace(cond, label=cond.drop(u < fraction).label)
    return replace(no_label.drop(u >= 1 - fraction), label=no_label.label)


def with_noisy_image(
    split: ResolutionSplit, values: np.ndarray, cond: Condition | None, settings: TrainConfig, step: int
) -> tuple[np.ndarray, Condition]:
    """Images ``values`` (B, ...) of full resolution as (rest, ``cond`` with the low resolution and noise on it).

    The standard deviation of the noise is that of `image_noise_std` for a uniform number of each item.
    """
    g = generator(settings.seed, "image noise", step)
    cond = add_image(cond or Condition(), split, low := split.low(values))
    std = image_noise_std(uniform(len(values), g), settings.image_noise)
    noise = torch.randn(low.shape, generator=g, dtype=torch.float32)
    return split.rest(values), cond.with_image_noise(std, noise)


def image_noise_std(u: Tensor, largest: float) -> Tensor:
    """largest · max(0, (u − c)/(1 − c)), c = `CLEAN_IMAGES`: 0 for that share of items, else uniform to ``largest``."""
    return largest * ((u - CLEAN_IMAGES) / (1 - CLEAN_IMAGES)).clamp(min=0)


class TrainingStatistics:
    """The `DataStatistics` of the ``items`` of ``data``, the conditions' only in ``conditional`` training."""

    def __init__(self, data: Dataset, items: np.ndarray, conditional: bool) -> None:
        self.data, self.items, self.conditional = data, items, conditional

    @property
    def counts(self) -> Tensor:
        return torch.from_numpy(self.data.counts(self.items))

    @property
    def vector_moments(self) -> tuple[Tensor, Tensor] | None:
        vectors = self.data.condition_vectors(self.items) if self.conditional else None
        if vectors is None:
            return None
        vectors = torch.from_numpy(vectors).double()
        std = vectors.std(0, correction=0)
        return vectors.mean(0), torch.where(std > 0, std, 1.0)


def batch_items(items: np.ndarray, settings: TrainConfig, step: int) -> np.ndarray:
    """Which of ``items`` are in the batch of a step, in the order of the batch, (B,)."""
    return np.sort(items[batch_order(len(items), settings.batch, settings.seed, step)])


def batch_order(n: int, batch: int, seed: int, step: int) -> np.ndarray:
    """Indices into n items, (batch,): a window of the endless sequence of epochs, each a permutation of the items."""
    parts = []
    for epoch in range(step * batch // n, ((step + 1) * batch - 1) // n + 1):
        order = _permutation(n, seed, epoch)
        parts.append(order[max(step * batch - epoch * n, 0) : (step + 1) * batch - epoch * n])
    return np.concatenate(parts)


@functools.lru_cache(2)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n)


def micro_batches(settings: TrainConfig, processes: int, index: int) -> list[slice]:
    """The slices of the global batch that process ``index`` computes, ``accumulate`` of them. Raises `ConfigError`."""
    if settings.batch % (processes * settings.accumulate):
        cause = f"{processes} processes times accumulate = {settings.accumulate} do not divide the batch"
        raise ConfigError("BATCH", f"train.batch = {settings.batch}", cause, "Give a batch that is a multiple of them")
    size = settings.batch // processes // settings.accumulate
    first = index * settings.batch // processes
    return [slice(first + i * size, first + (i + 1) * size) for i in range(settings.accumulate)]
