"""Gradient accumulation equals one large batch: losses, gradient and its norm, in float64."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_run import ITEM_SHAPE, data, global_batch, recipe

from undiffuse.data.transform import IntegerLevels
from undiffuse.model.config import replace_train
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.presets import adapt_to_data
from undiffuse.training import fit as loop
from undiffuse.training.batches import Batch
from undiffuse.training.diffusion_task import DiffusionTask
from undiffuse.training.progress import Progress


class One:
    """An accelerator for one of two processes that do not communicate."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, process_index):
        self.process_index = process_index
        self.backward, self.gather = torch.Tensor.backward, lambda losses: losses
        self.no_sync = lambda network: nullcontext()


def step(accumulate, clip=1e-3, accelerator=None, dropout=False):
    """Losses, norms and clipped gradient of a step in float64."""
    items = data()
    config = replace_train(adapt_to_data(recipe(), 5, items.condition_sizes), accumulate=accumulate, clip=clip)
    torch.manual_seed(0)
    model = Diffusion(config.model, ITEM_SHAPE, IntegerLevels(5)).double().train(dropout)

    batch = global_batch(items, items.split(0.2).train, config.train, 3)
    real = model.transform.to_model
    object.__setattr__(model.transform, "to_model", lambda values, dtype=None: real(values).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = SimpleNamespace(task=DiffusionTask(config), model=model, optimizer=optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "eps", property(lambda part, real=Batch.eps.func: real(part).double()))
        losses, norms = loop.compute_gradient(
            accelerator or Accelerator(cpu=True), state, model.network, batch, Progress(step=3)
        )
    return losses, torch.tensor(norms, dtype=torch.float64), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_micro_batches_equal_the_batch():
    whole = step(1)
    assert whole[0].dtype == whole[2].dtype == torch.float64
    for accumulate in (2, 3, 4, 12):
        for actual, expected in zip(step(accumulate), whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-15)


def test_dropout_depends_on_the_micro_batch_and_not_on_the_process():
    """Two processes with one micro-batch each, or two each, equal one process with two or four."""
    for passes in (1, 2):
        losses, _, gradient = step(2 * passes, clip=1e9, dropout=True)
        halves = [step(passes, 1e9, One(i), dropout=True) for i in range(2)]
        torch.testing.assert_close(torch.cat([half[0] for half in halves]), losses, rtol=1e-12, atol=0)
        torch.testing.assert_close((halves[0][2] + halves[1][2]) / 2, gradient, rtol=1e-9, atol=1e-15)
    assert (losses - step(2, dropout=True)[0]).abs().max() > 1e-3
    assert not torch.equal(losses, step(4)[0])


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_the_gradient_is_clipped_by_its_norm(clip):
    norm, free = step(1)[1].item(), step(1, clip=1e9)[2]
    assert free.norm().item() == pytest.approx(norm, rel=1e-12)
    torch.testing.assert_close(step(3, clip)[2], free * min(1.0, clip / norm), rtol=1e-5, atol=0)
