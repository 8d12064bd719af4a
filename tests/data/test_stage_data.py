"""Data of the stages of a cascade: parts, fingerprints, conditions, options, and what is refused."""

import numpy as np
import pytest
import torch

from undiffuse.data.from_array import from_array
from undiffuse.data.sources.registry import load
from undiffuse.data.stage_data import reduce_data, split_data
from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import ConfigError, DataError

VALUES = np.random.default_rng(0).integers(6, size=(60, 2, 4, 8))
DATA = from_array(VALUES, np.arange(60) % 3, num_values=6, name="d")


@pytest.mark.parametrize("name", ["mean", "haar"])
def test_an_item_is_in_the_same_part_of_every_stage(name):
    small, rest = reduce_data(DATA, 2, name), split_data(DATA, 2, name)
    for part in ("train", "validation", "test"):
        expected = getattr(DATA.split(0.2), part)
        for data in (small, rest, split_data(reduce_data(DATA, 2), 1), rest.with_notes("a note")):
            assert np.array_equal(getattr(data.split(0.2), part), expected)
    assert not np.array_equal(from_array(small.values, num_values=6).split(0.2).test, DATA.split(0.2).test)
    assert (small.item_shape, small.num_values, small.condition_sizes) == ((2, 2, 4), 6, {"classes": 3})
    expected = ((2, 4, 8), 6) if name == "mean" else ((6, 2, 4), 11)
    assert (rest.item_shape, rest.num_values) == expected
    assert rest.condition_sizes == {"classes": 3, "image": 2}


def test_the_condition_is_the_low_resolution_in_units_of_x():
    rest, chosen = split_data(DATA, 2, "haar"), np.array([5, 3])
    image = IntegerLevels(6).to_model(torch.from_numpy(reduce_data(DATA, 2, "haar").values[chosen]))
    cond = rest.condition(chosen)
    assert torch.equal(cond.image, image)
    assert torch.equal(cond.image_level, torch.full((2,), torch.inf))
    assert cond.label.tolist() == [2, 0]
    assert rest.given_condition(chosen, conditional=False).label is None
    assert torch.equal(rest.given_condition(chosen, conditional=False).image, image)
    assert reduce_data(DATA, 2).given_condition(chosen, conditional=False) is None
    full, num_values = rest.full_values(rest.values[chosen], chosen)
    assert num_values == 6
    assert np.array_equal(full, DATA.values[chosen])
    small = reduce_data(DATA, 2)
    assert small.full_values(small.values, chosen) == (small.values, 6)


def test_fingerprints_tell_stages_apart():
    made = [DATA]
    made += [function(DATA, 2, name) for function in (reduce_data, split_data) for name in ("mean", "haar")]
    made += [reduce_data(DATA, 1), reduce_data(from_array(VALUES, num_values=6, name="d"), 2)]
    assert len({data.fingerprint for data in made}) == len(made)
    assert split_data(DATA, 2).fingerprint == split_data(from_array(VALUES, DATA.labels, num_values=6), 2).fingerprint


def test_the_options_of_data_make_stages():
    digits = load("digits")
    small = load("digits", reduce_to=4, resolution_map="haar")
    assert small.report.options == {"reduce_to": 4, "resolution_map": "haar"}
    assert small.fingerprint == reduce_data(digits, 4, "haar").fingerprint
    assert load("digits", from_side=4).fingerprint == split_data(digits, 4).fingerprint
    middle = load("digits", reduce_to=4, from_side=2)
    assert (middle.item_shape, middle.low.shape) == ((1, 4, 4), (1797, 1, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_side": 3}, r"SIDE.*side 3: images of 8×8 .*Give one of 1, 2, 4"),
        ({"from_side": 8}, r"SIDE.*Give one of 1, 2, 4"),
        ({"reduce_to": 0}, r"SIDE"),
        ({"from_side": 2, "resolution_map": "haar"}, r"divides each side by 2, not by 4"),
        ({"from_side": 4, "resolution_map": "cubic"}, r"there is no such map. Use mean or haar"),
        ({"resolution_map": "haar"}, r"neither --reduce nor --from is given"),
    ],
)
def test_stages_that_there_are_not(options, message):
    with pytest.raises(ConfigError, match=message):
        load("digits", **options)


def test_only_integer_images_have_stages():
    for data in (load("two-moons"), from_array(np.random.default_rng(0).random((9, 1, 4, 4)), name="c")):
        with pytest.raises(DataError, match=r"CASCADE.*images with integer values"):
            split_data(data, 1)
    odd = from_array(np.zeros((9, 1, 4, 5), np.uint8), num_values=2)
    with pytest.raises(ConfigError, match="a side of 5 is not a multiple of 2"):
        reduce_data(odd, 2)
