"""The transformer on patches: its parts against formulas, its symmetries, its sizes, and its settings."""

import math
from dataclasses import replace

import pytest
import torch
from network_cases import CASES, TRANSFORMER, condition, noise, randomized, softmax_attention
from torch.nn import functional as F

from undiffuse.errors import ConfigError
from undiffuse.networks import dit
from undiffuse.networks.condition import Condition
from undiffuse.networks.dit import DiT, SelfAttention, SwiGLU, normed, positions
from undiffuse.networks.patches import fold, unfold
from undiffuse.networks.protocol import adapt_weights, blocks
from undiffuse.networks.registry import build

f64 = torch.float64
ONE = torch.tensor(1.0)


@pytest.mark.parametrize("size", [(1,), (7,), (16,), (1, 1), (3, 5), (8, 8), (3, 2, 5), (4, 4, 4)], ids=str)
def test_any_size_in_any_dimension(size):
    network = randomized(DiT(2, 3, dims=len(size), **TRANSFORMER))
    y = network(noise(2, 2, *size), torch.tensor([0.1, 0.9]))
    assert y.shape == (2, 3, *size)
    assert y.isfinite().all()


def test_odd_sizes_are_padded_by_repeating_the_edge_and_cropped():
    network, x = randomized(DiT(2, **{**TRANSFORMER, "patch": 4})), noise(2, 2, 5, 6)
    padded = torch.cat([x, x[..., -1:], x[..., -1:]], 3)
    padded = torch.cat([padded, *[padded[:, :, -1:]] * 3], 2)
    torch.testing.assert_close(network(x, ONE), network(padded, ONE)[..., :5, :6])


def test_attention_is_the_softmax_of_normed_products():
    layer, h = randomized(SelfAttention(12, 2).double()), noise(3, 5, 12, dtype=f64)
    q, k, v = (h @ layer.qkv.weight.T + layer.qkv.bias).split(12, 2)
    heads = []
    for head in (slice(0, 6), slice(6, 12)):
        q_head, k_head = (
            one[..., head] / (one[..., head].square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
            for one, weight in ((q, layer.norm_q.weight), (k, layer.norm_k.weight))
        )
        heads.append(softmax_attention(q_head, k_head, v[..., head]))
    expected = torch.cat(heads, -1) @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(h), expected, rtol=1e-12, atol=1e-12)


def test_the_whole_network_is_its_formula():
    """One block, in float64, from the weights alone."""
    network = randomized(DiT(2, **{**TRANSFORMER, "depth": 1}, hidden=7).double())
    w, x, time = (
        dict(network.named_parameters()),
        noise(3, 2, 4, 6, dtype=f64),
        torch.tensor([0.1, -3.0, 5.0], dtype=f64),
    )

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h, scale, shift):
        mean = h.mean(-1, keepdim=True)
        y = (h - mean) / ((h - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return y * (1 + scale[:, None]) + shift[:, None]

    def at(index):  # three frequencies: 1, 1/100, 1/10,000
        angle = [index * 10_000.0 ** (-j / 2) for j in range(3)]
        return [*map(math.sin, angle), *map(math.cos, angle)]

    e = network.embed(time, None)
    place = torch.tensor([at(i) + at(j) for i in range(2) for j in range(3)], dtype=f64)
    patches = [x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1) for i in range(2) for j in range(3)]
    h = linear("proj_in", torch.stack(patches, 1)) + place
    shift1, scale1, gate1, shift2, scale2, gate2 = linear("layers.0.modulation", e).split(12, 1)
    h = h + gate1[:, None] * network.layers[0].attention(norm(h, scale1, shift1))
    a, b = linear("layers.0.feed_forward.fc1", norm(h, scale2, shift2)).split(7, 2)
    h = h + gate2[:, None] * linear("layers.0.feed_forward.fc2", a * torch.sigmoid(a) * b)
    shift, scale = linear("modulation", e).split(12, 1)
    y = linear("proj_out", norm(h, scale, shift)).unflatten(2, (2, 2, 2))
    rows = [torch.cat([y[:, 3 * i + j] for j in range(3)], 3) for i in range(2)]
    torch.testing.assert_close(network(x, time), torch.cat(rows, 2), rtol=1e-6, atol=1e-6)  # sinusoids are float32


@pytest.mark.parametrize("size", [(64,), (16, 16), (3, 40), (5, 6, 7)], ids=str)
@pytest.mark.parametrize("width", [6, 12, 192])
def test_every_patch_has_a_position_of_its_own(size, width):
    rows = positions(size, width, ONE)
    assert rows.shape == (math.prod(size), width)
    distance = torch.cdist(rows.double(), rows.double()) + 9 * torch.eye(len(rows))
    assert distance.min() > 0.01
    assert positions(size, width, torch.zeros((), dtype=f64)).dtype == f64


def test_a_network_without_positions_commutes_with_permutations_of_the_patches(monkeypatch):
    network, x, order = randomized(DiT(2, **TRANSFORMER)), noise(2, 2, 4, 6), torch.randperm(6)

    def permuted(x):
        return unfold(fold(x, 2).flatten(2)[..., order].unflatten(2, (2, 3)), 2)

    assert (network(permuted(x), ONE) - permuted(network(x, ONE))).abs().max() > 1e-3
    monkeypatch.setattr(dit, "positions", lambda size, width, like: torch.zeros(math.prod(size), width))
    torch.testing.assert_close(network(permuted(x), ONE), permuted(network(x, ONE)), rtol=1e-4, atol=1e-5)


def test_blocks_return_their_input_at_initialization():
    network, h = CASES["all-conditions-dit"](), noise(4, 6, 12)
    embedding, tokens = noise(4, 12), network.tokens(condition(), h)
    for layer in blocks(network):
        assert torch.equal(layer(h, embedding, tokens), h)
    assert len(blocks(network)) == 2


def test_normed_tokens_and_swiglu():
    h, scale, shift = noise(2, 3, 8, dtype=f64), noise(2, 8, seed=2, dtype=f64), noise(2, 8, seed=3, dtype=f64)
    assert normed(h.float(), scale, shift).dtype == torch.float32
    y = (normed(h, scale, shift) - shift[:, None]) / (1 + scale[:, None])
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 3, dtype=f64), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 3, dtype=f64), rtol=1e-4, atol=0)
    layer = randomized(SwiGLU(8, 5, 0.5).double())
    a, b = layer.fc1(h).split(5, -1)
    torch.testing.assert_close(layer(h), F.linear(a * a.sigmoid() * b, layer.fc2.weight, layer.fc2.bias))


@pytest.mark.parametrize(
    ("settings", "channels"),
    [
        ({}, 1),
        ({"bottleneck": 16, "classes": 10}, 3),
        ({"width": 64, "depth": 3, "heads": 4, "patch": 2, "time_width": 32, "hidden": 100}, 2),
    ],
)
def test_the_number_of_parameters(settings, channels):
    """A block of width d has 6 d t + 4 d² + 3 d m in matrices, 18 d² by default, and its biases and norms."""
    full = {"width": 192, "depth": 6, "heads": 3, "patch": 4, "bottleneck": 0, "classes": 0} | settings
    d, t, m = full["width"], full.get("time_width", full["width"]), full.get("hidden", 8 * full["width"] // 3)
    matrices = 6 * d * t + 4 * d * d + 3 * d * m
    block = matrices + 6 * d + 4 * d + (2 * m + d) + 2 * (d // full["heads"])
    cells, b = channels * full["patch"] ** 2, full["bottleneck"]
    ends = (cells * b if b else 0) + (b or cells) * d + d + (t + 1) * 2 * d + (d + 1) * cells
    embed = 64 * t + t + t * t + t + (full["classes"] + 1) * t * bool(full["classes"])
    with torch.device("meta"):
        network = build("dit", channels=channels, **settings)
    assert sum(p.numel() for p in network.parameters()) == full["depth"] * block + ends + embed


def test_image_conditions_and_weights_of_a_network_without_one():
    for more in ({}, {"bottleneck": 5}):
        plain, image = (randomized(DiT(2, **TRANSFORMER, **more, image=size)) for size in (0, 1))
        own = image.state_dict()
        given = adapt_weights(image, plain.state_dict(), None)
        missing = {name: torch.zeros_like(own[name]) for name in own if name not in given}
        image.load_state_dict(given | missing)
        x, cond = noise(2, 2, 4, 6), Condition(image=noise(2, 1, 2, 3))
        torch.testing.assert_close(image(x, ONE, cond), plain(x, ONE))
        randomized(image)
        other = image(x, ONE, replace(cond, image=cond.image + 1))
        assert (other - image(x, ONE, cond)).abs().max() > 1e-3
        assert adapt_weights(image, {}, None) == {}


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"dims": 4}, "network.dims: 4 dimensions. Give 1, 2 or 3"),
        ({"heads": 5}, "network.heads: 5 does not divide the width 12. Give a divisor"),
        ({"width": 4, "dims": 3}, "network.width: 4 numbers cannot hold the position along 3 axes. Give at least 6"),
        ({"patch": 0}, "network.patch: 0 is not a whole number of at least 1"),
        ({"depth": 1001}, "network.depth: 1,001 layers are more than 1,000"),
        ({"widths": [8]}, "widths: a network of kind 'dit' has no such setting"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, cause):
    with pytest.raises(ConfigError, match=cause):
        build("dit", channels=2, **{**TRANSFORMER, **settings})
