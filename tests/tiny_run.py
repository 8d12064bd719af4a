"""Runs of a second, for the tests that stop, kill, damage and repeat them, and the sha256 of all that they make."""

from __future__ import annotations

import hashlib
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from undiffuse import networks
from undiffuse.checkpoint import digest, load, read_tensors, save
from undiffuse.conditioning import Condition
from undiffuse.config import Config, ModelConfig, TrainConfig
from undiffuse.data import Dataset, from_array
from undiffuse.train import Interrupted, fit, loop
from undiffuse.train.ema import Average
from undiffuse.train.state import Progress, read_latest, write
from undiffuse.train.watch import Watch

STEPS = 40
ITEM_SHAPE = (1, 4, 4)
NET = {"kind": "tiny"}


class Tiny(nn.Module):
    """Two convolutions, dropout between them, that hear time and label: a step is a few milliseconds."""

    def __init__(self, channels: int, dims: int, out_channels: int = 1, classes: int | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(6, out_channels, 3, padding=1)
        self.told = nn.Embedding((classes or 0) + 1, 6)

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        label = self.told.num_embeddings - 1 if cond is None else cond.label % self.told.num_embeddings
        told = self.told(torch.as_tensor(label).expand(len(x))) + time.to(x.dtype)[:, None] / 10
        return self.last(nn.functional.dropout(torch.tanh(self.first(x) + told[:, :, None, None]), 0.3, self.training))


networks.NETWORKS["tiny"] = Tiny


def data(items: int = 40) -> Dataset:
    """4×4 images of 5 levels in 3 classes."""
    g = np.random.default_rng(0)
    return from_array(g.integers(5, size=(items, 1, 4, 4)), np.arange(items) % 3, levels=5, name="tiny")


def recipe(steps: int = STEPS, **settings) -> Config:
    """Dropout, mirroring and labels, some of them not told: whatever draws a random number in training."""
    told = {"batch": 12, "warmup": 3, "lr": 0.01, "precision": "float32", "held_out": 0.2, "previews": 2, "seed": 4}
    told |= {"flip": True, "conditional": True, "condition_dropout": 0.3, "snapshots": 2}
    model = ModelConfig(network=NET, schedule={"name": "linear_log_snr", "high": 6.0}, steps=5)
    return Config(model, TrainConfig(steps=steps, **(told | settings)))


def train(config: Config, folder: Path, items: Dataset, **settings) -> Path:
    return fit(config, items, folder, device="cpu", quiet=True, **settings)


def quick_look(watch: Watch, *_: object) -> None:
    """Writes the model and the records, and measures and draws nothing."""
    save(watch.smooth, watch.run.model)
    watch.write_records()


@contextmanager
def quick_looks():
    """Quick looks; the end leaves the run unfinished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "look", quick_look)
        patch.setattr(Watch, "finish", lambda watch: save(watch.smooth, watch.run.model))
        yield


@contextmanager
def stopping_at(step: int):
    """A run inside is stopped after ``step`` steps, as a signal stops it; before its first with 0."""
    real_step, real_gradient = Watch.step, loop.gradient

    def after(watch, *numbers):
        real_step(watch, *numbers)
        if watch.progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    def before(*arguments):
        if step == 0:
            raise Interrupted(15)
        return real_gradient(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "step", after)
        patch.setattr(loop, "gradient", before)
        with pytest.raises(Interrupted):
            yield


def held(folder: Path, step: int = STEPS) -> dict[str, str]:
    """sha256 of each part of a checkpoint of training: weights, averages, moments."""
    parts = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return {part.stem: digest(read_tensors(part)[0], {"undiffuse": "state"}) for part in parts}


def made(folder: Path, items: Dataset) -> dict[str, str]:
    """sha256 of what the model of a run says: its weights, eight samples and the bound of some items."""
    model, values = load(folder), torch.from_numpy(items.values[:6])
    numbers = {"samples": model.sample(8, seed=1, steps=4), "nll": model.nll(values, seed=2, draws=4).total}
    hashes = {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in numbers.items()}
    return {**hashes, "model": digest(model.state_dict(), {"undiffuse": "state"})}


class Trained:
    """A tiny network in training: its weights, their average and the optimiser's moments."""

    def __init__(self, seed=0, width=4):
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
        self.average = Average(self.network, 0.1)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=0.1, fused=True)
        self.progress = Progress()

    def train(self, steps=1):
        for _ in range(steps):
            (self.network(torch.ones(1, 3)) ** 2).sum().backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.progress.step += 1
            self.progress.seconds += 0.25
            self.average.update(self.network, self.progress.step)
        return self

    def write(self, folder, **settings):
        return write(folder, self.progress, self.network, self.average, self.optimiser, **settings)

    def read(self, folder):
        self.progress, lines = read_latest(folder, self.network, self.average, self.optimiser)
        return lines

    def tensors(self):
        moments = self.optimiser.state_dict()["state"]
        return {
            **self.network.state_dict(),
            **{f"mean {k}": v for k, v in self.average.mean.items()},
            **{f"{i} {k}": v for i, named in moments.items() for k, v in named.items()},
        }


def same(one: Trained, other: Trained) -> bool:
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
