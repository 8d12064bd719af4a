import pytest
import torch
from network_cases import noise, randomised
from torch import nn

from undiffuse.networks.classifier_head import ClassifierHead, make_classifier
from undiffuse.networks.mlp import MLP
from undiffuse.networks.unet import UNet, encode

UNET = {"widths": (4, 8), "blocks": 1, "attention": ()}


@pytest.mark.parametrize("size", [(), (7,), (5, 6), (3, 4, 5)])
def test_logits_of_every_item(size):
    network = UNet(2, 3, dims=len(size), norm="layer", **UNET) if size else MLP(2, 3, width=32, depth=2)
    classifier = make_classifier(network, 3)
    x, time = noise(4, 2, *size), torch.linspace(-5, 5, 4)
    assert torch.equal(classifier(x, time), torch.zeros(4, 3))
    randomised(classifier)
    logits = classifier(x, time)
    assert logits.shape == (4, 3)
    torch.testing.assert_close(classifier(x[1:2], time[1:2]), logits[1:2])
    assert ((classifier(x, time + 1) - logits).abs() > 0).all()
    logits.sum().backward()
    assert all(p.grad is not None for p in classifier.parameters())  # nothing of the U-Net's way up is left


def test_the_head_of_a_unet_by_hand():
    unet = randomised(UNet(1, 1, **UNET))
    x, time = noise(2, 1, 4, 6), torch.tensor([0.0, 3.0])
    head = randomised(ClassifierHead(unet.encoder(), 5))
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
