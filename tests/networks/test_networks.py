"""Networks: any shape in, the same out; what they are told matters; nothing leaks between items."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from undiffuse.conditioning import Condition
from undiffuse.errors import ConfigError
from undiffuse.networks import MLP, NETWORKS, UNet, build
from undiffuse.networks.attention import Attention, CrossAttention, attend
from undiffuse.networks.embedding import sinusoids
from undiffuse.networks.norm import GroupNorm, LayerNorm, groups_of, in_fast_layout
from undiffuse.networks.presets import PRESETS
from undiffuse.networks.unet import fold, unfold

SMALL = {"widths": (8, 16), "blocks": 1, "attention": (1,), "heads": 2, "patch": 2}


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """With no zero weights left, so that every path can be seen; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (1.5 / math.sqrt(p[0].numel())))
    return network.eval()


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SIZES = [(1,), (7,), (16,), (1, 1), (3, 5), (8, 8), (9, 4), (1, 1, 1), (3, 2, 5), (4, 4, 4)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"learned_resampling": False, "scale_shift": True, "fourier": (1,)}], ids=["ho", "other"]
)
def test_any_size_in_any_dimension(size, options):
    network = randomised(UNet(2, 3, dims=len(size), **{**SMALL, **options}))
    y = network(noise(2, 2, *size), torch.tensor([0.1, 0.9]))
    assert y.shape == (2, 3, *size)
    assert y.isfinite().all()


def test_one_item_of_one_cell_at_one_level():
    assert UNet(1, widths=(32,), attention=())(noise(1, 1, 1, 1), torch.tensor(0.5)).shape == (1, 1, 1, 1)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_ho_has_35746307_parameters():
    kind, settings = PRESETS["ddpm-cifar10"]
    with torch.device("meta"):
        assert parameters(build(kind, channels=3, **settings)) == 35_746_307


@pytest.mark.parametrize(("name", "low", "high"), [("digits", 1e5, 2e6), ("cpu-small", 1e6, 3e6), ("gpu", 3e7, 6e7)])
def test_presets_keep_their_size(name, low, high):
    kind, settings = PRESETS[name]
    with torch.device("meta"):
        assert low < parameters(build(kind, channels=3, **settings)) < high


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("digits", (1, 8, 8)),
        ("cpu-small", (1, 28, 28)),
        ("vector", (5,)),
        ("series", (2, 50)),
        ("volume", (1, 8, 8, 8)),
    ],
)
def test_presets_run(name, shape):
    kind, settings = PRESETS[name]
    x = noise(2, *shape)
    assert build(kind, channels=shape[0], **settings)(x, torch.tensor([0.0, 1.0])).shape == x.shape


HEARS = {"classes": 3, "vector": 4, "tokens": 5}
CASES = {
    "unet": lambda **more: UNet(2, classes=3, **{**SMALL, **more}),
    "shifted": lambda **more: UNet(2, classes=3, scale_shift=True, learned_resampling=False, **{**SMALL, **more}),
    "layered": lambda **more: UNet(2, classes=3, norm="layer", **{**SMALL, **more}),
    "mlp": lambda **more: MLP(2, width=16, depth=2, classes=3, **more),
    "hearing": lambda **more: UNet(2, **{**SMALL, **HEARS, **more}),
    "hearing-mlp": lambda **more: MLP(2, width=16, depth=2, **{**HEARS, **more}),
}
hearing = pytest.mark.parametrize("case", ["hearing", "hearing-mlp"])
cases = pytest.mark.parametrize("case", CASES)


def data(case: str, n: int = 4) -> torch.Tensor:
    return noise(n, 2) if "mlp" in case else noise(n, 2, 5, 6)


def told() -> Condition:
    """Of four items: a label and a vector, of which one is null, and sequences of 0 to 3 tokens."""
    vector = noise(4, 4, seed=2)
    vector[1, 2] = math.nan
    mask = torch.arange(3) < torch.arange(4)[:, None]
    return Condition(label=torch.tensor([-1, 0, 1, 2]), vector=vector, tokens=noise(4, 3, 5, seed=3), mask=mask)


@cases
def test_zero_at_initialisation(case):
    assert (CASES[case]()(data(case), torch.rand(4)) == 0).all()


@cases
def test_time_matters_on_every_scale(case):
    network, x = randomised(CASES[case]()), data(case, 1)
    for one, other in [(3999.0, 4000.0), (0.0, 1.0), (-20.0, -19.5), (12.0, 12.1), (-1.2, -1.1)]:
        a, b = network(x, torch.tensor(one)), network(x, torch.tensor(other))
        assert (a - b).abs().max() > 1e-4 * a.abs().max()


@cases
def test_one_time_for_all_is_that_time_for_each(case):
    network, x = randomised(CASES[case]()), data(case)
    torch.testing.assert_close(network(x, torch.tensor(7.0)), network(x, torch.full((4,), 7.0)))


@cases
def test_labels_matter_and_the_null_label_is_no_label(case):
    network, x, time = randomised(CASES[case]()), data(case), torch.tensor(1.0)
    outputs = [network(x, time, Condition(label=torch.full((4,), label))) for label in (-1, 0, 1, 2)]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().max() > 1e-3
    torch.testing.assert_close(network(x, time), outputs[0])
    torch.testing.assert_close(network(x, time, Condition()), outputs[0])


@hearing
def test_vectors_and_tokens_matter(case):
    network, x, time = randomised(CASES[case]()), data(case), torch.tensor(1.0)
    before = network(x, time, told())
    for name in ("vector", "tokens"):
        changed = network(x, time, replace(told(), **{name: getattr(told(), name).flip(-1)}))
        apart = (changed - before).flatten(1).abs().amax(1)
        silent = 1 if name == "vector" else 0  # the item whose vector is not told, or whose tokens are all masked
        assert apart[silent] == 0, name
        assert apart[torch.arange(4) != silent].min() > 1e-3, name


@hearing
def test_a_masked_token_has_no_effect_whatever_it_is(case):
    network, x, time = randomised(CASES[case]()), data(case), torch.tensor(1.0)
    cond, before = told(), network(x, time, told())
    for garbage in (7.0, 1e30, math.nan, math.inf):
        cond.tokens[~cond.mask] = garbage
        assert torch.equal(network(x, time, cond), before)
    masked = torch.zeros(4, 2, dtype=torch.bool)
    longer = replace(
        told(), tokens=torch.cat([told().tokens, noise(4, 2, 5)], 1), mask=torch.cat([cond.mask, masked], 1)
    )
    torch.testing.assert_close(network(x, time, longer), before, rtol=1e-5, atol=1e-5)
    cond.mask[3, 0] = False  # power: one that counts
    assert (network(x, time, cond) - before)[3].abs().max() > 1e-3


@hearing
def test_tokens_are_heard_alike_on_any_scale(case):
    network, x, time = randomised(CASES[case]()), data(case), torch.tensor(1.0)
    loud = replace(told(), tokens=1000 * told().tokens + 7)
    torch.testing.assert_close(network(x, time, loud), network(x, time, told()), rtol=1e-2, atol=1e-2)


@hearing
def test_nothing_told_is_the_null_condition_of_each_kind(case):
    network, x, time = randomised(CASES[case]()), data(case), torch.tensor(1.0)
    null = network(x, time, told().null())
    for cond in (None, Condition(), Condition(label=torch.full((4,), -1)), Condition(tokens=torch.zeros(4, 0, 5))):
        torch.testing.assert_close(network(x, time, cond), null, rtol=1e-5, atol=1e-5)
    zeros = Condition(label=torch.full((4,), -1), vector=torch.zeros(4, 4), tokens=torch.zeros(4, 1, 5))
    assert (network(x, time, zeros) - null).flatten(1).abs().amax(1).min() > 1e-3  # zeros are numbers like others


@hearing
def test_attention_to_tokens_begins_as_none(case, monkeypatch):
    """As built its branches end in zeros: the network is the one that does not attend to tokens."""
    network, x, time = CASES[case](), data(case), torch.rand(4)
    nn.init.ones_(network.leave.weight)
    before = network(x, time, told())
    monkeypatch.setattr(CrossAttention, "forward", lambda layer, h, *tokens: h)
    assert torch.equal(network(x, time, told()), before)
    assert before.abs().max() > 0.1


@hearing
def test_vectors_are_standardised_by_the_moments_of_the_data(case):
    network, x, time = randomised(CASES[case]()), data(case), torch.tensor(1.0)
    before, mean, std = (
        network(x, time, told()),
        torch.tensor([1e3, -2.0, 0.0, 5.0]),
        torch.tensor([10.0, 0.1, 1.0, 2.0]),
    )
    network.embed.vector.start_from(mean, std)
    moved = replace(told(), vector=mean + std * told().vector)
    torch.testing.assert_close(network(x, time, moved), before, rtol=1e-3, atol=1e-3)
    assert {"embed.vector.mean", "embed.vector.std"} <= set(network.state_dict())


def test_attention_to_tokens_is_the_softmax_formula():
    layer = randomised(CrossAttention(16, 5, heads=2).double())
    h, tokens = noise(3, 16, 2, 5, dtype=torch.float64), noise(3, 4, 5, seed=2, dtype=torch.float64)
    q = layer.q(layer.norm(h).flatten(2).mT).unflatten(-1, (2, 8)).transpose(1, 2)
    k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer.kv(tokens).chunk(2, -1))
    mask = torch.tensor([[True, False, True, True], [True, True, False, False], [True] * 4])
    for item in range(3):
        kept = mask[item]
        mixed = softmax_attention(q[item], k[item][:, kept], v[item][:, kept]).transpose(0, 1).flatten(1)
        expected = h[item] + layer.proj(mixed).mT.reshape(h[item].shape)
        torch.testing.assert_close(layer(h, tokens, mask[:, None, None])[item], expected)


def test_without_classes_a_condition_is_not_looked_at():
    network, x = randomised(UNet(2, **SMALL)), noise(2, 2, 4, 4)
    assert torch.equal(
        network(x, torch.tensor(1.0), Condition(label=torch.tensor([0, 9]))), network(x, torch.tensor(1.0))
    )


@cases
def test_gradients_reach_every_parameter(case):
    network, x = randomised(CASES[case]()), data(case)
    network(x, torch.rand(4), told()).square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name


@cases
def test_items_do_not_see_each_other(case):
    network, x, time = randomised(CASES[case]()), data(case), torch.tensor([0.0, 1.0, 10.0, 999.0])
    together = network(x, time, told())
    apart = [network(x[i : i + 1], time[i : i + 1], told().take(slice(i, i + 1))) for i in range(4)]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-5, atol=1e-5)


@cases
def test_dropout_is_for_training_only(case):
    network, x, time = randomised(CASES[case](dropout=0.5)), data(case), torch.tensor(1.0)
    assert torch.equal(network(x, time), network(x, time))
    network.train()
    assert not torch.equal(network(x, time), network(x, time))


def test_odd_sizes_are_replicated_within_and_cropped():
    network, x = randomised(UNet(2, **SMALL)), noise(2, 2, 5, 6)
    padded = torch.cat([x, x[..., -1:], x[..., -1:]], 3)
    padded = torch.cat([padded, *[padded[:, :, -1:]] * 3], 2)
    torch.testing.assert_close(network(x, torch.tensor(1.0)), network(padded, torch.tensor(1.0))[..., :5, :6])


@cases
def test_float64_throughout(case):
    network = randomised(CASES[case]().double())
    assert network(data(case).double(), torch.rand(4, dtype=torch.float64), told()).dtype == torch.float64


@cases
def test_bfloat16_autocast_tells_999_from_1000_and_returns_float32(case):
    network, x, times = randomised(CASES[case]()), data(case), torch.tensor([999.0, 1000.0])
    exact = network.embed(times, None)
    with torch.autocast("cpu", torch.bfloat16):
        told = network.embed(times, None)
        a, b = (network(x, time) for time in times)
    assert a.dtype == torch.float32
    assert (a - b).abs().max() > 0.02
    assert torch.equal(told, exact)


def test_sinusoids_are_hos_also_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        got = sinusoids(torch.tensor([0.0, 999.0]), 8)
    angle = torch.tensor([0.0, 999.0]).double()[:, None] * 10_000.0 ** (-torch.arange(4).double() / 3)
    torch.testing.assert_close(got.double(), torch.cat([angle.sin(), angle.cos()], 1), rtol=0, atol=1e-4)


def softmax_attention(q, k, v):
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def test_attention_is_the_softmax_formula():
    layer = randomised(Attention(16, heads=2).double())
    h = noise(3, 16, 2, 5, dtype=torch.float64)
    tokens = layer.norm(h).flatten(2).mT
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer.qkv(tokens).chunk(3, -1))
    mixed = layer.proj(softmax_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(h), h + mixed.mT.reshape(h.shape))


def test_attention_in_bfloat16_is_computed_in_float32():
    q, k, v = noise(3, 2, 2, 9, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(q, k, v)
    assert torch.equal(got, softmax_attention(q.float(), k.float(), v.float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_sums_in_float32(dtype):
    layer = GroupNorm(32)
    h = (noise(2, 32, 16, 16) + 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(h)
    grouped = h.double().unflatten(1, (8, 4))
    var, mean = torch.var_mean(grouped, (2, 3, 4), correction=0, keepdim=True)
    exact = ((grouped - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_is_over_the_channels_of_each_position(dtype):
    layer = LayerNorm(32)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    h = (3 * noise(2, 32, 4, 6) + 3).to(dtype).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(h)
    var, mean = torch.var_mean(h.double(), 1, correction=0, keepdim=True)
    weight, bias = layer.weight.double()[:, None, None], layer.bias.double()[:, None, None]
    exact = (h.double() - mean) / (var + 1e-6).sqrt() * weight + bias
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.06)


@pytest.mark.parametrize(("norm", "fast"), [("group", False), ("layer", True)])
def test_channels_come_last_on_a_processor_where_the_norm_likes_it(norm, fast):
    network = in_fast_layout(UNet(2, norm=norm, **SMALL))
    assert network.enter.weight.is_contiguous(memory_format=torch.channels_last) == fast
    vectors = MLP(2, width=16, depth=2)
    assert in_fast_layout(vectors) is vectors


@pytest.mark.parametrize(
    ("width", "groups"), [(128, 32), (256, 32), (192, 32), (64, 16), (8, 2), (3, 1), (7, 1), (50, 10), (1, 1)]
)
def test_groups_are_the_largest_divisor_that_leaves_four_channels(width, groups):
    assert groups_of(width) == groups


@pytest.mark.parametrize("size", [(6,), (4, 6), (2, 4, 6)], ids=str)
def test_space_to_depth_and_back(size):
    x = noise(2, 3, *size)
    folded = fold(x, 2)
    assert folded.shape == (2, 3 * 2 ** len(size), *(n // 2 for n in size))
    assert torch.equal(unfold(folded, 2), x)
    if len(size) == 2:
        assert torch.equal(folded, torch.nn.functional.pixel_unshuffle(x, 2))


def test_derivatives_that_the_fused_attention_lacks_are_had_with_the_plain_one():
    """Forward mode, and all rows of the Jacobian at once, as exact divergences and distillation need them."""
    network, x = randomised(UNet(1, **SMALL)), noise(1, 1, 2, 2)
    rows = torch.eye(4).view(4, 1, 1, 2, 2)

    def function(x):
        return network(x, torch.tensor(1.0))

    jacobian = torch.autograd.functional.jacobian(function, x).view(4, 4)
    with sdpa_kernel(SDPBackend.MATH):
        (reverse,) = torch.func.vmap(torch.func.vjp(function, x)[1])(rows)
        forward = torch.stack([torch.func.jvp(function, (x,), (row,))[1] for row in rows])
    torch.testing.assert_close(reverse.view(4, 4), jacobian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forward.view(4, 4).T, jacobian, rtol=1e-4, atol=1e-4)


def test_lists_from_json_are_as_good_as_tuples():
    network = build("unet", channels=2, widths=[8, 16], attention=[1], heads=2)
    assert list(network.state_dict()) == list(
        build("unet", channels=2, widths=(8, 16), attention=(1,), heads=2).state_dict()
    )


WRONG = [
    ("transformer", {"channels": 1}, "kind"),
    ("unet", {"channels": 1, "widht": 3}, "widht"),
    ("unet", {}, "channels"),
    ("unet", {"channels": 0}, "channels"),
    ("unet", {"channels": True}, "channels"),
    ("unet", {"channels": 1, "out_channels": 0}, "out_channels"),
    ("unet", {"channels": 1, "dims": 4}, "dims"),
    ("unet", {"channels": 1, "widths": ()}, "widths"),
    ("unet", {"channels": 1, "widths": "64"}, "widths"),
    ("unet", {"channels": 1, "widths": 64}, "widths"),
    ("unet", {"channels": 1, "widths": (8, -8)}, "widths"),
    ("unet", {"channels": 1, "blocks": 0}, "blocks"),
    ("unet", {"channels": 1, "attention": (2,)}, "attention"),
    ("unet", {"channels": 1, "attention": (-1,)}, "attention"),
    ("unet", {"channels": 1, "heads": 5}, "heads"),
    ("unet", {"channels": 1, "heads": 0}, "heads"),
    ("unet", {"channels": 1, "patch": 1.5}, "patch"),
    ("unet", {"channels": 1, "dropout": 1.0}, "dropout"),
    ("unet", {"channels": 1, "classes": -1}, "classes"),
    ("unet", {"channels": 1, "time_width": 0}, "time_width"),
    ("unet", {"channels": 1, "fourier": (-1,)}, "fourier"),
    ("unet", {"channels": 1, "norm": "batch"}, "norm"),
    ("unet", {"channels": 1, "vector": -1}, "vector"),
    ("unet", {"channels": 1, "tokens": 0.5}, "tokens"),
    ("mlp", {"channels": 1, "vector": True}, "vector"),
    ("mlp", {"channels": 1, "tokens": -1}, "tokens"),
    ("mlp", {"channels": 1, "width": 0}, "width"),
    ("mlp", {"channels": 1, "dims": 2}, "dims"),
    ("mlp", {"channels": 1, "dropout": "much"}, "dropout"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "where"), WRONG, ids=[f"{k}-{w}-{i}" for i, (k, _, w) in enumerate(WRONG)]
)
def test_settings_that_cannot_work_are_refused_by_name(kind, settings, where):
    with pytest.raises(ConfigError) as caught:
        build(kind, **settings)
    assert caught.value.where == f"network.{where}"
    assert "\n" not in str(caught.value)


def test_every_kind_has_a_preset():
    assert {kind for kind, _ in PRESETS.values()} == set(NETWORKS) - {"tiny"}  # that one is tests/tiny_run.py's
