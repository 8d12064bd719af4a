import pytest
import torch
from network_cases import SMALL, noise
from torch import nn

from undiffuse.networks.mlp import MLP
from undiffuse.networks.norm import GroupNorm, LayerNorm, num_groups_for, to_fast_layout
from undiffuse.networks.unet import UNet

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
def test_group_norm_sums_in_float32(dtype):
    h = (noise(2, 32, 16, 16) + 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = GroupNorm(32)(h)
    grouped = h.double().unflatten(1, (8, 4))
    var, mean = torch.var_mean(grouped, (2, 3, 4), correction=0, keepdim=True)
    exact = ((grouped - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


@DTYPES
def test_layer_norm_is_over_the_channels_of_each_position(dtype):
    layer = LayerNorm(32)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    h = (3 * noise(2, 32, 4, 6) + 3).to(dtype).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(h)
    var, mean = torch.var_mean(h.double(), 1, correction=0, keepdim=True)
    weight, bias = layer.weight.double()[:, None, None], layer.bias.double()[:, None, None]
    exact = (h.double() - mean) / (var + 1e-6).sqrt() * weight + bias
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.06)


@pytest.mark.parametrize(("norm", "fast"), [("group", False), ("layer", True)])
def test_weights_are_channels_last_on_a_cpu_with_layer_norm_alone(norm, fast):
    network = to_fast_layout(UNet(2, norm=norm, **SMALL))
    assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last) == fast
    vectors = MLP(2, width=16, depth=2)
    assert to_fast_layout(vectors) is vectors


@pytest.mark.parametrize(
    ("width", "groups"), [(128, 32), (256, 32), (192, 32), (64, 16), (8, 2), (3, 1), (7, 1), (50, 10), (1, 1)]
)
def test_groups_are_the_largest_divisor_that_leaves_four_channels(width, groups):
    assert num_groups_for(width) == groups
