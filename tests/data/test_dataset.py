"""`Dataset`: the split, the fingerprint, moments and counts."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from undiffuse.data.dataset import MAX_CHUNK_ITEMS, Dataset, with_observations
from undiffuse.data.from_array import from_array
from undiffuse.errors import ConfigError, DataError


def random_set(n=400, seed=0):
    return from_array(np.random.default_rng(seed).integers(0, 256, (n, 1, 3, 3), np.uint8))


def parts(data, **options):
    """{bytes of an item: name of its part}."""
    split = data.split(**options)
    named = {"train": split.train, "validation": split.validation, "test": split.test}
    assert sorted(np.concatenate(list(named.values()))) == list(range(len(data)))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in named.values())
    return {data.values[i].tobytes(): name for name, part in named.items() for i in part}


def test_split_depends_on_the_content_alone():
    data = random_set()
    before = parts(data)
    order = np.random.default_rng(1).permutation(len(data))
    assert parts(from_array(data.values[order])) == before
    assert parts(from_array(data.values, labels=np.arange(len(data)) % 3)) == before
    more = np.concatenate([random_set(300, seed=2).values, data.values])
    assert before.items() <= parts(from_array(more)).items()
    fractions = [list(before.values()).count(name) / len(before) for name in ("validation", "test")]
    assert fractions == pytest.approx([0.1, 0.1], abs=0.05)


def test_equal_items_share_a_part():
    data = random_set(200)
    repeated = from_array(np.tile(data.values, (3, 1, 1, 1)))
    split = repeated.split()
    contents = [{repeated.values[i].tobytes() for i in part} for part in (split.train, split.validation, split.test)]
    assert not contents[0] & contents[1]
    assert not contents[0] & contents[2]
    assert not contents[1] & contents[2]
    assert parts(repeated) == parts(data)
    assert with_observations(repeated).notes == ("400 of 600 items repeat another one exactly",)


def test_the_digest_determines_the_part():
    data = random_set()
    split = data.split(0.25)
    for part, low, high in [(split.test, 0, 0.25), (split.train, 0.25, 0.75), (split.validation, 0.75, 1)]:
        for i in part:
            digest = hashlib.blake2b(data.values[i].tobytes(), digest_size=8).digest()
            assert low <= int.from_bytes(digest, "little") / 2**64 < high


@pytest.mark.parametrize("held_out", [0.1, 0.49])
@pytest.mark.parametrize("seed", range(10))
def test_three_items_fill_three_parts(seed, held_out):
    split = random_set(3, seed).split(held_out)
    assert [len(split.train), len(split.validation), len(split.test)] == [1, 1, 1]


def test_too_few_to_split():
    same = from_array(np.zeros((5, 1, 2, 2), np.uint8))
    with pytest.raises(DataError, match=r"^error\[TOO_FEW_ITEMS\] array: 1 distinct items are too few for 3 parts"):
        same.split()
    assert len(same.split(held_out=0).train) == 5


@pytest.mark.parametrize("held_out", [-0.1, 0.5, 1, float("nan")])
def test_invalid_fractions(held_out):
    with pytest.raises(ConfigError, match=r"^error\[HELD_OUT\]"):
        random_set().split(held_out)


def test_the_official_test_part_is_kept():
    data = random_set()
    official = Dataset("official", data.values, 256, test_from=300)
    split = official.split()
    assert split.test.tolist() == list(range(300, 400))
    assert 0 < len(split.validation) < 70
    assert official.split(held_out=0).train.tolist() == list(range(300))
    only = Dataset("small", data.values[:3], 256, test_from=1)
    with pytest.raises(DataError, match="TOO_FEW_ITEMS"):
        only.split()


def test_held_out_fraction():
    values = random_set(4).values
    assert from_array(values[:3]).held_out_fraction(0.2) == (0.2, None)
    fraction, reason = from_array(values[[0, 0, 1]]).held_out_fraction(0.2)
    assert (fraction, reason) == (0.0, "2 distinct items only: nothing is held out, nothing is measured")
    assert Dataset("official", values[:3], 256, test_from=2).held_out_fraction(0.2) == (0.2, None)
    assert Dataset("official", values[:2], 256, test_from=1).held_out_fraction(0.2)[0] == 0


def test_fingerprints_differ_between_data_sets():
    a = np.arange(12, dtype=np.uint8).reshape(3, 4)
    sets = [from_array(a), from_array(a.reshape(2, 6)), from_array(a, num_values=17), from_array(a[::-1])]
    sets += [from_array(a, labels=[0, 1, 0]), from_array(a, labels=[0, 1, 1]), from_array(a.astype(np.uint16))]
    sets += [replace(sets[0], **parts) for parts in ({"test_from": 2}, {"validation_from": 2}, {"test_from": 1})]
    assert len({data.fingerprint for data in sets}) == len(sets)
    assert from_array(a.copy(order="F")).with_notes("a note").fingerprint == sets[0].fingerprint


def test_moments_of_some_items():
    values = np.random.default_rng(0).normal(1e4, 0.5, (2 * MAX_CHUNK_ITEMS + 7, 3, 2)).astype(np.float32)
    values[:, 1] = 0.1
    data = from_array(values, layout="NCL")
    indices = np.arange(5, len(data))
    mean, std = data.moments(indices)
    expected = values[indices].astype(np.float64)
    assert mean == pytest.approx(expected.mean((0, 2)), rel=1e-14)
    assert std == pytest.approx([expected.std((0, 2))[0], 1.0, expected.std((0, 2))[2]], rel=1e-10)
    assert mean[1] == np.float32(0.1)
    assert with_observations(data).notes == (
        "the same value everywhere in channel 1; a density has no upper bound there: leave it out to measure one",
    )


def test_counts_of_some_items():
    values = np.random.default_rng(0).integers(0, 17, (2 * MAX_CHUNK_ITEMS + 7, 2, 3)).astype(np.uint8)
    values[:, 1] //= 2
    data = from_array(values, layout="NCL", num_values=17)
    counts = data.counts(np.arange(5, len(data)))
    assert counts.shape == (2, 17)
    for channel in range(2):
        for value in range(17):
            assert counts[channel, value] == (values[5:, channel] == value).sum()


def test_a_single_item_is_noted():
    notes = with_observations(from_array(np.arange(4.0, dtype=np.float32)[None] + 0.5)).notes
    assert notes == ("there is only one item", "the same value everywhere in channel 0, 1, 2, 3")


def test_contradictory_fields_are_refused():
    with pytest.raises(ValueError, match="num_values=256 needs uint8 items, not int64"):
        Dataset("x", np.zeros((2, 2), np.int64), 256)
    for starts in ({"test_from": 0}, {"test_from": 3}, {"test_from": "1"}, {"test_from": 1, "validation_from": 2}):
        with pytest.raises(ValueError, match="2 items with official parts"):
            Dataset("x", np.zeros((2, 2), np.uint8), 256, **starts)
    with pytest.raises(ValueError, match="labels must be"):
        Dataset("x", np.zeros((2, 2), np.uint8), 256, labels=np.zeros(3, np.int64))
    for labels in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match=f"labels {labels[0]} to {labels[1]} of 2 classes"):
            Dataset("x", np.zeros((2, 2), np.uint8), 256, np.array(labels, np.int64), ("a", "b"))
