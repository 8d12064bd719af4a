"""Training state on disk: one folder a checkpoint, whole or absent. No generator state: there is none."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.checkpoint import fit_tensors, read_tensors, sync_folder, unwritten, write_file, write_tensors
from undiffuse.errors import CheckpointError, NonFiniteError, ResourceError
from undiffuse.train.ema import Average
from undiffuse.train.parallel import gathered, shared_like


@dataclass
class Progress:
    """Where a run stands: ``step`` optimiser steps done in ``seconds``; the plan for its end, once made."""

    step: int = 0
    seconds: float = 0.0
    decay_from: int | None = None
    last_step: int | None = None
    left_out: int = 0
    """Steps in a row, up to here, whose loss or gradient was no number."""
    length: float | None = None
    """The steps or minutes that the plan is for: it is made anew where a run is to be longer."""


def write(
    folder: Path,
    progress: Progress,
    network: nn.Module,
    average: Average,
    optimiser: torch.optim.Optimizer,
    keep: int = 2,
    memory: Mapping[str, Tensor] | None = None,
    first: bool = True,
) -> Path:
    """Writes ``folder``/step-*: files first, their sha256 in a manifest last, then one rename. Older ones go after.

    ``memory`` is what training remembers apart from these; where there is none there is no file of it. Every process
    calls it, and the ``first`` one writes: what is in shares comes together there.
    Raises `NonFiniteError` where one of them is no number, and `ResourceError`; then nothing is changed.
    """
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f"partial-{progress.step:08d}"
    parts = {k: gathered(v, first) for k, v in _parts(network, average, optimiser, memory).items()}
    if not first:
        return final
    for part, tensors in parts.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                cause = f"{name!r} of its {part} holds numbers that are not finite, so it is not written"
                fix = "Lower train.lr; the last checkpoint is good"
                raise NonFiniteError("NON_FINITE", final, cause, fix)
    try:
        _discard(partial)
        partial.mkdir(parents=True)
        tags = {"undiffuse": "state"}
        manifest = {f"{k}.safetensors": write_tensors(partial / f"{k}.safetensors", v, tags) for k, v in parts.items()}
        text = json.dumps(asdict(progress)).encode()
        write_file(partial / "progress.json", text)
        manifest["progress.json"] = hashlib.sha256(text).hexdigest()
        write_file(partial / "manifest.json", _manifest_text(manifest))
        _discard(final)
        os.replace(partial, final)
        sync_folder(folder)
    except (OSError, ResourceError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, ResourceError):
            raise
        size = sum(t.nbytes for tensors in parts.values() for t in tensors.values())
        raise unwritten(final, size, error) from None
    others = sorted(f for f in folder.glob("step-*") if f != final)
    older = [f for f in others if f.name < final.name]  # the run began before the newer ones: they were damaged
    kept = set(older[len(older) + 1 - keep :])
    if progress.decay_from is not None:  # a longer run goes on from there
        kept.update(_before_decay(older, progress)[-1:])
    for other in set(others) - kept:
        with suppress(OSError):  # the new one is whole whatever happens to the old ones
            _discard(other)
    return final


def turning_point(folder: Path) -> int:
    """The step that a longer run goes on from: the newest whole checkpoint before the decay, else the newest.

    Raises `CheckpointError` where none is whole.
    """
    whole: dict[Path, Progress] = {}
    for candidate in sorted(folder.glob("step-*")):
        with suppress(CheckpointError):
            whole[candidate] = _verify(candidate)
    if not whole:
        raise CheckpointError("DAMAGED", folder, "none of its checkpoints is whole", "Train into another folder")
    return whole[(_before_decay(list(whole), list(whole.values())[-1]) or list(whole))[-1]].step


def rewind(folder: Path, step: int, length: float) -> int:
    """The step of the newest checkpoint, once those after ``step`` are gone that no run of ``length`` wrote.

    ``length`` is in steps or minutes, as the recipe says it.
    """
    for later in [path for path in folder.glob("step-*") if int(path.name[-8:]) > step]:
        with suppress(CheckpointError):
            if _verify(later).length == length:
                continue
        _discard(later)
    return max((int(path.name[-8:]) for path in folder.glob("step-*")), default=0)


def _before_decay(checkpoints: list[Path], progress: Progress) -> list[Path]:
    """Those at whose step the learning rate has not begun to fall, by the plan of ``progress``."""
    begins = math.inf if progress.decay_from is None else progress.decay_from
    return [path for path in checkpoints if int(path.name[-8:]) <= begins]


def tidy(folder: Path) -> None:
    """Finishes or removes what a killed `write` left: a folder that was whole, all but its name, gets that."""
    for left in folder.glob("partial-*"):
        final = left.with_name(left.name.replace("partial", "step"))
        with suppress(CheckpointError):
            if not final.exists():
                _verify(left)
                os.replace(left, final)
    for left in (*folder.glob("partial-*"), *folder.glob("trash-*")):
        shutil.rmtree(left, ignore_errors=True)


def read_latest(
    folder: Path,
    network: nn.Module,
    average: Average,
    optimiser: torch.optim.Optimizer,
    memory: Mapping[str, Tensor] | None = None,
) -> tuple[Progress, list[str]]:
    """Loads the newest whole checkpoint; returns where it stands and a line for each damaged one passed over.

    The tensors of ``memory`` are filled in place. Progress 0 if there is none. Raises `CheckpointError` if there
    are some and none is whole.
    """
    damaged: list[CheckpointError] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            progress = _read(candidate, network, average, optimiser, memory or {})
        except CheckpointError as error:
            damaged.append(error)
        else:
            return progress, [str(error) for error in damaged]
    if damaged:
        cause = f"none of its {len(damaged)} checkpoints is whole, the newest: {damaged[0].where}: {damaged[0].cause}"
        raise CheckpointError("DAMAGED", folder, cause, "Train again into another folder")
    return Progress(), []


def _read(
    folder: Path,
    network: nn.Module,
    average: Average,
    optimiser: torch.optim.Optimizer,
    memory: Mapping[str, Tensor],
) -> Progress:
    progress = _verify(folder)
    found: dict[str, dict[str, Tensor]] = {}
    for part, wanted in _parts(network, average, optimiser, memory).items():
        path = folder / f"{part}.safetensors"
        found[part], _ = read_tensors(path)
        fit_tensors(path, found[part] if part == "optimiser" else wanted, found[part])
        found[part] = {name: shared_like(t, wanted.get(name, t)) for name, t in found[part].items()}
    network.load_state_dict(found["network"])
    average.load(found["average"])
    _unflatten(optimiser, found["optimiser"])
    for name, tensor in memory.items():
        tensor.copy_(found["memory"][name])
    return progress


def _verify(folder: Path) -> Progress:
    """Where a whole checkpoint stands. Raises `CheckpointError` naming the file that is not what was written.

    The manifest needs no sha256 of its own: it has one form, and all that it says is compared with the files.
    """
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
        manifest: dict[str, str] = json.loads(text)
        if _manifest_text(manifest) != text or "progress.json" not in manifest:
            raise ValueError("it is not as it was written")
        for name, sha256 in manifest.items():
            path = folder / name
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ValueError("its contents do not match the manifest")
        path = folder / "progress.json"
        progress = Progress(**json.loads(path.read_bytes()))
        if not folder.name.endswith(f"-{progress.step:08d}"):
            raise ValueError(f"it is that of step {progress.step}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        cause = f"not as the manifest says ({getattr(error, 'strerror', None) or error})"
        raise CheckpointError("DAMAGED", path, cause, "An older checkpoint is used") from None
    return progress


def _manifest_text(manifest: Mapping[str, str]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _parts(
    network: nn.Module, average: Average, optimiser: torch.optim.Optimizer, memory: Mapping[str, Tensor] | None
) -> dict[str, Mapping[str, Tensor]]:
    """What a checkpoint holds, a file each."""
    parts = {"network": network.state_dict(), "average": average.mean, "optimiser": _flatten(optimiser)}
    return {**parts, "memory": memory} if memory else parts


def _flatten(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimiser.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, moments in state.items() for key, value in moments.items()}


def _unflatten(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        i, key = name.split(".", 1)
        own = parameters[int(i)]
        state.setdefault(int(i), {})[key] = shared_like(tensor, own) if tensor.shape == own.shape else tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _discard(folder: Path) -> None:
    """Removes a folder so that no half of it can be taken for a whole: renamed first, then deleted."""
    if folder.exists():
        trash = folder.with_name(f"trash-{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)
