"""The state of training, in memory and on disk: a folder for each checkpoint, complete or absent.

Random numbers are functions of (seed, purpose, step or item), so there are no generators to store.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from undiffuse.errors import CheckpointError, NonFiniteError, ResourceError
from undiffuse.runtime.atomic_file import file_digest, fsync_folder, write_atomic, write_error
from undiffuse.runtime.tensor_file import check_tensors, read_tensors, write_tensors
from undiffuse.training.distributed import distribute_like, gather_full, shard_network
from undiffuse.training.ema import PowerEMA
from undiffuse.training.nonfinite import checkpoint_status
from undiffuse.training.optimizer import has_moment, make_optimizer
from undiffuse.training.posthoc_ema import EMASnapshots
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import checkpoint_folders, named_folders, step_of
from undiffuse.training.task import Task

KEPT_CHECKPOINTS = 2
"""The newest checkpoints that a run keeps, so that it resumes where the last one is damaged."""


class StateParts(NamedTuple):
    """What a checkpoint stores: the weights of ``model``, their averages, the optimizer's moments, and more tensors."""

    model: nn.Module
    ema: PowerEMA
    optimizer: torch.optim.Optimizer
    extra: Mapping[str, Tensor] = {}

    def by_file(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors by file and name; without any in ``extra`` there is no file for them."""
        files = {"network": self.model.state_dict(), "average": self.ema.mean, "optimizer": _moments(self.optimizer)}
        return {**files, "extra": self.extra} if self.extra else files


class TrainState:
    """Everything that steps change but `Progress`: ``model``, its averages, the optimizer, and the task's own state.

    ``ema_model`` is a copy in evaluation mode that holds the averaged weights after `save`. With several processes and
    ``train.shard``, the model's network is sharded here.
    """

    def __init__(self, task: Task, model: Any, snapshots: Path, accelerator: Accelerator) -> None:
        settings, self.main = task.config.train, accelerator.is_main_process
        self.task, self.model, self.ema_model = task, model, deepcopy(model).eval()
        shard_network(model.network.train(), settings, accelerator.num_processes, accelerator.device)
        self.optimizer = make_optimizer(task.parameter_groups(model), model.network, settings)
        self.ema = PowerEMA(model, settings.ema)
        self.snapshots = EMASnapshots(model, self.ema, settings.ema, settings.snapshots, snapshots)

    @property
    def parts(self) -> StateParts:
        """The parts of a checkpoint; ``extra`` are the task's own state and the averages for snapshots."""
        extra = self.task.extra_state(self.model) | self.snapshots.state
        return StateParts(self.model, self.ema, self.optimizer, extra)

    def load_latest(self, folder: Path, run_id: str = "") -> tuple[Progress, list[str]]:
        """`load_latest` of this state, also into ``ema_model``; snapshots of later steps are removed."""
        progress, warnings = load_latest(folder, self.parts, run_id)
        progress.run = run_id
        self.ema.copy_to(self.ema_model)
        if self.main:
            self.snapshots.drop_after(progress.step)
        return progress, warnings

    def step(self, lr: float, step: int) -> None:
        """Move weights and averages by optimizer step ``step``, counted from 1.

        The learning rate is ``lr`` times each group's ``lr_factor``.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.step()
        self.ema.update(self.model, step)
        self.snapshots.update(self.model, step)

    def save(self, folder: Path, progress: Progress) -> None:
        """Write a checkpoint, and copy the averaged weights to ``ema_model``."""
        self.ema.copy_to(self.ema_model)
        write_checkpoint(folder, progress, self.parts, main=self.main)


def write_checkpoint(folder: Path, progress: Progress, parts: StateParts, main: bool = True) -> Path:
    """Write ``folder``/step-N; of older ones keep the newest `KEPT_CHECKPOINTS` − 1 and the last before the decay.

    Files come first, then a manifest of their sha256, then one rename: the checkpoint is complete or absent. Every
    process calls it, and the ``main`` one writes. Raises `NonFiniteError` if a tensor holds a NaN or infinity, and
    `ResourceError`; then nothing has changed.
    """
    final = folder / f"step-{progress.step:08d}"
    partial = folder / f"partial-{progress.step:08d}"
    files = {k: gather_full(v, main) for k, v in parts.by_file().items()}
    if not main:
        return final
    for part, tensors in files.items():
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                cause = f"{name!r} of its {part} is not finite, so it is not written"
                fix = f"Lower train.lr; {checkpoint_status(folder)}"
                raise NonFiniteError("NON_FINITE", final, cause, fix)
    try:
        _discard(partial)
        partial.mkdir(parents=True)
        tags = {"undiffuse": "state"}
        manifest = {f"{k}.safetensors": write_tensors(partial / f"{k}.safetensors", v, tags) for k, v in files.items()}
        text = json.dumps(asdict(progress)).encode()
        write_atomic(partial / "progress.json", text)
        manifest["progress.json"] = hashlib.sha256(text).hexdigest()
        write_atomic(partial / "manifest.json", _manifest_text(manifest))
        _discard(final)
        os.replace(partial, final)
        fsync_folder(folder)
    except (OSError, ResourceError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, ResourceError):
            raise
        size = sum(t.nbytes for tensors in files.values() for t in tensors.values())
        raise write_error(final, size, error) from None
    others = [f for f in checkpoint_folders(folder) if f != final]
    older = [f for f in others if step_of(f) < progress.step]  # newer ones were found damaged when the run was resumed
    kept = set(older[len(older) + 1 - KEPT_CHECKPOINTS :])
    if progress.decay_from is not None:  # where an extended run resumes
        kept.update(_before_decay(older, progress)[-1:])
    for other in set(others) - kept:
        with suppress(OSError):  # an old checkpoint that stays does no harm
            _discard(other)
    return final


def resume_step_for_extension(folder: Path) -> int:
    """The step from which an extended run resumes: the newest intact checkpoint before the decay, else the newest.

    Raises `CheckpointError` if none is intact.
    """
    intact: dict[Path, Progress] = {}
    for candidate in checkpoint_folders(folder):
        with suppress(CheckpointError):
            intact[candidate] = verify_checkpoint(candidate)
    if not intact:
        raise CheckpointError("DAMAGED", folder, "none of its checkpoints is intact", "Train into another folder")
    return intact[(_before_decay(list(intact), list(intact.values())[-1]) or list(intact))[-1]].step


def drop_checkpoints_after(folder: Path, step: int, length: float) -> int:
    """Remove checkpoints after ``step`` unless they are of a run of this ``length``; return the newest step left.

    ``length`` in steps or minutes, as in the recipe.
    """
    for later in [path for path in checkpoint_folders(folder) if step_of(path) > step]:
        with suppress(CheckpointError):
            if verify_checkpoint(later).length == length:
                continue
        _discard(later)
    return max(map(step_of, checkpoint_folders(folder)), default=0)


def _before_decay(checkpoints: list[Path], progress: Progress) -> list[Path]:
    """The checkpoints of steps before the learning rate decays, according to the plan of ``progress``."""
    decay_from = math.inf if progress.decay_from is None else progress.decay_from
    return [path for path in checkpoints if step_of(path) <= decay_from]


def finish_interrupted_writes(folder: Path) -> None:
    """Rename a checkpoint that was complete when its process was killed, and remove what else a kill leaves."""
    for partial in named_folders(folder, "partial"):
        final = partial.with_name(partial.name.replace("partial", "step"))
        with suppress(CheckpointError):
            if not final.exists():
                verify_checkpoint(partial)
                os.replace(partial, final)
    for rest in named_folders(folder, "partial|trash-step|trash-partial"):
        shutil.rmtree(rest, ignore_errors=True)


def load_latest(folder: Path, parts: StateParts, run_id: str | None = None) -> tuple[Progress, list[str]]:
    """Load the newest intact checkpoint into ``parts``; return its progress and a line for each damaged newer one.

    One of another run than ``run_id``, if that is given, counts as damaged. The tensors of ``extra`` are filled in
    place. Progress is 0 if there are no checkpoints. Raises `CheckpointError` if there are some and none is intact.
    """
    damaged: list[CheckpointError] = []
    for candidate in reversed(checkpoint_folders(folder)):
        try:
            progress = _read(candidate, parts, run_id)
        except CheckpointError as error:
            damaged.append(error)
        else:
            return progress, [str(error) for error in damaged]
    if damaged:
        newest = f"{damaged[0].where}: {damaged[0].cause}"
        cause = f"none of its {len(damaged)} checkpoints is intact, the newest: {newest}"
        raise CheckpointError("DAMAGED", folder, cause, "Train again into another folder")
    return Progress(), []


def _read(folder: Path, parts: StateParts, run_id: str | None) -> Progress:
    progress = verify_checkpoint(folder)
    if run_id is not None and progress.run != run_id:
        raise CheckpointError("OTHER_RUN", folder, "it is a checkpoint of another run", "An older checkpoint is used")
    stored: dict[str, dict[str, Tensor]] = {}
    for part, wanted in parts.by_file().items():
        path = folder / f"{part}.safetensors"
        if part == "extra" and not path.exists():
            stored[part] = {}
            continue
        tensors, _ = read_tensors(path)
        if part == "extra":  # without those of settings that `force` accepted a change of
            tensors = {name: t for name, t in tensors.items() if name in wanted}
            wanted = {name: wanted[name] for name in tensors}
        check_tensors(path, tensors if part == "optimizer" else wanted, tensors)
        stored[part] = {name: distribute_like(t, wanted.get(name, t)) for name, t in tensors.items()}
    parts.model.load_state_dict(stored["network"])
    parts.ema.load(stored["average"])
    _load_moments(parts.optimizer, stored["optimizer"])
    for name, tensor in parts.extra.items():
        if name in stored["extra"]:
            tensor.copy_(stored["extra"][name])
        elif (average := name.partition("/")[2]) in parts.ema.mean:  # a new average begins at the model's
            tensor.copy_(parts.ema.mean[average])
    return progress


def verify_checkpoint(folder: Path) -> Progress:
    """The progress of an intact checkpoint. Raises `CheckpointError` naming the file that has changed.

    The manifest needs no sha256 of its own: it has one canonical form, and all of its content is compared with files.
    """
    path = folder / "manifest.json"
    try:
        text = path.read_bytes()
        manifest: dict[str, str] = json.loads(text)
        if _manifest_text(manifest) != text or "progress.json" not in manifest:
            raise ValueError("it is not as it was written")
        for name, sha256 in manifest.items():
            path = folder / name
            if file_digest(path) != sha256:
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


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {f"{i}.{key}": torch.as_tensor(value) for i, moments in state.items() for key, value in moments.items()}


def _load_moments(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Fill the optimizer's state; moments of another ``train.optimizer`` (resumed by force) start at zero."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        i, key = name.split(".", 1)
        parameter = parameters[int(i)]
        if not has_moment(optimizer, parameter, key):
            continue
        if tensor.shape == parameter.shape:  # in its layout of memory too, which the fused AdamW takes for granted
            like = torch.empty_like(parameter, dtype=tensor.dtype)
            tensor = like.copy_(distribute_like(tensor, parameter))
        state.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _discard(folder: Path) -> None:
    """Remove a folder: rename it first, so that a half-removed one is not taken for a checkpoint."""
    if folder.exists():
        trash = folder.with_name(f"trash-{folder.name}")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)
