import json
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from undiffuse.codec import CODECS, Identity, Pixels, Ranged, Standardised, codec_for, from_dict, to_dict
from undiffuse.errors import ConfigError

LEVELS = [2, 17, 256, 65536]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", LEVELS)
def test_every_level_survives_the_round_trip(levels, dtype):
    values = torch.arange(levels, dtype=torch.int32)
    x = Pixels(levels).encode(values, dtype)
    assert x.dtype == dtype
    assert (x[0], x[-1]) == (-1, 1)
    assert torch.equal(Pixels(levels).decode(x).int(), values)
    assert torch.equal(x, -x.flip(0))  # rounded once, so exactly symmetric
    k = levels // 3
    exact = Fraction(2 * k, levels - 1) - 1
    assert abs(Fraction(x[k].item()) - exact) <= abs(exact) * Fraction(torch.finfo(dtype).eps) / 2


@pytest.mark.parametrize("levels", LEVELS)
def test_bins_tile_the_line_exactly(levels):
    values = torch.arange(levels)
    low, high = Pixels(levels).edges(values)
    assert low.dtype == high.dtype == torch.float64
    assert (low[0], high[-1]) == (-math.inf, math.inf)
    assert torch.equal(high[:-1], low[1:])
    x = Pixels(levels).encode(values, torch.float64)
    torch.testing.assert_close(high[:-1] - x[:-1], torch.full((levels - 1,), 1 / (levels - 1), dtype=torch.float64))
    inside = torch.stack([(x[:-1] + high[:-1]) / 2, (x[1:] + low[1:]) / 2])
    assert torch.equal(Pixels(levels).decode(inside).long(), torch.stack([values[:-1], values[1:]]))


def test_edges_take_values_or_x():
    values = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    codec = Pixels(256)
    for mine, theirs in zip(codec.edges(values), codec.edges(codec.encode(values)), strict=True):
        assert mine.shape == values.shape
        assert torch.equal(mine, theirs)


def test_pixels_decode_rounds_and_keeps_within_the_levels():
    x = torch.tensor([-9.0, -1.0, 0.49 / 7.5 - 1, 0.51 / 7.5 - 1, 1.0, 9.0, math.inf, math.nan])
    assert Pixels(16).decode(x).tolist() == [0, 0, 0, 1, 15, 15, 15, 0]
    assert Pixels(256).decode(x).dtype == torch.uint8
    assert Pixels(257).decode(x).dtype == torch.int32
    assert Pixels(256).decode(torch.tensor([1.0], dtype=torch.bfloat16)).item() == 255


def test_pixels_refuse_floats():
    with pytest.raises(TypeError, match="integers"):
        Pixels(256).encode(torch.zeros(1))


@pytest.mark.parametrize("levels", [1, 0, -3, 65537, 256.0, True, None])
def test_levels_that_are_none(levels):
    with pytest.raises(ConfigError, match=r"^error\[LEVELS\]"):
        Pixels(levels)


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 3, 4)])
def test_log_abs_det_is_that_of_the_jacobian(shape):
    codec = Standardised((0.5, -3.0), (0.25, 3.0))
    flat = torch.randn(math.prod(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(
        lambda v: codec.encode(v.view(1, *shape), torch.float64).flatten(), flat
    )
    assert codec.log_abs_det(shape) == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-12)
    value = flat.view(1, *shape)
    torch.testing.assert_close(codec.decode(codec.encode(value, torch.float64)), value)
    assert codec.edges(value) is None


def test_identity_and_pixels_have_no_volume():
    assert Identity().log_abs_det((3, 4)) == Pixels(256).log_abs_det((3, 4)) == 0
    x = torch.randn(2, 2)
    assert torch.equal(Identity().decode(Identity().encode(x)), x)
    assert Identity().edges(x) is None


def test_standardised_knows_its_channels():
    with pytest.raises(ValueError, match="2 channels"):
        Standardised((0, 0), (1, 1)).encode(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="2 channels"):
        Standardised((0, 0), (1, 1)).log_abs_det((3,))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0,), (0,)),
        ((0,), (1, 1)),
        ((), ()),
        ((math.nan,), (1,)),
        ((0,), (math.inf,)),
        ("0", "1"),
        ((True,), (1,)),
    ],
)
def test_moments_that_cannot_work(mean, std):
    with pytest.raises(ConfigError, match=r"^error\[CODEC\]"):
        Standardised(mean, std)


@pytest.mark.parametrize("codec", [Pixels(17), Standardised((0.5, 1 / 3), (2.0, 0.1)), Ranged(-1.5, 4.0), Identity()])
def test_json_round_trip(codec):
    assert from_dict(json.loads(json.dumps(to_dict(codec)))) == codec
    assert type(codec) in CODECS.values()


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"kind": "jpeg"},
        {"kind": []},
        {"kind": "pixels"},
        {"kind": "pixels", "levels": 2, "bits": 1},
        {"kind": "identity", "levels": 2},
    ],
)
def test_plain_data_are_read_strictly(plain):
    with pytest.raises(ConfigError, match=r"^error\[CODEC\]"):
        from_dict(plain)


def test_codec_for():
    assert codec_for(SimpleNamespace(levels=17)) == Pixels(17)
    ranged = SimpleNamespace(levels=None, value_range=(0.0, 5.0))
    assert codec_for(ranged, ((1.0,), (2.0,))) == Ranged(0.0, 5.0)
    free = SimpleNamespace(levels=None, value_range=None)
    assert codec_for(free, ((1.0,), (2.0,))) == Standardised((1.0,), (2.0,))
    with pytest.raises(TypeError, match="moments"):
        codec_for(free)


def test_a_range_goes_to_plus_and_minus_one():
    codec, values = Ranged(-3.0, 7.0), torch.tensor([[-3.0, 7.0, 2.0, 4.5]])
    assert codec.encode(values).tolist() == [[-1.0, 1.0, 0.0, 0.5]]
    assert codec.encode(values.double(), torch.float64).dtype == torch.float64
    assert torch.equal(codec.decode(codec.encode(values)), values)
    assert codec.decode(torch.tensor([-1.5, 1.5], dtype=torch.bfloat16)).tolist() == [-3.0, 7.0]
    assert codec.edges(values) is None
    x = values.double().requires_grad_()
    (slope,) = torch.autograd.grad(codec.encode(x, torch.float64).sum(), x)
    assert codec.log_abs_det((4,)) == pytest.approx(float(slope.log().sum()), abs=1e-12)
    assert codec.log_abs_det((2, 3)) == pytest.approx(6 * math.log(0.2))


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0), ("0", 1.0)])
def test_ranges_that_are_none(ends):
    with pytest.raises(ConfigError, match=r"^error\[CODEC\] codec.low, codec.high"):
        Ranged(*ends)
