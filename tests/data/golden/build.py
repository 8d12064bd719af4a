"""Builds the golden run of this version: `python tests/data/golden/build.py VERSION`, once a release.

A run that was stopped after three of its five steps, its model at the end, eight samples and a bound. Later versions
must read all of it and reach the same numbers.
"""

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny_run import data, quick_looks, recipe, stopping_at, train

from undiffuse.model.checkpoint import load
from undiffuse.runtime.tensor_file import read_tensors, write_tensors
from undiffuse.sampling.sampler import Sampler

HERE = Path(__file__).parent
NET = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": ()}


def answers(folder: Path) -> dict[str, torch.Tensor]:
    """The numbers that are compared: samples, a bound, and the weights and their average at the end of training."""
    model, step = load(folder), folder / "checkpoints" / "step-00000005"
    state = {f"{part} {name}": t for part in ("network", "average") for name, t in parts(step, part)}
    values = torch.from_numpy(data().values[:4])
    return {
        "samples": model.sample(8, seed=1, sampler=Sampler(num_steps=4)),
        "nll": model.nll(values, seed=2, mc_samples=4).total,
        **state,
    }


def parts(step: Path, part: str):
    return read_tensors(step / f"{part}.safetensors")[0].items()


def resume(folder: Path) -> Path:
    """Train to the end, from wherever the run is."""
    config = recipe(5, snapshots=0, previews=0, flip=False)
    with quick_looks():
        return train(replace(config, model=replace(config.model, network=NET)), folder, data())


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        run, golden = Path(place) / "run", HERE / sys.argv[1]
        with stopping_at(3):
            resume(run)
        shutil.rmtree(golden, ignore_errors=True)
        shutil.copytree(run, golden, ignore=shutil.ignore_patterns("metrics.*", "pictures", "lock*"))
        expected = answers(resume(run))
        shutil.copy(run / "model.safetensors", golden)
        write_tensors(golden / "answers.safetensors", expected, {"undiffuse": "golden", "torch": torch.__version__})
