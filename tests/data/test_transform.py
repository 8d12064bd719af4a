"""Data transforms: round trips, intervals of values, log-determinants, and their JSON form."""

import json
import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from undiffuse.data.transform import (
    TRANSFORMS,
    Identity,
    IntegerLevels,
    MinMax,
    Standardized,
    from_dict,
    to_dict,
    transform_for,
)
from undiffuse.errors import ConfigError

NUM_VALUES = [2, 17, 256, 65536]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_values", NUM_VALUES)
def test_every_value_survives_the_round_trip(num_values, dtype):
    values = torch.arange(num_values, dtype=torch.int32)
    x = IntegerLevels(num_values).to_model(values, dtype)
    assert x.dtype == dtype
    assert (x[0], x[-1]) == (-1, 1)
    assert torch.equal(IntegerLevels(num_values).to_data(x).int(), values)
    assert torch.equal(x, -x.flip(0))  # rounded once, hence symmetric
    k = num_values // 3
    exact = Fraction(2 * k, num_values - 1) - 1
    assert abs(Fraction(x[k].item()) - exact) <= abs(exact) * Fraction(torch.finfo(dtype).eps) / 2


@pytest.mark.parametrize("num_values", NUM_VALUES)
def test_intervals_tile_the_line_exactly(num_values):
    values = torch.arange(num_values)
    low, high = IntegerLevels(num_values).edges(values)
    assert low.dtype == high.dtype == torch.float64
    assert (low[0], high[-1]) == (-math.inf, math.inf)
    assert torch.equal(high[:-1], low[1:])
    x = IntegerLevels(num_values).to_model(values, torch.float64)
    torch.testing.assert_close(
        high[:-1] - x[:-1], torch.full((num_values - 1,), 1 / (num_values - 1), dtype=torch.float64)
    )
    inside = torch.stack([(x[:-1] + high[:-1]) / 2, (x[1:] + low[1:]) / 2])
    assert torch.equal(IntegerLevels(num_values).to_data(inside).long(), torch.stack([values[:-1], values[1:]]))


def test_edges_accept_values_or_x():
    values = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    transform = IntegerLevels(256)
    for of_values, of_x in zip(transform.edges(values), transform.edges(transform.to_model(values)), strict=True):
        assert of_values.shape == values.shape
        assert torch.equal(of_values, of_x)


def test_integer_levels_round_and_clamp():
    x = torch.tensor([-9.0, -1.0, 0.49 / 7.5 - 1, 0.51 / 7.5 - 1, 1.0, 9.0, math.inf, math.nan])
    assert IntegerLevels(16).to_data(x).tolist() == [0, 0, 0, 1, 15, 15, 15, 0]
    assert IntegerLevels(256).to_data(x).dtype == torch.uint8
    assert IntegerLevels(257).to_data(x).dtype == torch.int32
    assert IntegerLevels(256).to_data(torch.tensor([1.0], dtype=torch.bfloat16)).item() == 255


def test_integer_levels_refuse_floats():
    with pytest.raises(TypeError, match="integers"):
        IntegerLevels(256).to_model(torch.zeros(1))


@pytest.mark.parametrize("num_values", [1, 0, -3, 65537, 256.0, True, None])
def test_invalid_num_values(num_values):
    with pytest.raises(ConfigError, match=r"^error\[NUM_VALUES\] transform.num_values"):
        IntegerLevels(num_values)


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 3, 4)])
def test_log_abs_det_is_that_of_the_jacobian(shape):
    transform = Standardized((0.5, -3.0), (0.25, 3.0))
    flat = torch.randn(math.prod(shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(
        lambda v: transform.to_model(v.view(1, *shape), torch.float64).flatten(), flat
    )
    assert transform.log_abs_det(shape) == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-12)
    value = flat.view(1, *shape)
    torch.testing.assert_close(transform.to_data(transform.to_model(value, torch.float64)), value)
    assert transform.edges(value) is None


def test_identity_and_integer_levels_keep_volumes():
    assert Identity().log_abs_det((3, 4)) == IntegerLevels(256).log_abs_det((3, 4)) == 0
    x = torch.randn(2, 2)
    assert torch.equal(Identity().to_data(Identity().to_model(x)), x)
    assert Identity().edges(x) is None


def test_standardized_checks_the_number_of_channels():
    with pytest.raises(ValueError, match="2 channels"):
        Standardized((0, 0), (1, 1)).to_model(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="2 channels"):
        Standardized((0, 0), (1, 1)).log_abs_det((3,))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0,), (0,)),
        ((0,), (1, 1)),
        ((), ()),
        ((math.nan,), (1,)),
        ((0,), (math.inf,)),
        ((10**400,), (1,)),
        ((0,), (10**400,)),
        ("0", "1"),
        ((True,), (1,)),
    ],
)
def test_invalid_moments(mean, std):
    with pytest.raises(ConfigError, match=r"^error\[TRANSFORM\]"):
        Standardized(mean, std)


@pytest.mark.parametrize(
    "transform", [IntegerLevels(17), Standardized((0.5, 1 / 3), (2.0, 0.1)), MinMax(-1.5, 4.0), Identity()]
)
def test_json_round_trip(transform):
    assert from_dict(json.loads(json.dumps(to_dict(transform)))) == transform
    assert type(transform) in TRANSFORMS.values()


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"kind": "jpeg"},
        {"kind": []},
        {"kind": "integer"},
        {"kind": "integer", "num_values": 2, "bits": 1},
        {"kind": "identity", "num_values": 2},
    ],
)
def test_invalid_descriptions(description):
    with pytest.raises(ConfigError, match=r"^error\[TRANSFORM\]"):
        from_dict(description)


def test_transform_for():
    assert transform_for(SimpleNamespace(num_values=17)) == IntegerLevels(17)
    with_range = SimpleNamespace(num_values=None, value_range=(0.0, 5.0))
    assert transform_for(with_range, ((1.0,), (2.0,))) == MinMax(0.0, 5.0)
    without_range = SimpleNamespace(num_values=None, value_range=None)
    assert transform_for(without_range, ((1.0,), (2.0,))) == Standardized((1.0,), (2.0,))
    with pytest.raises(TypeError, match="moments"):
        transform_for(without_range)


def test_min_max_maps_to_minus_one_and_one():
    transform, values = MinMax(-3.0, 7.0), torch.tensor([[-3.0, 7.0, 2.0, 4.5]])
    assert transform.to_model(values).tolist() == [[-1.0, 1.0, 0.0, 0.5]]
    assert transform.to_model(values.double(), torch.float64).dtype == torch.float64
    assert torch.equal(transform.to_data(transform.to_model(values)), values)
    assert transform.to_data(torch.tensor([-1.5, 1.5], dtype=torch.bfloat16)).tolist() == [-3.0, 7.0]
    assert transform.edges(values) is None
    x = values.double().requires_grad_()
    (slope,) = torch.autograd.grad(transform.to_model(x, torch.float64).sum(), x)
    assert transform.log_abs_det((4,)) == pytest.approx(float(slope.log().sum()), abs=1e-12)
    assert transform.log_abs_det((2, 3)) == pytest.approx(6 * math.log(0.2))


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (0, 10**400), (math.nan, 1.0), ("0", 1.0)])
def test_invalid_ranges(ends):
    with pytest.raises(ConfigError, match=r"^error\[TRANSFORM\] transform.low, transform.high"):
        MinMax(*ends)
