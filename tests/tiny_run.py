"""Runs of a second, for tests that stop, kill, damage and repeat them, and the sha256 of everything they produce."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from undiffuse.data.dataset import Dataset
from undiffuse.data.from_array import from_array
from undiffuse.model.checkpoint import load
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks import registry as networks
from undiffuse.networks.condition import Condition
from undiffuse.runtime.signals import Interrupted
from undiffuse.runtime.tensor_file import digest, read_tensors
from undiffuse.sampling.sampler import Sampler
from undiffuse.training import batches
from undiffuse.training import fit as loop
from undiffuse.training.diffusion_task import fit_diffusion
from undiffuse.training.ema import PowerEMA
from undiffuse.training.monitor import Monitor
from undiffuse.training.progress import Progress
from undiffuse.training.train_state import StateParts, TrainState, load_latest, write_checkpoint

STEPS = 40
ITEM_SHAPE = (1, 4, 4)
NET = {"kind": "tiny"}


class Tiny(nn.Module):
    """Two convolutions with dropout between them, conditioned on time and label: a step is a few milliseconds."""

    def __init__(self, channels: int, dims: int, out_channels: int = 1, classes: int | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 6, 3, padding=1), nn.Conv2d(6, out_channels, 3, padding=1)
        self.label = nn.Embedding((classes or 0) + 1, 6)

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        label = self.label.num_embeddings - 1 if cond is None else cond.label % self.label.num_embeddings
        shift = self.label(torch.as_tensor(label).expand(len(x))) + time.to(x.dtype)[:, None] / 10
        return self.last(nn.functional.dropout(torch.tanh(self.first(x) + shift[:, :, None, None]), 0.3, self.training))


networks.NETWORKS["tiny"] = Tiny


def data(items: int = 40) -> Dataset:
    """4×4 images of 5 grey levels in 3 classes."""
    g = np.random.default_rng(0)
    return from_array(g.integers(5, size=(items, 1, 4, 4)), np.arange(items) % 3, num_values=5, name="tiny")


def recipe(max_steps: int = STEPS, **settings) -> Config:
    """Dropout, mirror images and partly dropped labels: everything that draws a random number in training."""
    defaults = {"batch": 12, "warmup": 3, "lr": 0.01, "precision": "float32", "held_out": 0.2, "previews": 2, "seed": 4}
    defaults |= {"flip": True, "conditional": True, "condition_dropout": 0.3, "snapshots": 2}
    model = ModelConfig(network=NET, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=5)
    return Config(model, TrainConfig(max_steps=max_steps, **(defaults | settings)))


def global_batch(data: Dataset, items: np.ndarray, settings: TrainConfig, step: int) -> batches.Batch:
    """The batch of a step, of the values of ``data``."""
    return batches.global_batch(data, items, settings, step, batches.values_of(data))


def train(config: Config, folder: Path, items: Dataset, **settings) -> Path:
    return fit_diffusion(config, items, folder, device="cpu", quiet=True, **settings)


def save_only(monitor: Monitor, *_: object) -> None:
    """An evaluation that writes the model and the records but measures and draws nothing."""
    monitor.task.save(monitor.ema_model, monitor.run.model)
    monitor.write_records()


def finish_early(monitor: Monitor) -> None:
    """A finish that writes the model but leaves the run unfinished."""
    monitor.task.save(monitor.ema_model, monitor.run.model)


@contextmanager
def quick_looks():
    """Evaluations are replaced by `save_only`, and the end leaves the run unfinished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "evaluate_now", save_only)
        patch.setattr(Monitor, "finish", finish_early)
        yield


@contextmanager
def stopping_at(step: int):
    """Stop the run inside by a signal after ``step`` steps; with 0 before its first step."""
    real_step, real_gradient = Monitor.record_step, loop.compute_gradient

    def record_step(monitor, *numbers):
        real_step(monitor, *numbers)
        if monitor.progress.step == step:
            signal.raise_signal(signal.SIGTERM)

    def compute_gradient(*arguments):
        if step == 0:
            raise Interrupted(15)
        return real_gradient(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "record_step", record_step)
        patch.setattr(loop, "compute_gradient", compute_gradient)
        with pytest.raises(Interrupted):
            yield


class SlowMachine:
    """A clock that nothing moves but the work of a run: training steps, network calls, checkpoints.

    A step takes ``step`` seconds, a network call for one item ``call``, a checkpoint ``save``; each can be changed
    while a run goes on. ``calls`` counts the network calls of evaluations and pictures.
    """

    def __init__(self, patch: pytest.MonkeyPatch, step: float, call: float = 0.0, save: float = 0.0) -> None:
        self.now, self.step, self.call, self.save, self.calls = 1000.0, step, call, save, 0
        self._replace(patch, loop, "compute_gradient", lambda *_, **__: self.step)
        self._replace(patch, TrainState, "save", lambda *_, **__: self.save)
        self._replace(
            patch, Diffusion, "nll", lambda _, values, mc_samples=1, **__: self.take(len(values) * mc_samples)
        )
        self._replace(patch, Diffusion, "sample", lambda _, n, sampler, **__: self.take(n * sampler.num_steps))

    def __call__(self) -> float:
        return self.now

    def take(self, calls: int) -> float:
        self.calls += calls
        return calls * self.call

    def _replace(self, patch: pytest.MonkeyPatch, where: object, name: str, cost: Callable[..., float]) -> None:
        real = getattr(where, name)

        def slow(*arguments, **options):
            self.now += cost(*arguments, **options)
            return real(*arguments, **options)

        patch.setattr(where, name, slow)


def checkpoint_hashes(folder: Path, step: int = STEPS) -> dict[str, str]:
    """sha256 of each part of a checkpoint of training: weights, averages, moments."""
    parts = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    return {part.stem: digest(read_tensors(part)[0], {"undiffuse": "state"}) for part in parts}


def model_hashes(folder: Path, items: Dataset) -> dict[str, str]:
    """sha256 of a run's model: its weights, eight samples and the bound of some items."""
    model, values = load(folder), torch.from_numpy(items.values[:6])
    numbers = {
        "samples": model.sample(8, seed=1, sampler=Sampler(num_steps=4)),
        "nll": model.nll(values, seed=2, mc_samples=4).total,
    }
    hashes = {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in numbers.items()}
    return {**hashes, "model": digest(model.state_dict(), {"undiffuse": "state"})}


class Trained:
    """A tiny network in training: its weights, their average and the optimizer's moments."""

    def __init__(self, seed=0, width=4):
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2))
        self.ema = PowerEMA(self.network, 0.1)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.1, fused=True)
        self.progress = Progress()

    def train(self, steps=1):
        for _ in range(steps):
            (self.network(torch.ones(1, 3)) ** 2).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.progress.step += 1
            self.progress.seconds += 0.25
            self.ema.update(self.network, self.progress.step)
        return self

    @property
    def parts(self):
        return StateParts(self.network, self.ema, self.optimizer)

    def write(self, folder, **settings):
        return write_checkpoint(folder, self.progress, self.parts, **settings)

    def read(self, folder):
        self.progress, lines = load_latest(folder, self.parts)
        return lines

    def tensors(self):
        moments = self.optimizer.state_dict()["state"]
        return {
            **self.network.state_dict(),
            **{f"mean {k}": v for k, v in self.ema.mean.items()},
            **{f"{i} {k}": v for i, named in moments.items() for k, v in named.items()},
        }


def equal_states(one: Trained, other: Trained) -> bool:
    a, b = one.tensors(), other.tensors()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def equal_numbers(one, other):
    """Whether two batches have the same values, uniform numbers u and r, and noises eps and z."""
    return [torch.equal(getattr(one, name), getattr(other, name)) for name in ("values", "u", "r", "eps", "z")]
