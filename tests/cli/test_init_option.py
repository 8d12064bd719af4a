"""``train --init`` as a user runs it: the first loss, a run resumed without its source, captions, and bad input."""

import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_run import checkpoint_hashes, global_batch, save_only

from undiffuse.data.sources.registry import load as load_data
from undiffuse.model.checkpoint import load
from undiffuse.model.config import Config, from_dict
from undiffuse.model.diffusion import Diffusion
from undiffuse.training.monitor import Monitor

RECIPE = """
[model]
network = {kind = "unet", widths = [8], blocks = 1, attention = []}
schedule = {name = "linear_log_snr", high = 6.0}
target = {name = "eps"}
chain_length = 5
output = "values"
[train]
batch = 8
warmup = 1
lr = 0.01
previews = 0
snapshots = 0
precision = "float32"
"""
WORDS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def cheap():
    """Evaluations measure and draw nothing."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "evaluate_now", save_only)
        yield


@pytest.fixture(scope="module")
def place(cheap, tmp_path_factory):
    """A folder of small images with captions, other images, and ``start``, a run of three steps on the first."""
    from undiffuse.cli import main

    folder = tmp_path_factory.mktemp("init")
    random = np.random.default_rng(0)
    for name, shape in {"photos": (8, 8, 3), "others": (12, 8, 3), "grey": (8, 8)}.items():
        (folder / name).mkdir()
        for i in range(30):
            Image.fromarray(random.integers(256, size=shape).astype(np.uint8)).save(folder / name / f"{i:02d}.png")
    lines = [f"{i:02d}.png,{WORDS[i % 3]}" for i in range(30)]
    (folder / "photos" / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    np.save(folder / "vectors.npy", random.normal(size=(40, 3)).astype(np.float32))
    (folder / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = ["--steps", "3", "--config", "recipe.toml", "--device", "cpu", "--out", "start"]
        assert main(["train", "photos", *options]) == 0
        yield folder


@pytest.fixture
def train(place, call, monkeypatch):
    """train(*arguments) runs the command in ``place``; the losses of its steps are in ``train.losses``."""
    monkeypatch.chdir(place)
    real = Monitor.record_step

    def record_step(monitor, loss, *rest):
        train.losses.append(loss)
        real(monitor, loss, *rest)

    def train(*arguments):
        train.losses = []
        return call("train", *arguments, "--device", "cpu")

    monkeypatch.setattr(Monitor, "record_step", record_step)
    return train


def first_loss(model, folder, **options):
    """The loss of ``model``, for items of any size, on the first batch of the run in ``folder``; the run's settings."""
    config = from_dict(Config, json.loads((folder / "run.json").read_text())["config"], "run.json")
    data = load_data(options.pop("source"), **options)
    other = Diffusion(model.config, data.item_shape, model.transform)
    other.load_state_dict(model.state_dict())
    batch = global_batch(data, data.split(config.train.held_out).train, config.train, 0)
    with torch.no_grad():
        return float(other.loss(batch.values, batch.u, batch.eps).mean()), config


@pytest.mark.parametrize("source", ["photos", "others"])
@pytest.mark.parametrize("start", ["start", "start/model.safetensors"])
def test_the_first_loss_is_that_of_the_model(place, train, call, source, start):
    """Of a run and of its file, also on images of another size; the recipe is the model's, with what options change."""
    out = f"{source}-{len(start)}"
    options = [] if start == "start" else ["--config", "recipe.toml"]  # a file has no settings of training
    said = train(source, "--init", start, "--steps", 1, "--seed", 7, "--lr", "0.002", "--out", out, *options)
    assert said.code == 0, said.err
    words = " ".join(said.out.split())
    assert f"recipe '{start}', 1 step" in words
    assert "tensors loaded; new: nothing; left out: nothing" in words
    model = load("start")
    expected, config = first_loss(model, place / out, source=source)
    assert train.losses == [pytest.approx(expected, rel=1e-5)]
    assert config.model == model.config
    assert (config.train.lr, config.train.batch, config.train.seed, config.train.max_steps) == (0.002, 8, 7, 1)
    fingerprint = json.loads((place / out / "run.json").read_text())["init"]
    assert f"starts from the weights {fingerprint[:12]} (photos, 3 steps)" in " ".join(call("inspect", out).out.split())


def test_captions_that_are_added_start_at_the_loss_of_the_model(place, train):
    said = train("photos", "--captions", "--init", "start", "--steps", 1, "--out", "captions")
    assert said.code == 0, said.err
    assert re.search(r"new: .*, text \(\d+ tensors\); left out: nothing", " ".join(said.out.split()))
    assert "first predictions differ" not in said.out
    expected, config = first_loss(load("start"), place / "captions", source="photos", captions=True)
    assert train.losses == [pytest.approx(expected, rel=1e-5)]
    assert config.train.conditional
    assert load("captions").condition_sizes.keys() == {"text"}


def test_another_setting_is_laid_over_those_of_the_model(place, train):
    (place / "weight.toml").write_text('[model]\nweight = {name = "simple"}\n')
    assert train("photos", "--init", "start", "--steps", 1, "--config", "weight.toml", "--out", "weight").code == 0
    model = load("weight")
    assert model.config.weight == {"name": "simple"}
    assert (model.config.target, model.config.network) == (load("start").config.target, load("start").config.network)


def test_a_stopped_run_resumes_to_the_bit_when_its_source_is_gone(place, train, monkeypatch):
    shutil.copytree("start", "source")
    command = ("photos", "--init", "source", "--steps", 3, "--lr", "0.005", "--out")
    assert train(*command, "whole").code == 0
    real = Monitor.record_step

    def stop(monitor, *numbers):
        real(monitor, *numbers)
        if monitor.progress.step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "record_step", stop)
        assert train(*command, "stopped").code == 143
    shutil.rmtree("source")
    assert train(*command, "stopped").code == 0
    assert checkpoint_hashes(place / "stopped", 3) == checkpoint_hashes(place / "whole", 3)
    for again in (command, ("photos", "--out")):  # as it was begun, and with no option
        said = train(*again, "stopped")
        assert (said.code, said.err) == (0, "")
        assert "is a finished run already" in said.out


BAD = [
    (4, ("photos", "--init", "none"), "error[NOT_FOUND] none: no such file. Name a run folder or a .safetensors file."),
    (4, ("photos", "--init", "photos"), "error[NO_MODEL] photos: no model.safetensors in this folder."),
    (4, ("photos", "--init", "recipe.toml"), "error[NOT_OURS] recipe.toml: it is not a safetensors file"),
    (
        4,
        ("photos", "--init", "other.safetensors"),
        "error[NOT_OURS] other.safetensors: these weights were not written by",
    ),
    (4, ("photos", "--init", "cut.safetensors"), "error[DAMAGED] cut.safetensors: "),
    (4, ("grey", "--init", "start"), "error[TENSOR] start/model.safetensors: the shape of the tensor 'conv_in.weight'"),
    (3, ("vectors.npy", "--init", "start"), "error[INIT] vectors: these are continuous values, and start/model"),
    (2, ("photos", "--init", "start", "--config", "mlp.toml"), 'error[INIT] model.network.kind = "mlp": the weights'),
    (2, ("photos", "--init", "start", "--preset", "ncsn"), "error[INIT] model.schedule = "),
    (2, ("photos", "--init", "start", "--steps", 5, "--out", "start"), "this folder holds a finished run with other"),
    (2, ("photos", "--init", "start", "--extend", "--out", "start"), "error[USAGE] --extend: an extended run keeps"),
]


@pytest.mark.parametrize(("code", "arguments", "line"), BAD)
def test_bad_input_is_one_line(place, train, code, arguments, line):
    save_file({"weight": torch.ones(2)}, "other.safetensors")
    (place / "cut.safetensors").write_bytes((place / "start" / "model.safetensors").read_bytes()[:-5])
    (place / "mlp.toml").write_text('[model]\nnetwork = {kind = "mlp", width = 8, depth = 1}\n')
    length = () if "--steps" in arguments or "--extend" in arguments else ("--steps", 1)
    out = () if "--out" in arguments else ("--out", "bad")
    before = checkpoint_hashes(place / "start", 3)
    said = train(*arguments, *length, *out)
    assert (said.code, said.err.count("\n")) == (code, 1), said
    assert line in said.err
    assert not (place / "bad").exists()
    assert checkpoint_hashes(place / "start", 3) == before
