"""Training state on disk: one folder a checkpoint, whole or absent. No generator state: there is none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.checkpoint import fit_tensors, read_tensors, sync_folder, write_tensors
from undiffuse.errors import CheckpointError
from undiffuse.train.ema import Average


@dataclass
class Progress:
    """Where a run stands: ``step`` optimiser steps done in ``seconds``; the plan for its end, once made."""

    step: int = 0
    seconds: float = 0.0
    decay_from: int | None = None
    last_step: int | None = None


def write(
    folder: Path,
    progress: Progress,
    network: nn.Module,
    average: Average,
    optimiser: torch.optim.Optimizer,
    keep: int = 2,
    memory: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes ``folder``/step-*: files first, their sha256 in a manifest last, then one rename. Older ones go after.

    ``memory`` is what training remembers apart from these; where there is none there is no file of it.
    """
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f"partial-{progress.step:08d}"
    _discard(partial)
    partial.mkdir(parents=True)
    tags = {"undiffuse": "state"}
    write_tensors(partial / "network.safetensors", network.state_dict(), tags)
    write_tensors(partial / "average.safetensors", average.mean, tags)
    write_tensors(partial / "optimiser.safetensors", _flatten(optimiser), tags)
    if memory:
        write_tensors(partial / "memory.safetensors", memory, tags)
    _write_text(partial / "progress.json", json.dumps(asdict(progress)))
    manifest = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(partial.iterdir())}
    _write_text(partial / "manifest.json", json.dumps(manifest, indent=1))
    sync_folder(partial)
    _discard(final)
    os.replace(partial, final)
    sync_folder(folder)
    others = sorted(f for f in folder.glob("step-*") if f != final)
    older = [f for f in others if f.name < final.name]  # the run began before the newer ones: they were damaged
    for other in set(others) - set(older[len(older) + 1 - keep :]):
        _discard(other)
    return final


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
    for left in (*folder.glob("partial-*"), *folder.glob("trash-*")):
        shutil.rmtree(left, ignore_errors=True)
    damaged: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            return _read(candidate, network, average, optimiser, memory or {}), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError(
            "DAMAGED",
            folder,
            f"none of its {len(damaged)} checkpoints is whole, the newest: {damaged[0]}",
            "Train again into another folder",
        )
    return Progress(), damaged


def _read(
    folder: Path,
    network: nn.Module,
    average: Average,
    optimiser: torch.optim.Optimizer,
    memory: Mapping[str, Tensor],
) -> Progress:
    try:
        manifest: dict[str, str] = json.loads((folder / "manifest.json").read_text())
        for name, sha256 in manifest.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
                raise CheckpointError(
                    "DAMAGED", folder / name, "its contents do not match the manifest", "An older checkpoint is used"
                )
        progress = Progress(**json.loads((folder / "progress.json").read_text()))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "DAMAGED", folder, f"not a whole checkpoint ({error})", "An older checkpoint is used"
        ) from None
    weights, _ = read_tensors(folder / "network.safetensors")
    mean, _ = read_tensors(folder / "average.safetensors")
    moments, _ = read_tensors(folder / "optimiser.safetensors")
    fit_tensors(folder / "network.safetensors", network.state_dict(), weights)
    fit_tensors(folder / "average.safetensors", average.mean, mean)
    remembered = read_tensors(folder / "memory.safetensors")[0] if memory else {}
    fit_tensors(folder / "memory.safetensors", memory, remembered)
    network.load_state_dict(weights)
    average.load(mean)
    _unflatten(optimiser, moments)
    for name, tensor in remembered.items():
        memory[name].copy_(tensor)
    return progress


def _flatten(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimiser.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, moments in state.items() for key, value in moments.items()}


def _unflatten(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        i, key = name.split(".", 1)
        state.setdefault(int(i), {})[key] = tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def _discard(folder: Path) -> None:
    """Removes a folder so that no half of it can be taken for a whole: renamed first, then deleted."""
    if folder.exists():
        trash = folder.with_name(f"trash-{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
