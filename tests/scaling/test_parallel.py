"""What calls the network in training, in one process."""

import pytest
import torch
from accelerate import Accelerator

from undiffuse.config import TrainConfig
from undiffuse.networks.unet import Stage, UNet
from undiffuse.train.parallel import agree, cut, gathered, loudest, prepare, recompute, shared_like
from undiffuse.train.state import Progress


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def net(dropout=0.5):
    torch.manual_seed(0)
    network = UNet(1, widths=(8, 8), blocks=1, attention=(1,), dropout=dropout)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1)
    return network


def test_what_is_computed_again_is_the_same_and_takes_less_memory(accelerator):
    x, time, gradients, kept = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7]), [], []
    for again in (False, True):
        network, saved = net(), []
        assert recompute(network, TrainConfig(checkpointing=again)) is prepare(accelerator, network, TrainConfig())
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t
        ):
            y = network(x, time)
        y.square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
        kept.append(sum(saved))
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 3
    network.eval()
    with torch.no_grad():
        assert torch.equal(network(x, time), net(0.0).eval()(x, time))


def test_compiling_is_asked_for_and_leaves_the_names(accelerator, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda network: asked.append(network) or torch.nn.Sequential(network))
    network = net()
    names = list(network.state_dict())
    called = prepare(accelerator, network, TrainConfig(compile=True))
    assert asked == [network]
    assert called is not network
    assert list(network.state_dict()) == names


def test_one_process_cuts_nothing(accelerator):
    network = net()
    assert cut(network, TrainConfig(shard=True), 1, torch.device("cpu")) is network
    assert not any(module.recompute for module in network.modules() if isinstance(module, Stage))
    tensors = network.state_dict()
    assert gathered(tensors)["norm.weight"] is not None
    assert gathered(tensors, keep=False) == {}
    assert shared_like(tensors["norm.weight"], tensors["norm.bias"]) is tensors["norm.weight"]
    progress = Progress(3, 1.5, None, 9)
    agree(accelerator, progress)
    assert progress == Progress(3, 1.5, None, 9)
    assert loudest(accelerator, []) == 0
    assert loudest(accelerator, [15, 2]) == 15
