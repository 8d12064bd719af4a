"""The plan and the finished batches of an evaluation on disk, so that an interrupted one resumes to the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.runtime.atomic_file import write_atomic
from undiffuse.runtime.part_store import PartStore, Report, plan_key

Plan = dict[str, Any]
"""Plain data; see `undiffuse.evaluation.plan.plan_evaluation`."""
TENSORS = ("prior", "diffusion_nats", "decoder", "per_step")
"""The fields of an `NLL` that a batch holds as tensors."""


def open_plan(
    folder: Path, request: dict[str, Any], choose: Callable[[], Plan], report: Report
) -> tuple[Plan, PartStore]:
    """The plan of an evaluation and the store of its batches: those in ``folder`` if they answer the same ``request``.

    Otherwise the plan is ``choose()``. Both are plain data. A plan that is damaged or answers another request is
    removed with its batches; ``report`` receives a message about that, or about what is resumed.
    """
    request = json.loads(json.dumps(request))
    path = folder / "plan.json"
    if path.is_file():
        try:
            begun = json.loads(path.read_text())
            if begun["sha256"] != plan_key([begun["request"], begun["plan"]]):
                raise ValueError
            if begun["request"] == request:
                store = batch_store(folder, begun["sha256"])
                report(f"resuming an interrupted evaluation; batches in {folder}: {len(store.names())}")
                return begun["plan"], store
            changed = [name for name, value in request.items() if begun["request"].get(name) != value]
            report(f"starting over: the evaluation in {folder} differs in {', '.join(changed) or 'its request'}")
        except (ValueError, LookupError, TypeError, AttributeError):
            report(f"starting over: the plan in {folder} is damaged")
        remove(folder)
    plan = json.loads(json.dumps(choose()))
    key = plan_key([request, plan])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"request": request, "plan": plan, "sha256": key}, indent=1).encode())
    return plan, batch_store(folder, key)


def batch_store(folder: Path, key: str) -> PartStore:
    """The store of the batches of the plan with this ``key``."""
    return PartStore(folder, "evaluation", key, r"[a-z]+-\d{8,}")


def write(store: PartStore, batch: str, result: NLL, seconds: float) -> None:
    """Writes a finished batch and the seconds that it took."""
    tensors = {name: getattr(result, name) for name in TENSORS}
    store.write(batch, tensors, {"calls": str(result.calls), "seconds": str(seconds)})


def read(store: PartStore, batch: str, report: Report) -> tuple[NLL, float] | None:
    """A finished batch and its seconds; None if it is missing, or (with a message to ``report``) cannot be used."""
    if (part := store.get(batch, report)) is None:
        return None
    tensors, metadata = part
    prior, diffusion_nats, decoder, per_step = (tensors[name] for name in TENSORS)
    nll = make_nll(prior, diffusion_nats, decoder, int(metadata["calls"]), per_step)
    return nll, float(metadata["seconds"])


def remove(folder: Path) -> None:
    """Removes the plan and the batches, and the folder if nothing else is in it."""
    for path in folder.glob("plan.json*"):
        path.unlink()
    batch_store(folder, "").remove()
