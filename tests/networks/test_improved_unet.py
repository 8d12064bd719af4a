"""The improved U-Net of Dhariwal & Nichol: residual resampling, heads by width, and the sizes of the paper's models."""

import pytest
import torch
from network_cases import noise, randomized
from torch.nn import functional as F

from undiffuse.errors import ConfigError
from undiffuse.networks.classifier_head import AttentionPool, make_classifier
from undiffuse.networks.norm import GroupNorm
from undiffuse.networks.unet import Down, Residual, UNet, Up

ADM = {"head_width": 64, "scale_shift": True, "residual_resampling": True}
SMALL = {"widths": (8, 16), "blocks": 1, "attention": (0,), "head_width": 4, "residual_resampling": True}


@pytest.mark.parametrize("layer", [Down, Up])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_both_branches_of_a_residual_block_are_resampled(dims, layer):
    """R h + conv₂(SiLU(norm₂(conv₁(R SiLU(norm₁ h)) + W c))), R the means or repeats of cells."""
    block = randomized(Residual(dims, 8, 8, 5, 0.0, False, GroupNorm, layer(dims, 8, learned=False)))
    h, cond = noise(2, 8, *[4] * dims), noise(2, 5)
    pool = getattr(F, f"avg_pool{dims}d")

    def resample(x):
        if layer is Down:
            return pool(x, 2)
        for axis in range(2, x.ndim):
            x = x.repeat_interleave(2, axis)
        return x

    y = block.conv1(resample(F.silu(block.norm1(h)))) + block.cond(cond).reshape(2, 8, *[1] * dims)
    wanted = resample(h) + block.conv2(F.silu(block.norm2(y)))
    torch.testing.assert_close(block(h, cond), wanted)
    assert wanted.shape[2:] == (2 if layer is Down else 8,) * dims


@pytest.mark.parametrize("size", [(7,), (5, 6), (3, 4, 5)])
def test_any_size_in_any_dimension(size):
    network = randomized(UNet(2, 3, dims=len(size), **SMALL))
    assert network(noise(2, 2, *size), torch.tensor([0.1, 0.9])).shape == (2, 3, *size)
    assert not any(name.endswith("layer.weight") for name, _ in network.named_parameters())  # none between the levels


def test_heads_follow_the_width_of_their_level():
    network = UNet(2, tokens=3, **SMALL)
    layers = [m for m in network.modules() if hasattr(m, "heads")]
    assert {(type(m).__name__, m.norm.num_channels, m.heads) for m in layers} == {
        (name, width, width // 4) for name in ("Attention", "CrossAttention") for width in (8, 16)
    }
    assert network.feature_heads == network.encoder().feature_heads == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_width": 3}, r"network.head_width: 3 does not divide the width 16 of level 1\. Give a divisor"),
        ({"head_width": 4, "heads": 2}, r"network.head_width: 4 beside 2 heads\. Give one of heads and head_width"),
        ({"head_width": -1}, "network.head_width: -1 is not a whole number of at least 0"),
    ],
)
def test_heads_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        UNet(2, widths=(16, 16), attention=(1,), **settings)


# --- the sizes of the paper -------------------------------------------------------------------------------------------


def residual(a, b, e):
    """Norm, convolution, the embedding's scale and shift, norm, convolution, and a skip where the widths differ."""
    return 2 * a + (9 * a * b + b) + 2 * b * (e + 1) + 2 * b + (9 * b * b + b) + (a * b + b if a != b else 0)


def attention(c):
    """Norm, queries, keys and values, output."""
    return 2 * c + 3 * c * (c + 1) + c * (c + 1)


def way_down(base, widths, blocks, levels):
    """(parameters of embedding, way down and middle; the widths that the way up gets)."""
    e = 4 * base
    count = (base * e + e) + (e * e + e) + (27 * widths[0] + widths[0])
    skips, width = [widths[0]], widths[0]
    for level, wide in enumerate(widths):
        for _ in range(blocks):
            count += residual(width, wide, e) + (attention(wide) if level in levels else 0)
            width = wide
            skips.append(width)
        if level < len(widths) - 1:
            count += residual(width, width, e)
            skips.append(width)
    return count + 2 * residual(width, width, e) + attention(width), skips


def diffusion_parameters(base, widths, blocks, levels, classes):
    """Of table 11's models: three channels to six (mean and variance), a row of the embedding for each class."""
    e = 4 * base
    count, skips = way_down(base, widths, blocks, levels)
    width = widths[-1]
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            count += residual(width + skips.pop(), widths[level], e)
            width = widths[level]
            count += attention(width) if level in levels else 0
            count += residual(width, width, e) if level and block == blocks else 0
    return count + classes * e + 2 * width + (9 * width * 6 + 6)


MODELS = {  # of ImageNet, table 11: (channels, widths, depth, levels with attention, millions of parameters)
    64: (192, (192, 384, 576, 768), 3, (1, 2, 3), 296),
    128: (256, (256, 256, 512, 768, 1024), 2, (2, 3, 4), 422),
    256: (256, (256, 256, 512, 512, 1024, 1024), 2, (3, 4, 5), 554),
    512: (256, (128, 256, 256, 512, 512, 1024, 1024), 2, (4, 5, 6), 559),
}
CLASSIFIERS = {  # table 12
    64: (128, (128, 256, 384, 512), 4, (1, 2, 3), 65),
    128: (128, (128, 128, 256, 384, 512), 2, (2, 3, 4), 43),
    256: (128, (128, 128, 256, 256, 512, 512), 2, (3, 4, 5), 54),
}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", MODELS)
def test_the_models_have_the_papers_number_of_parameters(size):
    """Ours has one more row of the label embedding, for the null class, than the authors' network.

    At 512 the first width is half of the base, and the sinusoids of the time have the first width (128) in place of
    the base's: 128 rows fewer of the first layer of the embedding.
    """
    base, widths, blocks, levels, millions = MODELS[size]
    with torch.device("meta"):
        network = UNet(3, 6, widths=widths, blocks=blocks, attention=levels, classes=1000, time_width=4 * base, **ADM)
    wanted = diffusion_parameters(base, widths, blocks, levels, 1000)
    assert round(wanted / 1e6) == millions
    assert parameters(network) - wanted == 4 * base - (base - widths[0]) * 4 * base
    if size == 64:
        assert (wanted, parameters(network)) == (295_904_454, 295_905_222)


@pytest.mark.parametrize("size", CLASSIFIERS)
def test_the_classifiers_have_the_papers_number_of_parameters(size):
    """The way down and the middle, a norm, a place for the mean and each of 8×8 positions, and attention pooling.

    No matrix follows the pooled attention but that to the labels, as in the authors' code.
    """
    base, widths, blocks, levels, millions = CLASSIFIERS[size]
    with torch.device("meta"):
        unet = UNet(3, 3, widths=widths, blocks=blocks, attention=levels, **ADM)
        classifier = make_classifier(unet, 1000, "attention", (size, size))
    c = widths[-1]
    wanted = way_down(base, widths, blocks, levels)[0]
    wanted += 2 * c + 65 * c + 3 * c * (c + 1) + 1000 * (c + 1)
    assert parameters(classifier) == wanted
    assert round(wanted / 1e6) == millions
    assert isinstance(classifier.pool, AttentionPool)
