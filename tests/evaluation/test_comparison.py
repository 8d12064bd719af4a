"""Samples compared with data: fresh samples reach the floor, copies are detected, and sources of samples are read."""

import json
from dataclasses import replace

import numpy as np
import pytest

from undiffuse.data.from_array import from_array
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation.comparison import compare, load_samples
from undiffuse.evaluation.metrics import METRICS
from undiffuse.report.sample_folder import write_samples

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 17, size=(600, 1, 3, 3)).astype(np.uint8)
DATA = from_array(VALUES, num_values=17, name="images")
SPLIT = DATA.split(0.2)
FRESH = RNG.integers(0, 17, size=(300, 1, 3, 3)).astype(np.uint8)


def test_fresh_samples_reach_the_floor():
    result = compare(FRESH, DATA, held_out=0.2)
    assert result.n == len(SPLIT.validation) + len(SPLIT.test)
    assert list(result.values) == list(result.floors) == list(METRICS)
    assert result.extractor == "raw"
    for name, value in result.values.items():
        difference = abs(value.value - result.floors[name].value)
        assert difference < 4.9 * (value.stderr**2 + result.floors[name].stderr ** 2) ** 0.5
    assert not result.copying.significant
    assert result.copying.expected == pytest.approx(len(SPLIT.train) / 600, abs=0.05)
    assert "no evidence that training items are copied" in result.explanations()[-1]


def test_other_samples_are_above_the_floor():
    result = compare(np.minimum(FRESH + 5, 16).astype(np.uint8), DATA, metrics=["frechet", "kernel"])
    for name, value in result.values.items():
        assert value.value > result.floors[name].value + 8 * value.stderr
    assert result.values["frechet"].value > result.floors["frechet"].value + 1


def test_copies_are_detected():
    copied = RNG.choice(SPLIT.train, 150, replace=False)
    result = compare(DATA.values[copied], DATA, held_out=0.2, metrics=["nearest"])
    assert list(result.values) == ["nearest"]
    assert result.values["nearest"].value == 0 < result.floors["nearest"].value
    assert (result.copying.share, result.copying.significant) == (1.0, True)
    np.testing.assert_array_equal(result.neighbours[:, 0], copied[result.samples])
    assert (result.neighbour_distances[:, 0] == 0).all()
    assert (np.diff(result.neighbour_distances) >= 0).all()
    assert set(result.neighbours.flat) <= set(SPLIT.train)
    assert "training items are copied (p ≤" in result.explanations()[-1]


def test_numbers_as_plain_data_depend_on_the_seed_alone():
    first, again, other = (compare(FRESH, DATA, seed=seed, items=100).summary() for seed in (0, 0, 1))
    assert json.loads(json.dumps(first)) == json.loads(json.dumps(again))
    assert first["metrics"]["frechet"] != other["metrics"]["frechet"]
    assert first["n"] == 100
    assert first["copying"]["false_alarm_rate"] == 1e-6
    for name, row in first["metrics"].items():
        assert len(row["value"]) == len(row["floor"]) == 4
        assert (row["n"], row["features"], row["units"]) == (100, "raw", METRICS[name].units)


def test_an_official_test_part_is_not_used_for_the_copying_test():
    data = replace(DATA, test_from=400)
    result = compare(FRESH, data, held_out=0.2, metrics=["kernel"])
    split = data.split(0.2)
    assert result.n == min(300, len(split.train), len(split.validation) + 200)
    assert result.copying.held_out == len(split.validation) < 150


@pytest.mark.parametrize(
    ("held_out", "parts"), [(0.2, {"validation_from": 350}), (0.0, {}), (0.0, {"validation_from": 350})]
)
def test_official_parts_alone_allow_no_copying_test(held_out, parts):
    values = np.concatenate([VALUES[:400], 16 - VALUES[400:] // 4])  # official parts of another distribution
    data = replace(from_array(values, num_values=17, name="images"), test_from=450, **parts)
    result = compare(FRESH, data, held_out=held_out, metrics=["kernel"])
    assert result.copying is result.summary()["copying"] is None
    assert result.explanations()[-1].startswith(
        "memorization: not tested, because no held-out items were chosen at random"
    )
    assert result.neighbours.shape == (len(result.samples), 3)


CORRELATED = RNG.normal(size=(700, 300)) * np.linspace(1, 0.2, 300)
"""Of many values, so that principal components are computed, and more than items can fix."""


def test_principal_components_treat_samples_training_and_held_out_items_alike():
    data = from_array(CORRELATED[:500].astype(np.float32), name="vectors")
    result = compare(CORRELATED[500:].astype(np.float32), data, metrics=["frechet", "kernel"])
    assert result.extractor == "pca"
    for name, value in result.values.items():
        floor = result.floors[name]
        assert abs(value.value - floor.value) < 4.9 * (value.stderr**2 + floor.stderr**2) ** 0.5
    assert abs(result.copying.share - result.copying.expected) < 0.2
    copies = compare(data.values[data.split().train][:150], data, metrics=["kernel"])
    assert copies.copying.significant


def test_continuous_data_are_standardized_by_the_training_part():
    values = RNG.normal(size=(300, 2)).astype(np.float32)
    rows = {}
    for scale in (1, 100):
        data = from_array(values * np.array([1, scale], np.float32), name="vectors")
        samples = RNG.permutation(data.values)[:100]
        rows[scale] = compare(samples, data, metrics=["nearest"]).floors["nearest"].value
    assert rows[100] < 2 * rows[1]


def test_samples_from_a_folder_an_array_and_any_source(tmp_path):
    write_samples(tmp_path / "samples", FRESH[:30], 17, {"seed": 1})
    np.save(tmp_path / "samples.npy", FRESH[:30])
    np.savez(tmp_path / "samples-2.npz", x=FRESH[:30])
    for name in ("samples", "samples.npy", "samples-2.npz"):
        np.testing.assert_array_equal(load_samples(str(tmp_path / name), DATA), FRESH[:30])
    other = load_samples("anything", DATA, lambda source: DATA)
    assert other is DATA.values
    np.save(tmp_path / "wide.npy", np.zeros((30, 1, 3, 4), np.uint8))
    with pytest.raises(
        DataError, match="the samples are 1×3×4 with 17 possible values, the items of images 1×3×3 with 17"
    ):
        load_samples(str(tmp_path / "wide.npy"), DATA)


@pytest.mark.parametrize("shape", [(3, 8), (8, 4, 4), (5, 4, 4, 2)])
def test_a_sample_folder_needs_no_layout(tmp_path, shape):
    """Series, images of many channels and volumes: `sample` writes channels first."""
    values = RNG.normal(size=(6, *shape)).astype(np.float32)
    write_samples(tmp_path / "samples", values, None, {"seed": 1})
    data = from_array(values, layout={2: "NCL", 3: "NCHW", 4: "NCDHW"}[len(shape)])
    np.testing.assert_array_equal(load_samples(str(tmp_path / "samples"), data), values)


def test_refusals():
    with pytest.raises(ConfigError, match="--metric fid: no such metric"):
        compare(FRESH, DATA, metrics=["fid"])
    with pytest.raises(ConfigError, match="no such extractor"):
        compare(FRESH, DATA, extractor="inception")
    with pytest.raises(DataError, match="19 can be compared"):
        compare(FRESH[:19], DATA)
