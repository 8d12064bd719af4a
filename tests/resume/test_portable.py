"""Weights can be saved from and loaded into a network that is bare, compiled, wrapped by DDP, or both."""

import itertools

import pytest
import torch
from safetensors import safe_open
from tiny_run import ITEM_SHAPE, recipe
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from undiffuse.data.transform import IntegerLevels
from undiffuse.model.checkpoint import load, save, weights
from undiffuse.model.diffusion import Diffusion

KINDS = {
    "bare": lambda network: network,
    "compiled": torch.compile,
    "parallel": DistributedDataParallel,
    "compiled parallel": lambda network: torch.compile(DistributedDataParallel(network)),
}


@pytest.fixture(scope="module", autouse=True)
def process():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def wrapped(kind, seed):
    torch.manual_seed(seed)
    model = Diffusion(recipe().model, ITEM_SHAPE, IntegerLevels(5))
    model.network = KINDS[kind](model.network)
    return model


@pytest.mark.parametrize(("one", "other"), list(itertools.product(KINDS, repeat=2)))
def test_weights_go_from_each_kind_to_each(one, other, tmp_path):
    model, goal = wrapped(one, 0), wrapped(other, 1)
    save(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name or "module" in name]  # noqa: SIM118
    stored = weights(load(tmp_path / "model.safetensors"))
    for name, tensor in weights(goal).items():
        assert not torch.equal(tensor, stored[name]) or not tensor.any()
        tensor.copy_(stored[name])
    bare = wrapped("bare", 0)
    assert torch.equal(goal.state_dict()[next(iter(goal.state_dict()))], next(iter(bare.state_dict().values())))
    assert weights(goal).keys() == weights(bare).keys()
    assert all(torch.equal(tensor, weights(bare)[name]) for name, tensor in weights(goal).items())
