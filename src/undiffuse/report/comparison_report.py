"""A comparison of samples with data for people: rows of a table, and an image of samples beside training items."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from undiffuse.data.dataset import Dataset
from undiffuse.evaluation.comparison import NEIGHBOURS, Comparison
from undiffuse.evaluation.metrics import METRICS, Value
from undiffuse.report.figures import image_strip
from undiffuse.report.table import cell

MAX_ROWS = 8
"""Samples in the image of nearest neighbours."""


def comparison_rows(result: Comparison) -> list[dict[str, Any]]:
    """A table row for each metric: its value with error and interval, and the floor."""
    return [
        {
            "metric": METRICS[name].title,
            "value": tuple(value),
            "95 %": _interval(name, value),
            "floor": tuple(result.floors[name]),
            "better": METRICS[name].better,
            "error by": METRICS[name].error,
        }
        for name, value in result.values.items()
    ]


def neighbours_image(result: Comparison, samples: np.ndarray, data: Dataset) -> Image.Image:
    """The samples that are nearest to training items, a row each, beside their nearest training items.

    ``samples`` (N, *item_shape) as they were compared. Raises `DataError` for items that are not images or volumes.
    """
    closest = np.argsort(result.neighbour_distances[:, 0], kind="stable")[:MAX_ROWS]
    columns = [samples[result.samples[closest]]]
    columns += [data.values[result.neighbours[closest, k]] for k in range(result.neighbours.shape[1])]
    labels = ["sample", *(f"training {k + 1}" for k in range(NEIGHBOURS))][: len(columns)]
    return image_strip(np.stack(columns), labels, data.num_values)


def nearest_rows(result: Comparison, data: Dataset) -> list[dict[str, Any]]:
    """The samples that are nearest to training items, as plain data: number, names or indices of items, distances."""
    closest = np.argsort(result.neighbour_distances[:, 0], kind="stable")[:MAX_ROWS]
    return [
        {
            "sample": int(result.samples[i]),
            "items": [int(item) for item in result.neighbours[i]],
            "training": [str(name) for name in data.item_names(result.neighbours[i])],
            "distances": [float(distance) for distance in result.neighbour_distances[i]],
        }
        for i in closest
    ]


def _interval(name: str, value: Value) -> str:
    """The interval with as many digits as the value has in the table."""
    digits = len(cell(tuple(value)).split(" ")[0].partition(".")[2])
    low, high = METRICS[name].interval(value)
    return f"{low:.{digits}f} to {high:.{digits}f}"
