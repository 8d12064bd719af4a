"""Metrics of samples by a table: a metric is a row of `BUILT_IN_METRICS`. The table can be read without torch.

A metric compares the features of samples with those of a part of the data. Its floor is the same number for real items:
training items compared with held-out items, or held-out items with training items where the reference is the training
part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from undiffuse.runtime.plugins import WithPlugins

if TYPE_CHECKING:
    from torch import Tensor

NORMAL, TEN_GROUPS = 1.96, 2.262
"""Standard errors to either side of a value in its interval of 95 %: for an error of many items, and for one estimated
from ten groups, by Student's t with nine degrees of freedom."""


class Value(NamedTuple):
    """A metric's value and its standard error."""

    value: float
    stderr: float


class Metric(NamedTuple):
    """``function`` maps features of samples (N, D) and of the reference (M, D), rows in random order, to a `Value`.

    ``better`` is "lower", "higher" or "at the floor", ``error`` the method of the standard error, ``bounds`` the least
    and the greatest possible value, ``reference`` the part that samples are compared with: as many "held-out" items as
    samples, or all "training" items; ``stderrs`` is the half-width of the interval of 95 % in standard errors.
    """

    title: str
    function: Callable[[Tensor, Tensor], Value]
    units: str
    better: str
    error: str
    bounds: tuple[float, float]
    reference: str = "held-out"
    stderrs: float = NORMAL

    def interval(self, value: Value) -> tuple[float, float]:
        """value ± ``stderrs`` standard errors, within the bounds: 95 % where the error is normal."""
        (mean, stderr), (least, greatest) = value, self.bounds
        return max(least, mean - self.stderrs * stderr), min(greatest, mean + self.stderrs * stderr)


def frechet(samples: Tensor, reference: Tensor) -> Value:
    """The Fréchet distance [Heusel17 eq. 6]."""
    from undiffuse.evaluation import distances

    stderr = distances.jackknife(distances.frechet, samples, reference)
    return Value(distances.frechet(samples, reference), stderr)


def kernel(samples: Tensor, reference: Tensor) -> Value:
    """The kernel distance, an unbiased MMD² [Bińkowski18 eq. 4]."""
    from undiffuse.evaluation import distances

    return Value(*distances.kernel(samples, reference))


def precision(samples: Tensor, reference: Tensor) -> Value:
    """The share of samples within the manifold of the reference [Kynkäänniemi19 eq. 2]."""
    from undiffuse.evaluation import distances

    stderr = distances.jackknife(distances.precision, samples, reference)
    return Value(distances.precision(samples, reference), stderr)


def recall(samples: Tensor, reference: Tensor) -> Value:
    """The share of the reference within the manifold of the samples [Kynkäänniemi19 eq. 2]."""
    return precision(reference, samples)


def nearest(samples: Tensor, reference: Tensor) -> Value:
    """The mean distance of samples to their nearest reference items."""
    from undiffuse.evaluation import distances
    from undiffuse.process.statistics import mean_with_stderr

    return Value(*mean_with_stderr(distances.nearest(samples, reference)[0][:, 0]))


POSITIVE, SHARE, REAL = (0.0, math.inf), (0.0, 1.0), (-math.inf, math.inf)
JACKKNIFE = "jackknife of 10 groups"
BUILT_IN_METRICS: Mapping[str, Metric] = {
    "frechet": Metric(
        "Fréchet distance", frechet, "squared feature units", "lower", JACKKNIFE, POSITIVE, stderrs=TEN_GROUPS
    ),
    "kernel": Metric("kernel distance", kernel, "none", "lower", "10 blocks", REAL, stderrs=TEN_GROUPS),
    "precision": Metric("precision", precision, "share", "higher", JACKKNIFE, SHARE, stderrs=TEN_GROUPS),
    "recall": Metric("recall", recall, "share", "higher", JACKKNIFE, SHARE, stderrs=TEN_GROUPS),
    "nearest": Metric(
        "distance to training", nearest, "feature units", "at the floor", "spread over samples", POSITIVE, "training"
    ),
}
METRICS = WithPlugins(BUILT_IN_METRICS, "undiffuse.metrics")
"""The metrics by name, those of plugins last."""
