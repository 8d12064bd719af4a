"""Numbers beyond any machine, full disks and files without permission: one line at once, with path and bytes."""

import errno
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from undiffuse.data.sources.registry import load as load_data
from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import CheckpointError
from undiffuse.model import checkpoint
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.runtime.atomic_file import REMEDIES, remedy
from undiffuse.runtime.tensor_file import read_tensors, write_tensors
from undiffuse.training.run_folder import Run, describe

UNET = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
CONFIG = Config(ModelConfig(UNET, {"name": "linear_log_snr", "high": 6.0}, chain_length=6), TrainConfig(max_steps=1))
NUMBERS = (10**12, 10**20)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with data, images and an untrained run of the data."""
    values = np.random.default_rng(0).integers(256, size=(300, 1, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "x.npy", values)
    for name in "ab":
        Image.fromarray(values[0, 0]).save(tmp_path / f"{name}.png")
    data, run = load_data(str(tmp_path / "x.npy")), Run(tmp_path / "run")
    run.open(CONFIG, data)
    run.finish()
    model = Diffusion(CONFIG.model, (1, 8, 8), IntegerLevels(256), describe(data) | {"held_out": 0.1})
    checkpoint.save(model, run.model)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample run --n", "error[DISK] --n {n}: it needs {s64:,} bytes in run/samples/dpm++2m_sde-6-seed-0, where "),
        ("sample run --out new --n", "error[DISK] --n {n}: it needs {s64:,} bytes in new, where "),
        ("restore run a.png --noise 0.1 --n", "error[MEMORY] --n {n}: it needs about {g256:,.1f} GB of memory"),
        ("interpolate run a.png b.png --n", "error[MEMORY] --n {n}: it needs about {g256:,.1f} GB of memory"),
        ("train x.npy --steps 1 --batch", "error[CONFIG] --batch {n:,}: training needs at least "),
        ("restore run a.png --upsample", "error[OPERATOR] --upsample {n}: {n} does not divide the sides"),
        ("evaluate run --mc-samples", "Invalid value for '--mc-samples': "),
        ("evaluate run --iw-samples", "Invalid value for '--iw-samples': "),
        ("ema run --best --mc-samples", "Invalid value for '--mc-samples': "),
        ("advise run --samples", "Invalid value for '--samples': "),
        ("advise run --items", "Invalid value for '--items': "),
        ("advise run --fine", "Invalid value for '--fine': "),
        ("advise run --calls", "Invalid value for '--calls': "),
    ],
)
def test_numbers_beyond_the_machine_are_refused_at_once(command, words, number, place, call):
    before, began = sorted(place.rglob("*")), time.perf_counter()
    said = call(*command.split(), number, "--device", "cpu")
    assert time.perf_counter() - began < 5
    assert (said.code in (2, 6), said.err.count("\n")) == (True, 1), said
    assert words.format(n=number, s64=(64 + 4096) * number, g256=256 * number / 1e9) in said.err
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("command", ["--n 2 --batch", "--n 2 --steps", "--n 2 --calls", "--n 2 --seed"])
def test_large_numbers_that_mean_something(command, number, place, call):
    """At most the whole chain, one batch, any seed."""
    said = call("sample", "run", *command.split(), number, "--device", "cpu")
    assert (said.code, said.err) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        "sample run --n 2",
        "sample run --n 2 --animate film.gif",
        "restore run a.png --noise 0.1 --n 1 --steps 2",
        "interpolate run a.png b.png --n 2 --steps 1",
        "evaluate run --items 2 --mc-samples 1 --estimate discrete",
        "evaluate run --items 2 --mc-samples 1 --estimate discrete --out new",
        "compare x.npy x.npy --metric nearest --out new",
        "advise run --calls 2 --items 8 --fine 8 --label none",
        "check x.npy --out sheet.png",
        "pack x.npy packed.npy",
        "train x.npy --steps 1 --out new",
    ],
)
def test_a_full_disk_names_the_path_and_the_bytes(command, place, call, monkeypatch):
    """Every file of a result is written durably: a disk is full for all of them at once if fsync fails."""

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if command.startswith("advise"):
        command = command.removesuffix(" --label none")
        monkeypatch.setattr("undiffuse.cli.advise._real_items", lambda *_: (None, "not here"))
    (place / "new").mkdir(exist_ok=not command.startswith("train"))
    monkeypatch.setattr(os, "fsync", full)
    said = call(*command.split(), *(() if command.split()[0] in ("check", "pack", "compare") else ("--device", "cpu")))
    assert (said.code, said.err.count("\n")) == (6, 1), said
    line = r"error\[DISK\] \S+: its [\d,]+ bytes could not be written \(No space left on device\)\. Free some space; "
    assert re.match(line, said.err), said.err
    assert not [path for path in place.rglob("*.partial") if path.is_file()]


def test_remedies_follow_the_cause():
    for number, fix in (
        (errno.ENOSPC, "Free some space"),
        (errno.EACCES, "Check the permissions"),
        (5, "Check the disk"),
    ):
        assert remedy(OSError(number, os.strerror(number))) == fix
    assert "space" not in remedy(OSError(errno.EROFS, ""))
    numbers = [number for group in REMEDIES.values() for number in group]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("command", ["sample run", "inspect run", "evaluate run x.npy", "restore run a.png --noise 1"])
def test_a_model_without_permission(command, place, call, monkeypatch):
    real = Path.open

    def refuse(path, *arguments, **named):
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", refuse)
    said = call(*command.split())
    cause = "cannot be read (Permission denied). Check the permissions."
    assert (said.code, said.err) == (4, f"error[UNREADABLE] run/model.safetensors: {cause}\n")


def test_a_record_without_permission(place, call, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    said = call("watch", "run", "--once")
    cause = "cannot be read (Permission denied). Check the permissions."
    assert (said.code, said.err) == (4, f"error[UNREADABLE] run/run.json: {cause}\n")


@pytest.mark.parametrize("number", [10**400, -(10**400)])
@pytest.mark.parametrize("name", ["mean", "std"])
def test_numbers_of_a_model_beyond_any_float(number, name, place, call):
    tensors, metadata = read_tensors(place / "run" / "model.safetensors")
    plain = json.loads(metadata["model"])
    plain["transform"] = {"kind": "standardized", "mean": [0.0], "std": [1.0], name: [number]}
    metadata.pop("sha256")
    write_tensors(place / "run" / "model.safetensors", tensors, metadata | {"model": json.dumps(plain)})
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(place / "run")
    assert len(str(caught.value)) < 500
    said = call("sample", "run")
    assert (said.code, said.err.count("\n")) == (4, 1)
