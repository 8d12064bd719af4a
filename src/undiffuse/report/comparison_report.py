"""A comparison of samples with data for people: rows of a table, and an image of samples beside training items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from undiffuse.data.dataset import Dataset
from undiffuse.errors import DataError
from undiffuse.evaluation.comparison import SHOWN_NEIGHBOURS, Comparison
from undiffuse.report.figures import image_strip
from undiffuse.report.run_sections import distance_rows

RECORD, IMAGE = "compare.json", "nearest.png"
"""All numbers, which is also the record of what is written, and the image of the nearest training items."""
DEFAULTS = {"metric": [], "items": 2000, "seed": 0}
"""The options of `compare` that are not None by default."""
MAX_ROWS = 8
"""Samples in the image of nearest neighbours."""


def comparison_rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table row for each metric of a comparison as plain data, without what the table's title has: n and features."""
    rows, _ = distance_rows(comparison)
    return [{name: row[name] for name in row if name not in ("n", "features")} for row in rows]


def neighbours_image(rows: Sequence[Mapping[str, Any]], samples: np.ndarray, data: Dataset) -> Image.Image:
    """The samples of ``rows``, those of `nearest_rows`, a row each, beside their nearest training items.

    ``samples`` (N, *item_shape) as they were compared; series are plotted. Raises `DataError` for vectors, and
    `ConfigError` for series without matplotlib.
    """
    if len(data.item_shape) < 2:
        raise DataError("SHAPE", data.name, "the items are vectors", f"The numbers are in {RECORD}")
    frames = [np.concatenate([samples[row["sample"]][None], data.values[np.array(row["items"])]]) for row in rows]
    labels = ["sample", *(f"training {k + 1}" for k in range(SHOWN_NEIGHBOURS))][: len(frames[0])]
    return image_strip(np.stack(frames, 1), labels, data.num_values, names=data.columns)


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
