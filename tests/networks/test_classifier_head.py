import math

import pytest
import torch
from network_cases import noise, randomized, softmax_attention
from torch import nn

from undiffuse.errors import ConfigError
from undiffuse.networks.classifier_head import AttentionPool, ClassifierHead, make_classifier
from undiffuse.networks.mlp import MLP
from undiffuse.networks.unet import UNet, encode

UNET = {"widths": (4, 8), "blocks": 1, "attention": ()}


@pytest.mark.parametrize("size", [(), (7,), (5, 6), (3, 4, 5)])
def test_logits_of_every_item(size):
    network = UNet(2, 3, dims=len(size), norm="layer", **UNET) if size else MLP(2, 3, width=32, depth=2)
    classifier = make_classifier(network, 3)
    x, time = noise(4, 2, *size), torch.linspace(-5, 5, 4)
    assert torch.equal(classifier(x, time), torch.zeros(4, 3))
    randomized(classifier)
    logits = classifier(x, time)
    assert logits.shape == (4, 3)
    torch.testing.assert_close(classifier(x[1:2], time[1:2]), logits[1:2])
    assert ((classifier(x, time + 1) - logits).abs() > 0).all()
    logits.sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())  # nothing of the U-Net's way up is left


def test_the_head_of_a_unet_by_hand():
    unet = randomized(UNet(1, 1, **UNET))
    x, time = noise(2, 1, 4, 6), torch.tensor([0.0, 3.0])
    head = randomized(ClassifierHead(unet.encoder(), 5))
    h = encode(unet, x, time, None)[1]
    assert h.shape == (2, 8, 2, 3)
    h = torch.nn.functional.silu(head.norm(h)).mean((2, 3))
    torch.testing.assert_close(head(x, time), h @ head.fc.weight.T + head.fc.bias)
    assert head(x.double().bfloat16().float(), time).dtype == torch.float32


class Convolution(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x, time, cond=None):
        return self.layer(x)


def test_a_network_without_an_encoder_is_averaged_over_positions():
    network, x = Convolution(2, 3), noise(4, 2, 5, 6)
    torch.testing.assert_close(make_classifier(network, 3)(x, torch.zeros(4)), network.layer(x).mean((2, 3)))
    network.encoder = nn.Identity()  # a sub-module of this name is not the declaration
    assert make_classifier(network, 3)(x, torch.zeros(4)).shape == (4, 3)


# --- attention pooling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7,), (5, 6), (3, 4, 5)])
def test_attention_pooling_in_any_dimension(size):
    network = UNet(2, 3, dims=len(size), head_width=4, **UNET)
    classifier = make_classifier(network, 3, "attention", size)
    x, time = noise(4, 2, *size), torch.linspace(-5, 5, 4)
    assert torch.equal(classifier(x, time), torch.zeros(4, 3))
    assert classifier.pool.position.shape == (1 + math.prod(-(-n // 2) for n in size), 8)
    assert classifier.pool.heads == 2
    randomized(classifier)
    logits = classifier(x, time)
    torch.testing.assert_close(classifier(x[1:2], time[1:2]), logits[1:2])
    logits.sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_attention_pooling_by_hand():
    """The output at the mean token of attention among it and all positions, as in the module of CLIP."""
    pool, h = randomized(AttentionPool(8, (2, 3), heads=2)), noise(4, 8, 2, 3)
    tokens = torch.cat([h.mean((2, 3))[:, None], h.permute(0, 2, 3, 1).reshape(4, 6, 8)], 1) + pool.position
    q = (tokens @ pool.q.weight.T + pool.q.bias).reshape(4, 7, 2, 4).transpose(1, 2)
    k, v = ((tokens @ w.T + b).reshape(4, 7, 2, 4).transpose(1, 2) for w, b in halves(pool.kv))
    wanted = softmax_attention(q, k, v)[:, :, 0].reshape(4, 8)
    torch.testing.assert_close(pool(h), wanted)
    moved = h.flip(3)
    assert not torch.allclose(pool(moved), wanted)  # the place of a feature matters
    with torch.no_grad():
        pool.position.zero_()
    torch.testing.assert_close(pool(moved), pool(h))


def halves(layer):
    return zip(layer.weight.chunk(2), layer.bias.chunk(2), strict=True)


@pytest.mark.parametrize(
    ("pooling", "network", "message"),
    [
        ("max", UNet(2, 3, **UNET), r"pooling = 'max': unknown\. Use 'mean' or 'attention'"),
        ("attention", MLP(2, 3, width=32, depth=2), r"declares no size of the features of an item\. Use a unet, or"),
        ("attention", Convolution(2, 3), "declares no size"),
    ],
)
def test_poolings_that_cannot_be(pooling, network, message):
    with pytest.raises(ConfigError, match=message):
        make_classifier(network, 3, pooling, (4, 4))
    with pytest.raises(ConfigError, match=r"the features have 4,194,304 positions, more than 65,536\. Use more levels"):
        make_classifier(UNet(2, 3, **UNET), 3, "attention", (4096, 4096))
