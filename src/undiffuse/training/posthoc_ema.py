"""Averages of any length after training: snapshots of two averages are stored during training and combined.

After T steps the average of power p is the integral of the weights' path with the profile (p+1) τ^p/T^(p+1) on [0, T].
Profiles at several T, for two powers, nearly span the others [Karras24 §3.2].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse.data.dataset import Dataset
from undiffuse.errors import CheckpointError, ConfigError, DataError
from undiffuse.model.checkpoint import load
from undiffuse.model.config import TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.process.statistics import mean_with_stderr
from undiffuse.runtime.tensor_file import FORMAT, check_tensors, read_metadata, read_tensors, write_tensors
from undiffuse.training.distributed import gather_full
from undiffuse.training.ema import PowerEMA, is_real, power_for_length
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import Run

SNAPSHOT_LENGTHS = (0.05, 0.10)
"""Lengths of the two averages that are kept during training [Karras24 §3.2]."""
SNAPSHOT_NAME = re.compile(r"(?P<length>0\.\d{3})-(?P<step>\d{8,})\.safetensors(?P<partial>\.partial)?")
MAX_RECONSTRUCTION_ERROR = 0.5
"""An average is refused if its profile is reconstructed with a larger relative error."""
CANDIDATES = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10, 0.12, 0.15, 0.20)
"""Lengths that are compared by default, as far as they are reachable."""
MAX_PROFILE_ERROR = 0.1
"""A length is reachable if the relative error of its profile is at most this."""


class Profile(NamedTuple):
    """(p+1) τ^p/T^(p+1) with the p of ``length`` and T = ``step``."""

    length: float
    step: int


def snapshot_interval(steps: float, snapshots: int) -> int:
    """Steps between snapshots in a run of ``steps``: the least power of two that gives fewer than 2 ``snapshots``.

    That is at least ``snapshots``, in a run of as many steps. The multiples of the interval of a longer run are among
    those of a shorter one: so an extended run has the snapshots of the run that would have started longer.
    """
    interval = 1
    while steps >= 2 * snapshots * interval:
        interval *= 2
    return interval


class EMASnapshots:
    """The averages of `SNAPSHOT_LENGTHS` during training, stored in ``folder``; none if ``snapshots`` is 0.

    ``ema`` of ``length`` is the model's own average, and one of them if the length is the same.
    """

    def __init__(self, model: nn.Module, ema: PowerEMA, length: float, snapshots: int, folder: Path) -> None:
        self.folder, self.snapshots = folder, snapshots
        kept = SNAPSHOT_LENGTHS if snapshots else ()
        self.averages = {each: ema if each == length else PowerEMA(model, each) for each in kept}
        self.others = {each: average for each, average in self.averages.items() if average is not ema}

    @property
    def state(self) -> dict[str, Tensor]:
        """Their tensors for a checkpoint of training, in place; without those of the model's own average."""
        return {f"{each:g}/{name}": t for each, average in self.others.items() for name, t in average.mean.items()}

    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages, but for the model's own, to the weights after optimizer step ``step``."""
        for average in self.others.values():
            average.update(model, step)

    def drop_after(self, step: int) -> None:
        """Remove snapshots of later steps, which a run that resumes from ``step`` has not reached."""
        self._remove(lambda other: other > step)

    def is_due(self, progress: Progress, settings: TrainConfig) -> bool:
        """Whether `write_if_due` writes now."""
        if not self.averages:
            return False
        return progress.done or progress.step % self._interval(progress, settings) == 0

    def _interval(self, progress: Progress, settings: TrainConfig) -> int:
        steps = progress.last_step or progress.step / max(progress.fraction(settings), 1e-9)
        return snapshot_interval(steps, self.snapshots)

    def write_if_due(self, progress: Progress, settings: TrainConfig, main: bool) -> None:
        """`write` at the multiples of `snapshot_interval` and at the last step, and remove those of other steps.

        With ``minutes``, the number of steps is estimated from the speed so far until the end is planned.
        """
        if self.is_due(progress, settings):
            interval = self._interval(progress, settings)
            self.write(progress.step, progress.run, main)
            if main:
                self._remove(lambda step: step % interval != 0 and step != progress.step)

    def write(self, step: int, run_id: str = "", main: bool = True) -> None:
        """Write a snapshot, one file for each length. Every process calls it, and the ``main`` one writes.

        The file says of itself its length, step and run, which `list_snapshots` compares.
        """
        for length, average in self.averages.items():
            tensors = gather_full(average.mean, main)
            if main:
                self.folder.mkdir(exist_ok=True)
                tags = {"undiffuse": str(FORMAT), "length": str(length), "step": str(step), "run": run_id}
                write_tensors(self.folder / snapshot_name(length, step), tensors, tags)

    def _remove(self, unwanted: Callable[[int], bool]) -> None:
        """Remove the snapshots of ``unwanted`` steps, and unfinished writes."""
        for path in self.folder.glob("*"):
            if (name := SNAPSHOT_NAME.fullmatch(path.name)) and (name["partial"] or unwanted(int(name["step"]))):
                path.unlink()


def profile_inner_product(one: Profile, other: Profile) -> float:
    """∫ f g dτ = (p+1)(q+1)/(p+q+1) · (m/T)^(p+1) (m/S)^(q+1)/m with m = min(T, S) [Karras24 app. C]."""
    p, q, m = power_for_length(one.length), power_for_length(other.length), min(one.step, other.step)
    return (p + 1) * (q + 1) / (p + q + 1) * (m / one.step) ** (p + 1) * (m / other.step) ** (q + 1) / m


def combine_profiles(wanted: Profile, kept: Sequence[Profile]) -> tuple[Tensor, float]:
    """Coefficients c with Σ c = 1 that minimize ∫ (f − Σ cᵢ fᵢ)² dτ, and the relative error √(minimum/∫ f² dτ).

    Least squares over the inner products in float64, as in [Karras24 alg. 3] plus the constraint on the sum, which
    makes the average of constant weights exact.
    """
    gram = torch.tensor([[profile_inner_product(a, b) for b in kept] for a in kept], dtype=torch.float64)
    right = torch.tensor([profile_inner_product(wanted, a) for a in kept], dtype=torch.float64)
    scale, n = gram.diagonal().sqrt(), len(kept)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = gram / torch.outer(scale, scale)
    system[:n, n] = system[n, :n] = 1 / scale
    goal = torch.cat([right / scale, torch.ones(1, dtype=torch.float64)])
    coefficients = torch.linalg.lstsq(system, goal, rcond=1e-13, driver="gelsd").solution[:n] / scale
    square = profile_inner_product(wanted, wanted)
    residual = (square - 2 * coefficients @ right + coefficients @ gram @ coefficients).clamp(min=0)
    return coefficients, float(residual / square) ** 0.5


def snapshot_name(length: float, step: int) -> str:
    """The name of the file of a snapshot."""
    return f"{length:.3f}-{step:08d}.safetensors"


def list_snapshots(folder: Path, run_id: str | None = None) -> dict[Profile, Path]:
    """The files of snapshots in ``folder``, by profile; files of other names are not snapshots.

    Raises `CheckpointError` if there are none, or if a file is not what its name says, or not of the run ``run_id``.
    """
    files = {}
    for path in sorted(folder.glob("*")):
        name = SNAPSHOT_NAME.fullmatch(path.name)
        if name is None or name["partial"]:
            continue
        profile, tags = Profile(float(name["length"]), int(name["step"])), read_metadata(path)
        length, step, run = (tags.get(key, "unknown") for key in ("length", "step", "run"))
        fix = "Remove it, or restore the snapshot that was there"
        if (length, step) != (str(profile.length), str(profile.step)):
            cause = f"it says that it is the average of length {length} at step {step}"
            raise CheckpointError("SNAPSHOT", path, cause[:300], fix)
        if run_id is not None and run != run_id:
            raise CheckpointError("SNAPSHOT", path, "it is a snapshot of another run", fix)
        files[profile] = path
    if not files:
        cause = "no snapshots of averages were stored in training"
        raise CheckpointError("SNAPSHOTS", folder, cause, "Train with snapshots = 4 in the table [train] of --config")
    return files


def reconstruct_average(folder: Path, length: float, run_id: str | None = None) -> tuple[dict[str, Tensor], int, float]:
    """The average of ``length`` at the step of the last snapshot, that step, and the relative error of its profile.

    Snapshots are read one at a time and summed in float64; integers and bools are those of the last one. Those of
    another run than ``run_id`` are refused. Raises `ConfigError` and `CheckpointError`.
    """
    if not 0 < length < 0.28:
        cause = "an average is longer than 0 and shorter than 0.28 of the run"
        raise ConfigError("LENGTH", f"length = {length:g}", cause, "Give a fraction of the run above 0 and below 0.28")
    files = list_snapshots(folder, run_id)
    last = max(profile.step for profile in files)
    coefficients, error = combine_profiles(Profile(length, last), list(files))
    if error > MAX_RECONSTRUCTION_ERROR:
        cause = f"the stored snapshots give its profile with an error of {error:.1%}"
        fix = "Give a length nearer to 0.05 or 0.1, or train with more snapshots in [train]"
        raise ConfigError("LENGTH", f"length = {length:g}", cause, fix)
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for coefficient, (profile, path) in zip(coefficients.tolist(), files.items(), strict=True):
        for name, tensor in read_tensors(path)[0].items():
            if is_real(tensor):
                total[name] = total.get(name, 0) + coefficient * tensor.double()
            elif profile.step == last:
                total[name] = tensor
            dtypes[name] = tensor.dtype
    return {name: tensor.to(dtypes[name]) for name, tensor in total.items()}, last, error


def _load(run: Run, device: str = "cpu") -> Diffusion:
    """The run's model. Raises `CheckpointError`, also for a file, and for a distilled run without snapshots."""
    model = load(run.folder, device)
    if not run.folder.is_dir():
        cause, fix = "it is a file, and averages are stored in the folder of a run", "Give the folder of its run"
        raise CheckpointError("SNAPSHOTS", run.folder, cause, fix)
    if model.config.calls and not run.snapshots.is_dir():
        cause = "it is a distilled run, and distillation stores no snapshots of averages"
        raise CheckpointError("SNAPSHOTS", run.folder, cause, "Give the run that it was distilled from")
    return model


def with_ema_length(run: Run, length: float, device: str = "cpu") -> tuple[Diffusion, float]:
    """The run's model with the average of ``length`` at the last snapshot, and the relative error of its profile.

    The last snapshot of a finished run is at its end. Raises `CheckpointError`, `ConfigError`.
    """
    model = _load(run, device)
    tensors, step, error = reconstruct_average(run.snapshots, length, run.id)
    own = model.state_dict()
    tensors = {name: t.to(own[name].dtype if name in own else t.dtype) for name, t in tensors.items()}
    check_tensors(run.snapshots, own, tensors)
    model.load_state_dict(tensors)
    model.info |= {"steps": step, "ema": length, "ema_error": error}
    return model, error


def reachable_lengths(run: Run) -> list[float]:
    """The `CANDIDATES` whose profile error is at most `MAX_PROFILE_ERROR`. Raises `CheckpointError`."""
    kept = list(list_snapshots(run.snapshots, run.id))
    last = max(profile.step for profile in kept)
    return [length for length in CANDIDATES if combine_profiles(Profile(length, last), kept)[1] <= MAX_PROFILE_ERROR]


class EMAScore(NamedTuple):
    """A ``length``, the relative ``error`` of its profile, its bound ``bits`` ± ``stderr``; ``regret`` to the best."""

    length: float
    error: float
    bits: float
    stderr: float
    regret: float
    regret_stderr: float


def compare_lengths(
    run: Run,
    data: Dataset,
    lengths: Sequence[float] | None = None,
    items: int = 256,
    mc_samples: int = 16,
    device: str = "cpu",
) -> list[EMAScore]:
    """The bound of held-out items for each length, bits per dimension, in order, on the same noise.

    ``lengths`` default to `reachable_lengths`. ``regret`` is the mean over items of the difference to the best length;
    being paired, its standard error is smaller than that of the bounds. Items are spread over the validation part, so
    that the test part stays unused. Raises `ConfigError`, `DataError`, `CheckpointError`.
    """
    if lengths is not None and not lengths:
        raise ConfigError("LENGTH", "lengths", "none is given", "Give at least one")
    measured, info = [], _load(run).info
    held_out = data.split(float(info.get("held_out", 0.1))).validation
    chosen = held_out[np.linspace(0, len(held_out) - 1, min(items, len(held_out))).round().astype(int)]
    if data.fingerprint != info.get("fingerprint"):
        fix = "Give the data of the run"
        cause = "the run was trained on other data, so no part of these is held out"
        raise DataError("OTHER_DATA", data.name, cause, fix)
    if len(chosen) < 2:
        raise DataError("EMPTY", data.name, "fewer than two items are held out", "Train with a larger held_out")
    values = data.tensor(chosen)
    for length in reachable_lengths(run) if lengths is None else lengths:
        model, error = with_ema_length(run, length, device)
        cond = data.given_condition(chosen, bool(model.trained_condition_sizes))
        measured.append((length, error, model.nll(values, mc_samples=mc_samples, cond=cond).bits_per_dim(model.dims)))
    best = min((bits for *_, bits in measured), key=lambda bits: float(bits.mean()))
    return [
        EMAScore(length, error, *mean_with_stderr(bits), *mean_with_stderr(bits - best))
        for length, error, bits in measured
    ]
