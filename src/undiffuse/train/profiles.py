"""Averages of any length, after training: two are kept all along, written down now and then, and combined.

What the power p has averaged after T steps is the path of weights under the profile (p+1) τ^p/T^(p+1) on [0, T].
Snapshots at several T, of two powers, span others well enough [Karras24 §3.2].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from undiffuse.checkpoint import FORMAT, read_tensors, write_tensors
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.train.ema import Average, exponent
from undiffuse.train.parallel import gathered

LENGTHS = (0.05, 0.10)
"""Lengths of the two averages that are kept all along [Karras24 §3.2]."""
FAR = 0.5
"""An average whose profile is missed by so much is another one."""


class Profile(NamedTuple):
    """(p+1) τ^p/T^(p+1): of a ``length`` that gives p, after ``step`` = T steps."""

    length: float
    step: int


class Profiles:
    """The averages of `LENGTHS` in training, of which ``main`` is one if it has that length.

    With ``times`` = 0 none are kept.
    """

    def __init__(self, network: nn.Module, main: Average, length: float, times: int, folder: Path) -> None:
        self.folder, self.times = folder, times
        kept = LENGTHS if times else ()
        self.averages = {each: main if each == length else Average(network, each) for each in kept}
        self.others = {each: average for each, average in self.averages.items() if average is not main}

    @property
    def memory(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint of training keeps for them, in place."""
        return {f"{each:g}/{name}": t for each, average in self.others.items() for name, t in average.mean.items()}

    def update(self, network: nn.Module, step: int) -> None:
        """Takes in the weights after the optimiser's ``step``-th step, but for ``main``, which has done so."""
        for average in self.others.values():
            average.update(network, step)

    def forget_after(self, step: int) -> None:
        """Removes snapshots of later steps: a run that goes on from ``step`` has not made them."""
        for path in self.folder.glob("*.safetensors*"):
            if not path.stem[-8:].isdigit() or int(path.stem[-8:]) > step:
                path.unlink()

    def write(self, step: int, first: bool = True) -> None:
        """Writes a snapshot: a float32 file a length. Every process calls it, and the ``first`` one writes."""
        for length, average in self.averages.items():
            tensors = gathered(average.mean, first)
            if first:
                self.folder.mkdir(exist_ok=True)
                tags = {"undiffuse": str(FORMAT), "length": str(length), "step": str(step)}
                write_tensors(self.folder / f"{length:.3f}-{step:08d}.safetensors", tensors, tags)


def inner(one: Profile, other: Profile) -> float:
    """∫ f g dτ = (p+1)(q+1)/(p+q+1) · (m/T)^(p+1) (m/S)^(q+1)/m with m = min(T, S) [Karras24 app. C]."""
    p, q, m = exponent(one.length), exponent(other.length), min(one.step, other.step)
    return (p + 1) * (q + 1) / (p + q + 1) * (m / one.step) ** (p + 1) * (m / other.step) ** (q + 1) / m


def combine(wanted: Profile, kept: Sequence[Profile]) -> tuple[Tensor, float]:
    """The shares c, summing to 1, with the least ∫ (f − Σ cᵢ fᵢ)² dτ; and its root over that of ∫ f² dτ.

    Least squares over the inner products in float64, as in [Karras24 alg. 3] but for the sum: with it, weights that
    never move are what they are.
    """
    gram = torch.tensor([[inner(a, b) for b in kept] for a in kept], dtype=torch.float64)
    right = torch.tensor([inner(wanted, a) for a in kept], dtype=torch.float64)
    scale, n = gram.diagonal().sqrt(), len(kept)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = gram / torch.outer(scale, scale)
    system[:n, n] = system[n, :n] = 1 / scale
    goal = torch.cat([right / scale, torch.ones(1, dtype=torch.float64)])
    share = torch.linalg.lstsq(system, goal, rcond=1e-13, driver="gelsd").solution[:n] / scale
    square = inner(wanted, wanted)
    missed = (square - 2 * share @ right + share @ gram @ share).clamp(min=0)
    return share, float(missed / square) ** 0.5


def snapshots(folder: Path) -> dict[Profile, Path]:
    """The snapshots in ``folder``, by what they are. Raises `CheckpointError` if there is none."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        length, _, step = path.stem.partition("-")
        found[Profile(float(length), int(step))] = path
    if not found:
        cause = "no snapshots of averages were kept in training"
        raise CheckpointError("SNAPSHOTS", folder, cause, "Train with snapshots = 4 in the table [train] of --config")
    return found


def reconstruct(folder: Path, length: float) -> tuple[dict[str, Tensor], int, float]:
    """The average of ``length`` at the step of the last snapshot, that step, and the error of its profile.

    Snapshots are read one at a time and summed in float64. Raises `ConfigError` and `CheckpointError`.
    """
    if not 0 < length < 0.28:
        fix = "Give a share of the run, between 0 and 0.28"
        raise ConfigError("LENGTH", f"length = {length:g}", "no power function is so long", fix)
    files = snapshots(folder)
    last = max(profile.step for profile in files)
    shares, error = combine(Profile(length, last), list(files))
    if error > FAR:
        cause = f"{error:.1%} of its profile would be missed by what was kept"
        fix = "Give a length nearer to 0.05 or 0.1, or train with more snapshots in [train]"
        raise ConfigError("LENGTH", f"length = {length:g}", cause, fix)
    total: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for share, path in zip(shares.tolist(), files.values(), strict=True):
        for name, tensor in read_tensors(path)[0].items():
            total[name] = total.get(name, 0) + share * tensor.double()
            kinds[name] = tensor.dtype
    return {name: tensor.to(kinds[name]) for name, tensor in total.items()}, last, error
