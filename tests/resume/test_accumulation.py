"""k micro-batches are the batch that they make up: loss, gradient and its norm, in float64."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import Accelerator
from tiny_run import ITEM_SHAPE, data, recipe

from undiffuse.codec import Pixels
from undiffuse.config import replace_train
from undiffuse.diffusion import Diffusion
from undiffuse.presets import fitted
from undiffuse.train import loop
from undiffuse.train.batch import global_batch


class One:
    """What `loop.gradient` asks of one of two processes, which tell each other nothing."""

    num_processes = 2

    def __init__(self, process_index):
        self.process_index = process_index
        self.backward, self.gather = torch.Tensor.backward, lambda losses: losses
        self.no_sync = lambda network: nullcontext()


def step(accumulate, clip=1e-3, accelerator=None, dropping=False):
    """The losses, the norms and the clipped gradient of a step in float64."""
    items = data()
    config = replace_train(fitted(recipe(), 5, items.hearing), accumulate=accumulate, clip=clip)
    torch.manual_seed(0)
    model = Diffusion(config.model, ITEM_SHAPE, Pixels(5)).double().train(dropping)

    def batch(step):
        values, u, eps, z, cond = global_batch(items, items.split(0.2).train, config.train, step)
        return values, u, eps.double(), z.double(), cond

    real = model.codec.encode
    object.__setattr__(model.codec, "encode", lambda values: real(values).double())
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    told = accelerator or Accelerator(cpu=True), model, model.network, optimiser, batch, config.train, 3
    _, losses, norms = loop.gradient(*told)
    return losses, torch.tensor(norms, dtype=torch.float64), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_micro_batches_are_the_batch():
    whole = step(1)
    assert whole[0].dtype == whole[2].dtype == torch.float64
    for accumulate in (2, 3, 4, 12):
        for found, known in zip(step(accumulate), whole, strict=True):
            torch.testing.assert_close(found, known, rtol=1e-6, atol=1e-15)


def test_what_is_dropped_is_that_of_the_pass_whoever_makes_it():
    """Two processes of one pass each, and of two each, are one process of two and of four."""
    for passes in (1, 2):
        losses, _, gradient = step(2 * passes, clip=1e9, dropping=True)
        halves = [step(passes, 1e9, One(i), dropping=True) for i in range(2)]
        torch.testing.assert_close(torch.cat([half[0] for half in halves]), losses, rtol=1e-12, atol=0)
        torch.testing.assert_close((halves[0][2] + halves[1][2]) / 2, gradient, rtol=1e-9, atol=1e-15)
    assert (losses - step(2, dropping=True)[0]).abs().max() > 1e-3
    assert not torch.equal(losses, step(4)[0])


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_the_norm_and_the_clip(clip):
    norm, free = step(1)[1].item(), step(1, clip=1e9)[2]
    assert free.norm().item() == pytest.approx(norm, rel=1e-12)
    torch.testing.assert_close(step(3, clip)[2], free * min(1.0, clip / norm), rtol=1e-5, atol=0)
