"""The batches of an estimate: their items, the number that counts in a given time, and their measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from undiffuse import errors
from undiffuse.errors import UndiffuseError
from undiffuse.likelihood.nll import NLL
from undiffuse.model.cascade import AnyModel
from undiffuse.networks.condition import Condition
from undiffuse.runtime.device import halve_while_out_of_memory
from undiffuse.runtime.distributed_group import ProcessGroup
from undiffuse.runtime.part_store import Log

FinishedBatch = tuple[NLL, float]
"""A finished batch and the seconds that it took."""
ReadItems = Callable[[slice], tuple[torch.Tensor, Condition | None]]
"""The values and conditions of a slice of the items."""
MIN_FLOW_ITEMS = 2
"""Fewest items of the flow at any speed: one has no standard error."""


def batch_stops(job: Mapping[str, Any]) -> dict[int, int]:
    """The first item of each batch and the item after its last: each as large as all before it, at most "batch"."""
    stops, start, size = {}, 0, job["first"]
    while start < job["items"]:
        stop = min(start + size, job["items"])
        stops[start], start = stop, stop
        size = min(start, job["batch"])
    return stops


def batch_name(name: str, start: int) -> str:
    """The name of the batch of an estimate that begins with item ``start``."""
    return f"{name}-{start:08d}"


def measure(
    model: AnyModel,
    name: str,
    here: slice,
    seed: int,
    mc_samples: int | None,
    read_items: ReadItems,
    log: Log,
    size: int | None = None,
) -> tuple[FinishedBatch, int]:
    """The batch of the items ``here``, ``size`` (by default all) at once; and the number at once that fit in memory."""
    began = time.perf_counter()
    values, cond = read_items(here)
    nll = partial(model.nll, values, seed, mc_samples, first=here.start or 0, estimate=name, cond=cond)
    result, size = halve_while_out_of_memory(nll, size or len(values), log)
    return (result, time.perf_counter() - began), size


def needed_batches(job: Mapping[str, Any], seconds: Mapping[int, float]) -> tuple[list[int], list[int]]:
    """The first items of the batches that count, and of those that are missing; ``seconds`` are of finished batches.

    Where ``job["fit"]``, a batch counts if it fits into the expected seconds at the pace of the batches before it. Only
    batches before the first missing one set the pace, so that batches finished out of order change nothing. The first
    `MIN_FLOW_ITEMS` items always count.
    """
    counting, missing, spent, done = [], [], 0.0, 0
    for start, stop in batch_stops(job).items():
        in_time = not done or spent / done * stop <= job["expected"]
        if job["fit"] and start >= MIN_FLOW_ITEMS and not in_time:
            break
        counting.append(start)
        if start not in seconds:
            missing.append(start)
        elif not missing:
            spent, done = spent + seconds[start], stop
    return counting, missing


def compute_batches(
    job: dict[str, Any],
    read: Callable[[int], FinishedBatch | None],
    compute: Callable[[int, int], FinishedBatch],
    group: ProcessGroup,
    update: Callable[[float, float], None],
) -> list[FinishedBatch]:
    """The batches that count, in order, in the first process; in each round every process of ``group`` computes one.

    ``update`` is called with the seconds spent and left. An error of one process is raised in all.
    """
    stops = batch_stops(job)
    finished = {start: batch for start in stops if (batch := read(start))} if group.rank == 0 else {}
    while True:
        counting, missing = needed_batches(job, {start: seconds for start, (_, seconds) in finished.items()})
        spent = sum(seconds for _, seconds in finished.values())
        done, left = (sum(stops[start] - start for start in starts) for starts in (finished, missing))
        update(spent, spent / done * left if done else job["expected"])
        todo: list[int] = group.gather(missing[: group.world_size])[0]
        if not todo:
            return [finished[start] for start in counting] if group.rank == 0 else []
        failure = None
        try:
            for start in todo[group.rank : group.rank + 1]:
                finished[start] = compute(start, stops[start])
        except UndiffuseError as error:
            failure = error
        raise_in_all(failure, group)
        if group.rank == 0:
            finished |= {start: batch for start in todo[1:] if (batch := read(start))}


def raise_in_all(failure: UndiffuseError | None, group: ProcessGroup) -> None:
    """Raise the first ``failure`` of the processes of ``group`` in every process; all call this together."""
    kinds = [kind.__name__ for kind in type(failure).__mro__ if hasattr(errors, kind.__name__)]
    own = failure and [kinds[0], failure.code, failure.where, failure.cause, failure.fix]
    for rank, fields in enumerate(group.gather(own)):
        if fields:
            raise failure if failure and rank == group.rank else getattr(errors, fields[0])(*fields[1:])
