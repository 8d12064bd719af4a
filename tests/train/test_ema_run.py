"""Snapshots of averages in a run: when, whole after a stop, and what `undiffuse ema` makes of them."""

import signal

import numpy as np
import pytest
import torch

from undiffuse.checkpoint import load, read_tensors, save
from undiffuse.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.data import from_array
from undiffuse.train import Interrupted, fit, profiles
from undiffuse.train.watch import Watch

DATA = from_array(np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32), name="vectors")
CONFIG = Config(
    ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, steps=5),
    TrainConfig(batch=8, steps=12, warmup=2, lr=0.01, precision="float32", previews=3),
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Watch, "look", lambda watch, *_: save(watch.smooth, watch.run.model))
    monkeypatch.setattr(Watch, "finish", Watch.look)


def train(config, out):
    return fit(config, DATA, out, device="cpu", quiet=True)


def tensors(folder):
    return {path.name: read_tensors(path)[0] for path in sorted(folder.glob("*.safetensors"))}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n][k], other[n][k]) for n in one for k in one[n])


def test_a_run_leaves_them_evenly_and_the_last_is_its_model(tmp_path):
    folder = train(CONFIG, tmp_path / "run")
    names = [path.name for path in sorted((folder / "snapshots").iterdir())]
    assert names == [f"{each:.3f}-{step:08d}.safetensors" for each in profiles.LENGTHS for step in (3, 6, 9, 12)]
    model, last = load(folder), read_tensors(folder / "snapshots" / names[3])[0]
    assert same({"": model.state_dict()}, {"": last})
    found, step, _ = profiles.reconstruct(folder / "snapshots", 0.05)
    assert step == 12
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    none = train(replace_train(CONFIG, snapshots=0), tmp_path / "none")
    assert not (none / "snapshots").exists()
    assert same({"": load(none).state_dict()}, {"": model.state_dict()})


def test_stopping_anywhere_leaves_the_same(tmp_path, monkeypatch):
    whole, real, at = train(CONFIG, tmp_path / "whole"), Watch.step, [0]

    def step(watch, *numbers):
        real(watch, *numbers)
        if watch.progress.step == at[0]:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Watch, "step", step)
    for at[0] in (2, 3, 4, 8, 9, 12):
        with pytest.raises(Interrupted):
            train(CONFIG, tmp_path / "chain")
    for at[0] in (8, 10):
        with pytest.raises(Interrupted):
            train(CONFIG, tmp_path / "back")
    damaged = tmp_path / "back" / "checkpoints" / "step-00000010" / "network.safetensors"
    damaged.write_bytes(b"x")  # it goes on from step 8, behind the snapshot of step 9
    at[0] = 0
    train(CONFIG, tmp_path / "back")
    for name in ("chain", "back"):
        assert same(tensors(tmp_path / name / "snapshots"), tensors(whole / "snapshots"))
