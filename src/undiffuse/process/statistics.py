"""Sums, means and standard errors over the items of a batch."""

from __future__ import annotations

import math

from torch import Tensor


def item_sum(values: Tensor) -> Tensor:
    """Sum over all dimensions but the first, (B,)."""
    return values.flatten(1).sum(1)


def item_mean(values: Tensor) -> Tensor:
    """Mean over all dimensions but the first, (B,)."""
    return values.flatten(1).mean(1)


def mean_with_stderr(values: Tensor) -> tuple[float, float]:
    """(mean, std/√n) of ``values`` (n,): the mean and its standard error, which is NaN for one value."""
    values = values.detach()
    stderr = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), stderr
