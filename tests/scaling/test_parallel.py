"""What calls the network in training, in one process."""

from functools import partial

import crew
import pytest
import torch
from accelerate import Accelerator

from undiffuse.checkpoint import read_tensors
from undiffuse.config import TrainConfig, replace_train
from undiffuse.networks.unet import Stage, UNet
from undiffuse.train import fit
from undiffuse.train.parallel import agree, cut, gathered, loudest, prepare, recompute, shared_like
from undiffuse.train.state import Progress
from undiffuse.train.watch import Watch


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


def test_what_is_compiled_trains_as_ever(tmp_path, monkeypatch):
    """By dynamo without its code generator, which takes minutes: `make test-release` has the whole."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(Watch, "look", lambda *_: None)
    monkeypatch.setattr(Watch, "finish", crew.end)
    runs = [
        fit(replace_train(crew.CONFIG, compile=compiled), crew.DATA, tmp_path / str(compiled), device="cpu", quiet=True)
        for compiled in (False, True)
    ]
    (one, _), (two, _) = (read_tensors(run / "model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-6, msg=key)


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
