"""What an evaluation has finished, kept on disk, so that an interrupted one goes on and ends in the same bits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from undiffuse.checkpoint import read_tensors, sync_folder, write_tensors
from undiffuse.errors import CheckpointError
from undiffuse.likelihood import NLL
from undiffuse.likelihood.nll import nll

Say = Callable[[str], None]
Plan = dict[str, Any]


def begin(folder: Path, asked: dict[str, Any], choose: Callable[[], Plan], say: Say) -> tuple[Plan, str]:
    """The plan of an evaluation and its sha256: the one begun in ``folder`` if the same was asked, else ``choose()``.

    ``asked`` and the plan are plain data. A plan that is damaged or answers something else is discarded, and the
    batches with it; ``say`` is told so, or what goes on.
    """
    asked = json.loads(json.dumps(asked))
    if (folder / "plan.json").is_file():
        try:
            begun = json.loads((folder / "plan.json").read_text())
            if begun["sha256"] != _digest(begun["asked"], begun["plan"]):
                raise ValueError
            if begun["asked"] == asked:
                kept = len(list(folder.glob("*.safetensors")))
                say(f"an interrupted evaluation goes on; batches kept in {folder}: {kept}")
                return begun["plan"], begun["sha256"]
            changed = [key for key, value in asked.items() if begun["asked"].get(key) != value]
            say(f"begun anew: what was begun in {folder} differs in {', '.join(changed) or 'what was asked'}")
        except (ValueError, LookupError, TypeError, AttributeError):
            say(f"begun anew: the plan in {folder} is damaged")
        remove(folder)
    plan = json.loads(json.dumps(choose()))
    key = _digest(asked, plan)
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "plan.json.partial"
    with open(beside, "w") as file:
        json.dump({"asked": asked, "plan": plan, "sha256": key}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / "plan.json")
    sync_folder(folder)
    return plan, key


def write(folder: Path, key: str, batch: str, result: NLL, seconds: float) -> None:
    """Keeps a finished batch of the plan ``key``."""
    tensors = {name: getattr(result, name) for name in ("prior", "steps", "decoder", "per_step")}
    told = {"undiffuse": "evaluation", "plan": key, "batch": batch}
    write_tensors(
        folder / f"{batch}.safetensors", tensors, {**told, "calls": str(result.calls), "seconds": str(seconds)}
    )


def read(folder: Path, key: str, batch: str, say: Say) -> tuple[NLL, float] | None:
    """A batch that is kept and its seconds, or None; ``say`` is told of one that is damaged or another plan's."""
    path = folder / f"{batch}.safetensors"
    if not path.exists():
        return None
    try:
        tensors, told = read_tensors(path)
    except CheckpointError as error:
        say(f"measured again: {path.name}, {error.cause}")
        return None
    if (told.get("undiffuse"), told.get("plan"), told.get("batch")) != ("evaluation", key, batch):
        say(f"measured again: {path.name}, it belongs to another evaluation")
        return None
    prior, steps, decoder, per_step = (tensors[name] for name in ("prior", "steps", "decoder", "per_step"))
    return nll(prior, steps, decoder, int(told["calls"]), per_step), float(told["seconds"])


def remove(folder: Path) -> None:
    """Removes what the above wrote, and the folder if nothing else is in it."""
    for path in [*folder.glob("plan.json*"), *folder.glob("*.safetensors*")]:
        path.unlink()
    with suppress(OSError):
        folder.rmdir()


def _digest(asked: dict[str, Any], plan: Plan) -> str:
    return hashlib.sha256(json.dumps([asked, plan], sort_keys=True).encode()).hexdigest()
