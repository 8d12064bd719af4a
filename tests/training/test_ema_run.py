"""Snapshots of averages during a run, also one that is stopped and resumed."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse.data.from_array import from_array
from undiffuse.model.checkpoint import load, save
from undiffuse.model.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.networks import registry
from undiffuse.runtime.signals import Interrupted
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.training import posthoc_ema as profiles
from undiffuse.training.diffusion_task import fit_diffusion
from undiffuse.training.monitor import Monitor
from undiffuse.training.run_folder import Run

DATA = from_array(np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32), name="vectors")
CONFIG = Config(
    ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, chain_length=5),
    TrainConfig(batch=8, max_steps=12, warmup=2, lr=0.01, precision="float32", previews=3),
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(Monitor, "evaluate_now", lambda monitor, *_: save(monitor.ema_model, monitor.run.model))
    monkeypatch.setattr(Monitor, "finish", Monitor.evaluate_now)


def train(config, out):
    return fit_diffusion(config, DATA, out, device="cpu", quiet=True)


def tensors(folder):
    return {path.name: read_tensors(path)[0] for path in sorted(folder.glob("*.safetensors"))}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n][k], other[n][k]) for n in one for k in one[n])


def test_snapshots_are_evenly_spaced_and_the_last_is_the_model(tmp_path):
    folder = train(CONFIG, tmp_path / "run")
    names = [path.name for path in sorted((folder / "snapshots").iterdir())]
    assert names == [
        f"{each:.3f}-{step:08d}.safetensors" for each in profiles.SNAPSHOT_LENGTHS for step in (2, 4, 6, 8, 10, 12)
    ]
    model, last = load(folder), read_tensors(folder / "snapshots" / names[5])[0]
    assert same({"": model.state_dict()}, {"": last})
    average, step, _ = profiles.reconstruct_average(folder / "snapshots", 0.05)
    assert step == 12
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(average[name], tensor, rtol=1e-6, atol=1e-7)
    none = train(replace_train(CONFIG, snapshots=0), tmp_path / "none")
    assert not (none / "snapshots").exists()
    assert same({"": load(none).state_dict()}, {"": model.state_dict()})


class Counting(nn.Module):
    """Weights in bfloat16, and buffers that are no real numbers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, channels, dtype=torch.bfloat16)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("large", torch.tensor(2**24 + 1))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x, time, cond=None):
        self.calls += self.training
        return self.layer(x[:, self.order])


def test_integers_and_bools_are_copied_not_averaged(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.NETWORKS, "counting", Counting)
    config = replace(CONFIG, model=replace(CONFIG.model, network={"kind": "counting"}))
    run = Run(train(config, tmp_path / "run"))
    models = [load(run.folder), *(profiles.with_ema_length(run, length)[0] for length in (0.05, 0.08, 0.12))]
    for network in (model.network for model in models):
        assert (network.order.tolist(), network.mask.tolist()) == ([2, 0, 1], [True, False])
        assert (network.calls.dtype, network.layer.weight.dtype) == (torch.int64, torch.bfloat16)
        assert (int(network.calls), int(network.large)) == (12, 2**24 + 1)


def test_a_stopped_run_has_the_same_snapshots(tmp_path, monkeypatch):
    whole, real, at = train(CONFIG, tmp_path / "whole"), Monitor.record_step, [0]

    def step(monitor, *numbers):
        real(monitor, *numbers)
        if monitor.progress.step == at[0]:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Monitor, "record_step", step)
    for at[0] in (2, 3, 8, 12):
        with pytest.raises(Interrupted):
            train(CONFIG, tmp_path / "chain")
    for at[0] in (8, 10):
        with pytest.raises(Interrupted):
            train(CONFIG, tmp_path / "back")
    damaged = tmp_path / "back" / "checkpoints" / "step-00000010" / "network.safetensors"
    damaged.write_bytes(b"x")  # the run resumes from step 8, before the snapshot of step 10
    at[0] = 0
    train(CONFIG, tmp_path / "back")
    for name in ("chain", "back"):
        assert same(tensors(tmp_path / name / "snapshots"), tensors(whole / "snapshots"))
