"""What a step copies to its device, counted on torch's "meta" device, which has no numbers to read.

A copy to a GPU that is not asynchronous waits until the GPU has done everything before it.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny_run import data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from undiffuse.model.presets import PRESETS
from undiffuse.runtime.device import to_device
from undiffuse.sampling.sampler import Sampler
from undiffuse.training.batches import global_batch
from undiffuse.training.diffusion_task import DiffusionTask

META = torch.device("meta")
ITEMS = data()
TENSORS = 3
"""Copies of a batch: values, noise, and more noise."""


class CountCopies(TorchDispatchMode):
    """Copies from the CPU to META, and those of them that wait."""

    def __init__(self):
        super().__init__()
        self.count, self.waiting = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given, made = ([x.device for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in (args, result))
        if META in made and torch.device("cpu") in given:
            self.count += 1
            if not kwargs.get("non_blocking"):
                self.waiting.append(str(function))
        return result


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **settings: nullcontext())  # has no meta device


def model_on_meta(preset, **settings):
    recipe = PRESETS[preset]
    train = replace(recipe.train, max_steps=1, batch=8, precision="float32", **settings)
    task = DiffusionTask(replace(recipe, train=train)).adapt(ITEMS, train)
    split = ITEMS.split(0.1)
    return task, task.build_model(ITEMS, split).to(META), global_batch(ITEMS, split.train, task.config.train, 0)


@pytest.mark.parametrize(
    ("preset", "coefficients"), [("digits", 7), ("ddpm-cifar10", 6), ("sohl-dickstein", 8), ("adm", 8)]
)
def test_a_training_step_waits_for_no_copy_and_reads_nothing(preset, coefficients):
    """A read of a number, such as ``float``, is an error on META. Noise levels take few copies, not one a number."""
    task, model, batch = model_on_meta(preset)
    with CountCopies() as copies:
        task.loss(model, batch.take(slice(8), META), model.network).mean().backward()
    assert copies.waiting == []
    assert copies.count <= TENSORS + coefficients


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "dpm++2m", "dpm++2m_sde", "heun", "edm", "unipc"])
def test_a_sampling_step_waits_for_no_copy_and_reads_nothing(solver):
    model = model_on_meta("digits")[1]
    with CountCopies() as copies:
        states = list(model.trajectory(range(2), seed=0, sampler=Sampler(solver, num_steps=3)))
    assert copies.waiting == []
    assert len(states) == 4
    assert copies.count > 0


def test_the_counter_sees_a_copy_that_waits():
    with CountCopies() as copies:
        torch.ones(2).to(META)
        to_device(torch.ones(2), META)
    assert (copies.count, len(copies.waiting)) == (2, 1)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_copy_keeps_values_and_converts_them_before(dtype):
    x = torch.tensor([1 / 3, 2.0], dtype=torch.float64)
    y = to_device(x, torch.device("cpu"), dtype)
    assert torch.equal(y, x if dtype is None else x.float())
    assert to_device(x, META, dtype).dtype == (dtype or torch.float64)
