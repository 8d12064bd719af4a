"""The commands of the systems that build on other runs, with tiny networks: what `kill.py` kills and resumes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from undiffuse.runtime.tensor_file import digest, read_tensors

RECIPE = """
[model]
network = {kind = "unet", widths = [8], blocks = 1, attention = []}
schedule = {name = "linear_log_snr", high = 6.0}
chain_length = 5
output = "values"
[train]
batch = 8
warmup = 1
precision = "float32"
previews = 3
"""
AUTOENCODER = """
[model]
network = {kind = "kl", widths = [8, 8], latent_channels = 2, blocks = 1}
[train]
batch = 8
warmup = 1
precision = "float32"
flip = true
previews = 3
"""
CLASSIFIER = """
[model]
network = {kind = "unet", widths = [8], blocks = 1, attention = []}
[train]
batch = 8
warmup = 1
precision = "float32"
previews = 3
"""
STEPS, PREVIEWS = 6, 3
"""Of every run here: there is a checkpoint after every second step."""


class System(NamedTuple):
    """A command line, {place} the folder of data and recipes, and moments to die at: a function and its n-th call.

    The other runs that the command needs are the uninterrupted ones of rows before it, in {place}/NAME.
    """

    command: str
    moments: tuple[tuple[str, int], ...]

    def arguments(self, place: Path, folder: Path) -> list[str]:
        words = [word.replace("{place}", str(place)) for word in self.command.split()]
        return [*words, "--out", str(folder), "--device", "cpu"]


STEP, EVALUATE = "undiffuse.training.monitor.Monitor.record_step", "undiffuse.training.monitor.Monitor.evaluate_now"
TRAIN = f"train {{place}}/photos --steps {STEPS} --config {{place}}/recipe.toml"
SYSTEMS = {
    "autoencoder": System(
        f"train-autoencoder {{place}}/photos --steps {STEPS} --config {{place}}/autoencoder.toml",
        ((STEP, 3), (EVALUATE, 2)),
    ),
    "latents": System(
        f"{TRAIN} --autoencoder {{place}}/autoencoder",
        (("undiffuse.training.latents.posteriors", 2), ("undiffuse.training.latents._moments", 1), (STEP, 3)),
    ),
    "classifier": System(
        f"train-classifier {{place}}/classes --steps {STEPS} --config {{place}}/classifier.toml",
        ((STEP, 3), (EVALUATE, 2)),
    ),
    "captions": System(f"{TRAIN} --captions", ((STEP, 3), (EVALUATE, 2))),
    "base": System(f"{TRAIN} --reduce 4", ((STEP, 3),)),
    "enlarged": System(f"{TRAIN} --from 4", ((STEP, 3), (EVALUATE, 2))),
    "few-calls": System(f"distill {{place}}/base --steps {STEPS}", ((STEP, 3), (EVALUATE, 2))),
    "flow-map": System(
        f"distill {{place}}/base --method lagrangian --steps {STEPS}",
        ((STEP, 3), (EVALUATE, 2)),
    ),
    "cascade": System(
        "sample {place}/base --then {place}/enlarged --n 4 --batch 2 --steps 3",
        (("undiffuse.model.diffusion.Diffusion.sample", 4), ("undiffuse.report.sample_folder.write_arrays", 1)),
    ),
}


def prepare(place: Path) -> None:
    """Write images with captions, the same in classes, and recipes into ``place``."""
    folder, random = place / "photos", np.random.default_rng(0)
    for made in (folder, place / "classes" / "a", place / "classes" / "b"):
        made.mkdir(parents=True)
    rows = [{"file_name": f"{i}.png", "text": ["a", "b"][i % 2] + " square"} for i in range(24)]
    for row in rows:
        picture = Image.fromarray(random.integers(256, size=(8, 8)).astype(np.uint8))
        for made in (folder, place / "classes" / row["text"][0]):
            picture.save(made / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "recipe.toml").write_text(RECIPE)
    (place / "autoencoder.toml").write_text(AUTOENCODER)
    (place / "classifier.toml").write_text(CLASSIFIER)


def outcome(folder: Path) -> dict[str, str]:
    """sha256 of all tensors, arrays and pictures that a command wrote, by their path."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            hashes[name] = digest(read_tensors(path)[0], {"undiffuse": "state"})
        elif path.suffix in (".npy", ".png"):
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".npz":
            with np.load(path) as file:
                hashes |= {f"{name} {key}": hashlib.sha256(file[key].tobytes()).hexdigest() for key in file}
    return hashes
