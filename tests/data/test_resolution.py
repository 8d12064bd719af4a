"""The two maps of cascades: exact inverses, ranges, shapes, and what they refuse."""

import itertools
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from undiffuse.data.lazy_array import LazyArray
from undiffuse.data.resolution import MAPS, ResolutionSplit, split_from_dict
from undiffuse.errors import ConfigError


def test_the_inverse_is_exact_on_all_pairs_of_256_levels():
    a, b = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    x = np.stack([a.ravel(), b.ravel()], 1)[:, None].astype(np.uint8)  # (65536, 1, 2)
    split = ResolutionSplit("haar", 2, (1, 2), 256)
    low, rest = split.low(x), split.rest(x)
    assert np.array_equal(low[:, 0, 0], (a.ravel() + b.ravel()) // 2)
    assert np.array_equal(rest[:, 0, 0], a.ravel() - b.ravel() + 255)
    assert np.array_equal(split.join(low, rest), x)
    assert len(np.unique(np.stack([low, rest]).reshape(2, -1), axis=1).T) == 65536


def test_haar_of_a_block_by_hand():
    split = ResolutionSplit("haar", 2, (1, 2, 2), 10)
    x = np.array([[[[7, 2], [0, 9]]]], np.uint8)  # means 4 and 4, differences 5 and -9, then 4 and 0
    assert split.low(x).ravel().tolist() == [4]
    assert (split.rest(x).ravel().astype(int) - 9).tolist() == [5, -9, 0]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_maps_of_any_shape(data):
    dims, factor = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([2, 2, 3]))
    size = data.draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    shape = (data.draw(st.integers(1, 3)), *(factor * n for n in size))
    levels = data.draw(st.sampled_from([2, 3, 17, 256, 257, 32768]))
    dtype = np.uint8 if levels <= 256 else np.uint16
    x = data.draw(hnp.arrays(dtype, (2, *shape), elements=st.integers(0, levels - 1)))
    for name in MAPS if factor == 2 else ["mean"]:
        split = ResolutionSplit(name, factor, shape, levels)
        low, rest = split.low(x), split.rest(x)
        assert low.shape[1:] == split.low_shape
        assert rest.shape[1:] == split.rest_shape
        assert low.max() < levels
        assert rest.max() < split.rest_num_values
        assert rest.dtype == (np.uint8 if split.rest_num_values <= 256 else np.uint16)
        assert np.array_equal(split.join(low, rest), x)
        lazy = LazyArray(x.shape, x.dtype, lambda i, x=x: x[i])
        assert np.array_equal(np.asarray(split.low(lazy)), low)  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(split.rest(lazy)), rest)  # type: ignore[arg-type]
        assert split_from_dict(split.to_dict()) == split
    cell = x[0, 0][tuple(slice(0, factor) for _ in range(dims))]
    mean = Fraction(int(cell.astype(int).sum()), cell.size)
    assert ResolutionSplit("mean", factor, shape, levels).low(x)[0, 0].ravel()[0] == floor(mean + Fraction(1, 2))


def test_the_most_values_of_haar():
    assert ResolutionSplit("haar", 2, (1, 2, 2), 1 << 15).rest_num_values == (1 << 16) - 1
    with pytest.raises(ConfigError, match="its differences have 65,537 values, more than 65,536"):
        ResolutionSplit("haar", 2, (1, 2, 2), (1 << 15) + 1)


def test_mean_of_haar_is_within_one_of_the_rounded_mean():
    x = np.array(list(itertools.product(range(4), repeat=4)), np.uint8).reshape(-1, 1, 2, 2)
    mean, haar = (ResolutionSplit(name, 2, (1, 2, 2), 4).low(x).astype(int) for name in ("mean", "haar"))
    assert set((mean - haar).ravel().tolist()) == {0, 1}


def test_pairs_of_no_image_are_clamped():
    split = ResolutionSplit("haar", 2, (1, 2, 2), 3)
    low, rest = np.zeros((1, 1, 1, 1), np.uint8), np.full((1, 3, 1, 1), 4, np.uint8)
    joined = split.join(low, rest)
    assert joined.shape == (1, 1, 2, 2)
    assert joined.max() <= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mean", 2, (1, 5, 4), 3), "a side of 5 is not a multiple of 2"),
        (("haar", 2, (1, 4, 7), 3), "a side of 7 is not a multiple of 2"),
        (("haar", 4, (1, 4, 4), 3), "divides each side by 2, not by 4"),
        (("haar", 2, (1, 4, 4), 65536), "131,071 values"),
        (("cubic", 2, (1, 4, 4), 3), "there is no such map. Use mean or haar"),
        (("mean", 1, (1, 4, 4), 3), "not a split"),
        (("mean", 2, (4,), 3), "not a split"),
        (("mean", 2, "1,4", 3), "not a split"),
        (("mean", 2.0, (1, 4, 4), 3), "not a split"),
    ],
)
def test_what_cannot_be_split_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ResolutionSplit(*arguments)


@pytest.mark.parametrize(
    "plain", [None, [], {"map": "mean"}, {"map": {}, "factor": 2, "item_shape": [1], "num_values": 2}]
)
def test_damaged_facts_are_refused(plain):
    with pytest.raises(ConfigError):
        split_from_dict(plain)
