"""What a network declares, and what holds for a plain ``nn.Module`` that declares nothing."""

from copy import deepcopy

import pytest
import torch
from network_cases import CASES, SMALL, condition, inputs, noise, randomized
from torch import nn

from undiffuse.denoising.categorical_head import LOGIT_FEATURES, CategoricalHead
from undiffuse.errors import ConfigError
from undiffuse.networks.dit import DiT
from undiffuse.networks.mlp import MLP
from undiffuse.networks.protocol import (
    accepts_dims,
    adapt_weights,
    blocks,
    check_output,
    condition_sizes,
    init_statistics,
    set_checkpointing,
)
from undiffuse.networks.unet import Stage, UNet


class Plain(nn.Module):
    """A network that declares nothing. ``shift`` is added to the number of output channels."""

    def __init__(self, channels: int = 2, width: int = 4, shift: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(channels, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5)) for _ in range(3))
        self.last = nn.Linear(width, channels + shift)

    def forward(self, x, time, cond=None):
        h = self.first(x) + time[:, None]
        for layer in self.layers:
            h = h + torch.tanh(layer(h))
        return self.last(h)


class WithoutBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, x, time, cond=None):
        return self.last(torch.tanh(self.first(x) + time[:, None]))


def test_blocks_of_a_network():
    unet, plain = UNet(2, **SMALL), Plain()
    assert blocks(unet) == [m for m in unet.modules() if isinstance(m, Stage)]
    assert blocks(CategoricalHead(unet, 2, 5)) == blocks(unet)
    assert blocks(plain) == list(plain.layers)
    assert blocks(WithoutBlocks()) == []
    plain.blocks = nn.Linear(1, 1)  # a sub-module of this name is not the declaration
    assert blocks(plain) == list(plain.layers)


def gradients(network, x):
    torch.manual_seed(1)  # of dropout
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        y = network(x, torch.full((len(x),), 0.3))
    y.square().mean().backward()
    return [p.grad for p in network.parameters()], sum(saved)


@pytest.mark.parametrize(
    "make",
    [
        Plain,
        WithoutBlocks,
        lambda: CASES["unet"](dropout=0.5),
        lambda: CASES["dit"](dropout=0.5),
        lambda: CASES["mlp"](),
    ],
)
def test_checkpointing_changes_memory_and_nothing_else(make):
    network = randomized(make()).train()
    x = inputs("unet" if isinstance(network, UNet | DiT) else "mlp")
    copies = [deepcopy(network) for _ in range(3)]
    set_checkpointing(copies[1], True)
    set_checkpointing(copies[2], True)
    set_checkpointing(copies[2], False)
    copies.append(deepcopy(copies[1]))
    assert list(copies[1].state_dict()) == list(network.state_dict())
    (plain, kept), (checkpointed, less), (off, again), (copied, same) = (gradients(copy, x) for copy in copies)
    for others in (checkpointed, off, copied):
        assert all(torch.equal(one, two) for one, two in zip(plain, others, strict=True) if one is not None)
    assert less < kept
    assert (again, same) == (kept, less)
    assert all(one is not two for one, two in zip(copies[1].parameters(), copies[3].parameters(), strict=True))
    with torch.no_grad():
        x = x[:1]
        copies[1].eval()
        assert torch.equal(copies[1](x, torch.zeros(1)), network.eval()(x, torch.zeros(1)))


def test_a_copy_of_a_checkpointed_network_uses_its_own_weights():
    network = Plain().eval()
    set_checkpointing(network, True)
    copy, x = deepcopy(network), noise(3, 2)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert copy(x, torch.zeros(3)).abs().max() > 0


class Statistics:
    def __init__(self, vector_moments):
        self.counts, self.vector_moments = torch.tensor([[6, 2, 0, 0, 0]] * 2), vector_moments


def test_statistics_reach_the_parts_that_start_from_them():
    network = UNet(2, 2 * LOGIT_FEATURES, vector=4, **SMALL)
    head, moments = CategoricalHead(network, 2, 5), (torch.arange(4.0), torch.full((4,), 2.0))
    init_statistics(head, Statistics(None))
    assert torch.equal(network.embed.vector.mean, torch.zeros(4))
    init_statistics(head, Statistics(moments))
    assert torch.equal(network.embed.vector.mean, moments[0])
    assert torch.equal(network.embed.vector.std, moments[1])
    torch.testing.assert_close(head.bias[0, 0].exp(), torch.tensor([7.0, 3, 1, 1, 1]) / 13)
    init_statistics(Plain(), Statistics(moments))


def test_dimensions_and_conditions():
    for network in (MLP, MLP(2)):
        assert [accepts_dims(network, dims) for dims in range(5)] == [True, False, False, False, False]
    assert [accepts_dims(UNet, dims) for dims in range(5)] == [False, True, True, True, False]
    assert all(accepts_dims(Plain, dims) for dims in range(5))
    assert condition_sizes({"kind": "unet", "classes": 3, "vector": 0, "width": 9}) == {"classes": 3}
    assert condition_sizes(MLP(2, tokens=3).condition_sizes) == {"tokens": 3}


class Watching(nn.Module):
    """Records its calls; its normalization and dropout would show a pass in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen, self.calls = nn.BatchNorm1d(2), nn.Dropout().eval(), []

    def forward(self, x, time, cond=None):
        self.calls.append(cond)
        return self.norm(x) + torch.rand(1)


def test_the_check_of_the_output_leaves_no_trace():
    network, random = Watching(), torch.get_rng_state()
    before = deepcopy(network.state_dict())
    check_output(network, (2,), 2, {"classes": 3, "vector": 4, "tokens": 5}, "net")
    first, null = network.calls
    assert first is None
    assert null.label.tolist() == [-1, -1]
    assert null.vector.isnan().all()
    assert null.tokens.shape == (2, 1, 5)
    assert not null.mask.any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert (network.training, network.norm.training, network.frozen.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), random)


class Forward(nn.Linear):
    """A network whose forward pass is ``function`` of x."""

    def __init__(self, function) -> None:
        super().__init__(1, 1)
        self.function = function

    def forward(self, x, time, cond=None):
        return self.function(x)


@pytest.mark.parametrize(
    ("network", "out_channels", "cause"),
    [
        (Plain(shift=1), 2, r"from zeros of shape \(2, 2\) it makes \(2, 3\), not \(2, 2\). Give it 2 output channels"),
        (Plain(), 48, r"it makes \(2, 2\), not \(2, 48\).*out_channels.*or train with output = 'values'"),
        (Forward(lambda x: [x]), 2, r"it makes no tensor \(list\), not \(2, 2\)"),
        (Forward(lambda x: x[:, :, None]), 2, r"it makes \(2, 2, 1\), not \(2, 2\)"),
        (Forward(lambda x: x @ torch.ones(3, 1)), 2, r"its forward pass fails on items of shape \(2,\) \(RuntimeError"),
        (nn.Linear(2, 2), 2, r"its forward pass fails on items of shape \(2,\) \(TypeError"),
        (nn.Identity(), 2, "it has no parameters"),
    ],
)
def test_networks_with_another_output_are_refused_in_one_line(network, out_channels, cause):
    with pytest.raises(ConfigError, match=cause) as caught:
        check_output(network, (2,), out_channels, {}, "net")
    assert str(caught.value).startswith("error[NETWORK] net: ")
    assert "\n" not in str(caught.value)


def test_a_network_is_called_with_the_condition_that_it_declares():
    network = randomized(CASES["all-conditions-mlp"]())
    check_output(network, (2,), 2, condition_sizes(network.condition_sizes), "mlp")
    assert network(inputs("mlp"), torch.zeros(4), condition()).shape == (4, 2)


@pytest.mark.parametrize("case", [*CASES, "scaled middle"])
def test_weights_of_the_same_network_are_adapted_to_themselves(case):
    """Layers without weights, such as a division, were counted, so that others got the weights of their neighbours."""
    make = (lambda: CASES["diffusers"](mid_block_scale_factor=1.4)) if case == "scaled middle" else CASES[case]
    weights = randomized(make()).state_dict()
    adapted = adapt_weights(make(), weights, None)
    assert adapted.keys() == weights.keys()
    assert all(torch.equal(adapted[name], tensor) for name, tensor in weights.items())
