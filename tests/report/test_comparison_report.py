"""A comparison as rows of a table and an image of neighbours, read back from its pixels."""

import numpy as np
import pytest

from undiffuse.data.from_array import from_array
from undiffuse.errors import DataError
from undiffuse.evaluation.comparison import Comparison, compare
from undiffuse.evaluation.metrics import Value
from undiffuse.report.comparison_report import comparison_rows, nearest_rows, neighbours_image
from undiffuse.report.figures import image_strip
from undiffuse.report.item_plots import lines

RNG = np.random.default_rng(0)
DATA = from_array(RNG.integers(0, 256, size=(300, 1, 8, 8)).astype(np.uint8), num_values=256)


def test_rows():
    values = {"precision": Value(0.95, 0.05), "frechet": Value(12.3456, 0.1234)}
    floors = {"precision": Value(0.9, 0.01), "frechet": Value(1.0, 0.1)}
    precision, frechet = comparison_rows(
        Comparison({"data": "images"}, 100, "raw", values, floors, *[None] * 4).summary()
    )
    assert precision == {
        "metric": "precision",
        "value": (0.95, 0.05),
        "95 %": "0.837 to 1.000",
        "floor": (0.9, 0.01),
        "better": "higher",
        "error by": "jackknife of 10 groups",
    }
    assert frechet["95 %"] == "12.07 to 12.62"


def test_samples_beside_their_nearest_training_items():
    samples = RNG.integers(0, 256, size=(40, 1, 8, 8)).astype(np.uint8)
    train = DATA.split().train
    samples[7], samples[3] = DATA.values[train[5]], DATA.values[train[9]]
    result = compare(samples, DATA, metrics=["nearest"], extractor="raw")
    closest = np.argsort(result.neighbour_distances[:, 0], kind="stable")[:2]
    assert sorted(result.samples[closest]) == [3, 7]
    image = neighbours_image(nearest_rows(result, DATA), samples, DATA)
    columns = [samples[result.samples[closest]], *(DATA.values[result.neighbours[closest, k]] for k in range(3))]
    assert np.array_equal(columns[0], columns[1])
    labels = ["sample", "training 1", "training 2", "training 3"]
    expected = image_strip(np.stack(columns), labels, 256)
    height = 2 * 72
    np.testing.assert_array_equal(np.asarray(image)[:height], np.asarray(expected)[:height])
    assert image.height == expected.height + 6 * 72  # eight samples


def test_series_are_plotted_beside_their_nearest_training_items():
    values = RNG.normal(size=(300, 2, 8)).astype(np.float32)
    data = from_array(values, layout="NCL")
    result = compare(values[:50], data, metrics=["nearest"], extractor="raw")
    closest = np.argsort(result.neighbour_distances[:, 0], kind="stable")[:8]
    rows = [[values[result.samples[i]], *values[result.neighbours[i]]] for i in closest]
    expected = lines(np.concatenate(rows), 4, (), ["sample", "training 1", "training 2", "training 3"])
    np.testing.assert_array_equal(
        np.asarray(neighbours_image(nearest_rows(result, data), values[:50], data)), np.asarray(expected)
    )


def test_vectors_have_no_image():
    data = from_array(RNG.normal(size=(300, 2)).astype(np.float32))
    result = compare(data.values[:50], data, metrics=["nearest"])
    with pytest.raises(DataError, match="the items are vectors"):
        neighbours_image(nearest_rows(result, data), data.values[:50], data)
