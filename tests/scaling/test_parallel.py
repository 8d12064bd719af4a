"""The wrapper of the network in training, in one process: checkpointing, compilation, sharding."""

from functools import partial

import gathering
import pytest
import torch
from accelerate import Accelerator

from undiffuse.model.config import TrainConfig, replace_train
from undiffuse.networks.protocol import set_checkpointing
from undiffuse.networks.unet import UNet
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.training.diffusion_task import fit_diffusion
from undiffuse.training.distributed import (
    broadcast_progress,
    distribute_like,
    gather_full,
    prepare_network,
    reduce_signal,
    shard_network,
)
from undiffuse.training.monitor import Monitor
from undiffuse.training.progress import Progress


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


def test_checkpointing_keeps_gradients_and_saves_memory(accelerator):
    x, time, gradients, kept = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7]), [], []
    for again in (False, True):
        network, saved = net(), []
        set_checkpointing(network, again)
        assert prepare_network(accelerator, network, TrainConfig()) is network
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


def test_compiling_keeps_the_names_of_weights(accelerator, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda network: compiled.append(network) or torch.nn.Sequential(network))
    network = net()
    names = list(network.state_dict())
    called = prepare_network(accelerator, network, TrainConfig(compile=True))
    assert compiled == [network]
    assert called is not network
    assert list(network.state_dict()) == names


def test_a_compiled_network_trains_like_any_other(tmp_path, monkeypatch):
    """By dynamo without its code generator, which takes minutes: `make test-release` includes it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(Monitor, "evaluate_now", lambda *_: None)
    monkeypatch.setattr(Monitor, "finish", gathering.finish_only)
    runs = [
        fit_diffusion(replace_train(gathering.CONFIG, compile=c), gathering.DATA, tmp_path / str(c), "cpu", quiet=True)
        for c in (False, True)
    ]
    (one, _), (two, _) = (read_tensors(run / "model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-6, msg=key)


def test_one_process_shards_nothing(accelerator):
    network = net()
    assert shard_network(network, TrainConfig(shard=True), 1, torch.device("cpu")) is network
    tensors = network.state_dict()
    assert gather_full(tensors)["norm.weight"] is not None
    assert gather_full(tensors, keep=False) == {}
    assert distribute_like(tensors["norm.weight"], tensors["norm.bias"]) is tensors["norm.weight"]
    progress = Progress(3, 1.5, None, 9)
    broadcast_progress(accelerator, progress)
    assert progress == Progress(3, 1.5, None, 9)
    assert reduce_signal(accelerator, []) == 0
    assert reduce_signal(accelerator, [15, 2]) == 15
