"""The plan and the finished batches of an evaluation on disk, so that an interrupted one resumes to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from undiffuse.errors import CheckpointError
from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.runtime.atomic_file import json_digest
from undiffuse.runtime.folder_lock import lock_folder
from undiffuse.runtime.part_store import OTHER_JOB, Log, PartStore
from undiffuse.runtime.side_files import read_record, set_aside, write_record

Plan = dict[str, Any]
"""Plain data; see `undiffuse.evaluation.plan.plan_evaluation`."""
PLAN = "plan.json"
TENSORS = ("prior", "diffusion_nats", "decoder", "per_step")
"""The fields of an `NLL` that a batch holds as tensors."""
EXTRA = "extra."
"""The beginning of the names of an `NLL`'s further parts."""


def open_plan(folder: Path, request: dict[str, Any], choose: Callable[[], Plan], log: Log) -> tuple[Plan, PartStore]:
    """The plan of an evaluation and the store of its batches: those in ``folder`` if they answer the same ``request``.

    Otherwise the plan is ``choose()``. Both are plain data. A plan that answers another request is removed with its
    batches; one that is damaged or not ours is renamed. ``log`` receives a message about that, or about what is
    resumed.
    """
    request = json.loads(json.dumps(request))
    path = folder / PLAN
    begun = read_record(path) or {}
    if begun.keys() == {"request", "plan"}:
        if begun["request"] == request:
            store = batch_store(folder, json_digest([request, begun["plan"]]))
            log(f"resuming an interrupted evaluation; batches in {folder}: {len(store.names())}")
            return begun["plan"], store
        changed = [name for name, value in request.items() if begun["request"].get(name) != value]
        log(f"starting over: the evaluation in {folder} differs in {', '.join(changed) or 'its request'}")
        remove(folder)
    elif path.exists():
        log(f"starting over: the plan in {folder} is damaged or not ours, and is {set_aside(path).name} now")
    plan = json.loads(json.dumps(choose()))
    folder.mkdir(parents=True, exist_ok=True)
    write_record(path, {"request": request, "plan": plan})
    return plan, batch_store(folder, json_digest([request, plan]))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder``, which is made, for one evaluation until its results are written. Raises `ResourceError`."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock_folder(folder, "evaluating into"):
            yield
    finally:
        with suppress(OSError):
            folder.rmdir()


def check_plan(folder: Path, key: str) -> None:
    """Raise `CheckpointError` if the plan in ``folder`` is not the one with this ``key`` any more."""
    begun = read_record(folder / PLAN) or {}
    if json_digest([begun.get("request"), begun.get("plan")]) != key:
        cause = "another evaluation has written into this folder since this one began"
        raise CheckpointError(OTHER_JOB, folder, cause, "Run the same command again with another --out")


def batch_store(folder: Path, key: str) -> PartStore:
    """The store of the batches of the plan with this ``key``."""
    return PartStore(folder, "evaluation", key, r"[a-z_]+-\d{8,}")


def write(store: PartStore, batch: str, result: NLL, seconds: float) -> None:
    """Writes a finished batch and the seconds that it took."""
    tensors = {name: getattr(result, name) for name in TENSORS}
    tensors |= {EXTRA + name: part for name, part in result.extra.items()}
    store.write(batch, tensors, {"calls": str(result.calls), "seconds": str(seconds)})


def read(store: PartStore, batch: str, log: Log) -> tuple[NLL, float] | None:
    """A finished batch and its seconds; None if it is missing, or (with a message to ``log``) cannot be used."""
    if (part := store.get(batch, log)) is None:
        return None
    tensors, metadata = part
    prior, diffusion_nats, decoder, per_step = (tensors[name] for name in TENSORS)
    extra = {name.removeprefix(EXTRA): part for name, part in tensors.items() if name.startswith(EXTRA)}
    nll = make_nll(prior, diffusion_nats, decoder, int(metadata["calls"]), per_step, extra)
    return nll, float(metadata["seconds"])


def remove(folder: Path) -> None:
    """Remove the plan and the batches, and the folder if nothing else is in it."""
    (folder / f"{PLAN}.partial").unlink(missing_ok=True)
    if read_record(folder / PLAN) is not None:
        (folder / PLAN).unlink()
    batch_store(folder, "").remove()
