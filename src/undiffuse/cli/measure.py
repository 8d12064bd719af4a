"""The batches of an evaluation, shared out among processes, and what they come to.

A batch is a function of the plan, the seed and its first item, whoever measures it, and which batches count is a
function of those that are kept. So results are the same for any number of processes, also where it changes on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from undiffuse import errors
from undiffuse.cli import partial
from undiffuse.cli.crew import Crew
from undiffuse.conditioning import Condition
from undiffuse.diffusion import Diffusion
from undiffuse.errors import UndiffuseError
from undiffuse.likelihood import NLL, concatenate

Kept = dict[int, tuple[NLL, float]]
"""Finished batches by their first items, and the seconds that each took."""
Measured = dict[str, tuple[NLL, float]]
"""The result of each estimate, and the seconds that it took over all sittings and processes."""


def measure(
    model: Diffusion,
    values: torch.Tensor,
    plan: partial.Plan,
    seed: int,
    folder: Path,
    key: str,
    console: Console,
    crew: Crew,
    strict: bool = True,
    cond: Condition | None = None,
) -> Measured:
    """The results of ``plan`` in the first process, nothing in others: each batch is read if it is kept in ``folder``.

    If not, one of the ``crew`` measures it and keeps it there. An estimate that the model has not (a flow that breaks
    down, say) is an error if ``strict``, else a line.
    """
    found: Measured = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        say: partial.Say = lambda line: bar.console.print(line, markup=False)  # noqa: E731
        task = bar.add_task("", total=None, left="")
        later = sum(job["expected"] for job in plan.values())
        for name, job in plan.items():
            later -= job["expected"]
            before = sum(seconds for _, seconds in found.values())

            def progress(spent: float, left: float, name: str = name, before: float = before, later: float = later):
                rest = timedelta(seconds=round((left + later) / crew.processes))
                total = before + spent + left + later
                bar.update(task, description=name, completed=before + spent, total=total, left=f"{rest} left")

            def read(start: int, name: str = name) -> tuple[NLL, float] | None:
                return partial.read(folder, key, f"{name}-{start:08d}", say)

            def make(start: int, name: str = name, job: dict[str, Any] = job) -> tuple[NLL, float]:
                here, began = slice(start, min(start + job["batch"], job["items"])), time.perf_counter()
                chosen = {"first": start, "estimate": name, "cond": cond and cond.take(here)}
                result = model.nll(values[here], seed, job["draws"], job["batch"], **chosen)
                seconds = time.perf_counter() - began
                partial.write(folder, key, f"{name}-{start:08d}", result, seconds)
                return result, seconds

            try:
                kept = _fill(job, read, make, crew, progress)
            except UndiffuseError as error:
                if strict or name == "discrete":
                    raise
                say(f"no estimate {name!r}: {error.where}: {error.cause}")
                continue
            if crew.rank == 0:
                found[name] = concatenate([result for result, _ in kept]), sum(seconds for _, seconds in kept)
    return found


def wanted(job: Mapping[str, Any], seconds: Mapping[int, float]) -> tuple[list[int], list[int]]:
    """The first items of the batches that count, and those of them that are missing, of ``seconds`` by first items.

    Where ``job["fit"]``, a batch counts if it fits into the seconds expected, by the pace of those before it; of them
    only those before the first missing one have a say, so that batches that are there too early change nothing.
    """
    counted, missing, spent, done = [], [], 0.0, 0
    for start in range(0, job["items"], job["batch"]):
        stop = min(start + job["batch"], job["items"])
        if job["fit"] and done and spent / done * stop > job["expected"]:
            break
        counted.append(start)
        if start not in seconds:
            missing.append(start)
        elif not missing:
            spent, done = spent + seconds[start], stop
    return counted, missing


def _fill(
    job: dict[str, Any],
    read: Callable[[int], tuple[NLL, float] | None],
    make: Callable[[int], tuple[NLL, float]],
    crew: Crew,
    progress: Callable[[float, float], None],
) -> list[tuple[NLL, float]]:
    """The batches that count, in order, in the first process: round by round each of the ``crew`` measures one."""
    look = range(0, job["items"], job["batch"]) if crew.rank == 0 else ()
    kept = {start: batch for start in look if (batch := read(start))}
    while True:
        counted, missing = wanted(job, {start: seconds for start, (_, seconds) in kept.items()})
        spent = sum(seconds for _, seconds in kept.values())
        progress(spent, spent / len(kept) * len(missing) if kept else job["expected"])
        todo: list[int] = crew.gather(missing[: crew.processes])[0]
        if not todo:
            return [kept[start] for start in counted] if crew.rank == 0 else []
        failed = None
        try:
            for start in todo[crew.rank : crew.rank + 1]:
                kept[start] = make(start)
        except UndiffuseError as error:
            failed = error
        said = failed and [type(failed).__name__, failed.code, failed.where, failed.cause, failed.fix]
        for kind, *told in filter(None, crew.gather(said)):
            raise getattr(errors, kind)(*told) from failed
        if crew.rank == 0:
            kept |= {start: batch for start in todo[1:] if (batch := read(start))}
