"""Samples compared with the data: metrics with intervals and floors, nearest training items, the copying test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undiffuse.data.dataset import Dataset
from undiffuse.data.from_array import CHANNELS_FIRST
from undiffuse.data.sources.array_files import SUFFIXES
from undiffuse.data.sources.registry import load
from undiffuse.data.transform import transform_for
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation import distances
from undiffuse.evaluation.features import EXTRACTORS, MAX_FIT_ITEMS, Features, default_extractor, get_extractor
from undiffuse.evaluation.memorization_test import COPYING_FALSE_ALARM_RATE, Copying, copying_test
from undiffuse.evaluation.metrics import METRICS, Value
from undiffuse.evaluation.plan import describe_items

MIN_ITEMS = 2 * distances.JACKKNIFE_GROUPS
"""Fewest samples and items of each part."""
CHUNK_ITEMS = 4096
"""Items whose values are in memory at a time."""
SHOWN_NEIGHBOURS = 3
"""Nearest training items that are listed for a sample."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Samples compared with a data set at ``n`` samples and items.

    ``values`` and ``floors`` have a row for each metric. ``copying`` is None where all held-out items are of official
    parts, which are not exchangeable with training items. ``samples`` (M,) are the numbers of the compared samples,
    the first ``n`` of them by all metrics; ``neighbours`` (M, 3) are the indices in the data set of the training items
    that are nearest to each of them, and ``neighbour_distances`` (M, 3) the distances in feature units.
    """

    facts: dict[str, Any]
    n: int
    extractor: str
    values: dict[str, Value]
    floors: dict[str, Value]
    copying: Copying | None
    samples: np.ndarray
    neighbours: np.ndarray
    neighbour_distances: np.ndarray

    def summary(self) -> dict[str, Any]:
        """All numbers as plain data; a value is [value, standard error, low, high]."""
        metrics = {}
        for name, value in self.values.items():
            metric, floor = METRICS[name], self.floors[name]
            metrics[name] = {
                "title": metric.title,
                "value": [*value, *metric.interval(value)],
                "floor": [*floor, *metric.interval(floor)],
                "n": self.n,
                "features": self.extractor,
                "units": metric.units,
                "better": metric.better,
                "error": metric.error,
                "reference": metric.reference,
            }
        copying = self.copying and self.copying._asdict() | {"false_alarm_rate": COPYING_FALSE_ALARM_RATE}
        return self.facts | {"n": self.n, "features": self.extractor, "metrics": metrics, "copying": copying}

    def explanations(self) -> list[str]:
        """What the numbers mean, as sentences."""
        return [
            f"features: {EXTRACTORS[self.extractor].description}; compare only with numbers of the same features, data "
            "and n",
            "floor: the same number for real items, training against held-out",
            f"memorization: {describe_copying(self.copying)}",
        ]


def describe_copying(test: Copying | None) -> str:
    """The result of the ``test`` in words, or why there is none."""
    if test is None:
        return "not tested, because no held-out items were chosen at random: official parts may differ from training"
    verdict = "training items are copied" if test.significant else "no evidence that training items are copied"
    return (
        f"the nearest of {test.training:,} training and {test.held_out:,} held-out items is a "
        f"training item for {test.share:.1%} of the samples, {test.expected:.1%} are expected: {verdict} "
        f"(p ≤ {test.p_value:.1g}, tested at a false-alarm rate of {COPYING_FALSE_ALARM_RATE:g})"
    )


def load_samples(
    source: str, data: Dataset, read: Callable[[str], Dataset] = load, layout: str | None = None
) -> np.ndarray:
    """The samples (N, *item_shape) in a sample folder, an array file, or any source that ``read`` accepts.

    ``layout`` is the order of the dimensions of an array file, as for `undiffuse.load_data`. Raises `DataError` if they
    are not items like those of ``data``.
    """
    path = Path(source)
    array = path / "samples.npz" if (path / "samples.npz").is_file() else path
    if array.suffix.lower() in SUFFIXES and array.is_file():
        layout = CHANNELS_FIRST[data.values.ndim] if array != path else layout  # as `sample` has written them
        samples = load(array, num_values=data.num_values, layout=layout)
    else:
        samples = read(source)
    if samples.item_shape != data.item_shape or samples.num_values != data.num_values:
        theirs, ours = (describe_items(one.item_shape, one.num_values) for one in (samples, data))
        cause = f"the samples are {theirs}, the items of {data.name} {ours}"
        raise DataError("SHAPE", source, cause, "Give samples of a model of these data")
    return np.asarray(samples.values)


def compare(
    samples: np.ndarray,
    data: Dataset,
    *,
    metrics: Sequence[str] = (),
    extractor: str | None = None,
    items: int = 2000,
    held_out: float = 0.1,
    seed: int = 0,
) -> Comparison:
    """``samples`` (N, *item_shape), values as ``data`` has them, compared with held-out and training items.

    ``metrics`` are rows of `METRICS`, by default all; ``extractor`` a row of `EXTRACTORS`. At most ``items``
    samples, and as many held-out and training items, are chosen by ``seed``; nearest items are of all training items.
    ``held_out`` is the fraction that was held out when the model was trained. Features of the metrics are computed from
    training items that are not compared, and those of the copying test from training and held-out items together. The
    copying test leaves out official parts, which are not exchangeable with training items. Raises `ConfigError`, and
    `DataError` for fewer than 20 samples, held-out or training items (40 training items for fitted features).
    """
    for name in metrics:
        if name not in METRICS:
            raise ConfigError("METRIC", f"--metric {name}", "no such metric", f"Use one of {', '.join(METRICS)}")
    extractor = extractor or default_extractor(data.item_shape)
    _, build, fitted = get_extractor(extractor)
    split = data.split(held_out)
    to_compare = len(split.train) // 2 if fitted else len(split.train)  # the others are for the features
    n = min(items, len(samples), to_compare, len(split.validation) + len(split.test))
    if n < MIN_ITEMS:
        cause = f"{len(samples)} samples, {len(split.train)} training and "
        cause += f"{len(split.validation) + len(split.test)} held-out items, of which {n} can be compared"
        fix = f"Give at least {MIN_ITEMS} of each{', and twice as many to train on' if fitted else ''}"
        raise DataError("FEW", data.name, cause, fix)
    g = np.random.Generator(np.random.PCG64(seed))
    chosen = g.permutation(len(samples))[:items]
    train, unseen = g.permutation(split.train), g.permutation(np.concatenate([split.validation, split.test]))
    transform = transform_for(data, data.moments(split.train) if data.num_values is None else None)

    def to_model(values: np.ndarray) -> torch.Tensor:
        return transform.to_model(torch.from_numpy(np.ascontiguousarray(values)))

    def fit(numbers: np.ndarray) -> Features:
        return build(to_model(data.values[np.sort(numbers[:MAX_FIT_ITEMS])]))

    def rows(extract: Features, values: np.ndarray, numbers: np.ndarray) -> torch.Tensor:
        parts = (numbers[i : i + CHUNK_ITEMS] for i in range(0, len(numbers), CHUNK_ITEMS))
        return torch.cat([extract(to_model(values[part])) for part in parts])

    extract = fit(train[n:] if fitted else train)
    generated = rows(extract, samples, chosen)
    trained, real = (rows(extract, data.values, numbers) for numbers in (train, unseen))
    values, floors = {}, {}
    for name in metrics or METRICS:
        metric = METRICS[name]
        if metric.reference == "training":
            values[name], floors[name] = (metric.function(some[:n], trained) for some in (generated, real))
        else:
            values[name], floors[name] = (metric.function(some[:n], real[:n]) for some in (generated, trained))
    drawn, copying = unseen[unseen < data.official_from], None
    if len(drawn):
        if fitted:
            extract = fit(g.permutation(np.concatenate([train, drawn])))
            generated, trained = rows(extract, samples, chosen), rows(extract, data.values, train)
        copying = copying_test(generated, trained, rows(extract, data.values, drawn))
    neighbour_distances, neighbours = distances.nearest(generated, trained, SHOWN_NEIGHBOURS)
    return Comparison(
        {"data": data.name, "fingerprint": data.fingerprint, "held_out": held_out, "seed": seed},
        n,
        extractor,
        values,
        floors,
        copying,
        chosen,
        train[neighbours.numpy()],
        neighbour_distances.numpy(),
    )
