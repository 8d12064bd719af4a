"""Tests of whether a model treats training items differently from held-out ones, with proved false-alarm rates.

Without memorization, training and held-out items are exchangeable: the distribution of a model's samples and
likelihoods stays the same if the two exchange their places. Both tests rest on this alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from undiffuse.data.dataset import Dataset, Split
from undiffuse.errors import DataError
from undiffuse.evaluation.distances import row_chunks
from undiffuse.process.statistics import mean_with_stderr

FALSE_ALARM_RATE = 1e-3
"""Greatest probability that a training run without memorization has a significant `Gap` at any of its evaluations."""
MIN_GAP_ITEMS = math.ceil(-2 * math.log(FALSE_ALARM_RATE))
"""Items below which no `Gap` is significant, even of a single test: Σd ≤ √n √Σd²."""
COPYING_FALSE_ALARM_RATE = 1e-6
"""Greatest probability that `copying_test` is significant for a model without memorization."""


class Gap(NamedTuple):
    """``mean`` ± ``stderr`` of held-out minus training bits, and whether it is ``significant``."""

    mean: float
    stderr: float
    significant: bool


class Copying(NamedTuple):
    """Of how many samples the nearest item is a training item rather than a held-out one, and how likely that is.

    ``share`` is that share of the samples, ``expected`` its mean without memorization, ``p_value`` an upper bound on
    the probability that held-out items attract so few samples. ``significant`` is p_value ≤ `COPYING_FALSE_ALARM_RATE`.
    ``training`` and ``held_out`` are the numbers of items.
    """

    share: float
    expected: float
    p_value: float
    training: int
    held_out: int
    significant: bool


def generalization_gap(held_out: Tensor, training: Tensor, num_tests: int) -> Gap:
    """mean(d) of d = held_out − training, (n,) bits each, of items in random order and with equal noise and times.

    Significant where Σd ≥ √(2 ln(num_tests/r)) √Σd² with r = `FALSE_ALARM_RATE`. Without memorization each d has a
    symmetric distribution, and then the probability of this is at most r/num_tests [Efron69; Hoeffding63], over all
    ``num_tests`` of a run at most r.
    """
    d = (held_out - training).double()
    root = math.sqrt(float((d**2).sum()))
    threshold = math.sqrt(2 * math.log(num_tests / FALSE_ALARM_RATE))
    return Gap(*mean_with_stderr(d), root > 0 and float(d.sum()) >= threshold * root)


def copying_test(samples: Tensor, train: Tensor, held_out: Tensor) -> Copying:
    """Whether training items attract more samples than held-out items do, by features (N, D), (M, D) and (m, D).

    Rows are in random order. Held-out item g forms group g with the training items g, g + m, g + 2m, ...; c_k is the
    number of samples whose nearest item is k. Without memorization every item of a group is the held-out one with equal
    probability, so T = Σ_groups (mean c − c_held-out) has the mean 0 and, by Chernoff's bound for any λ > 0,
    P(T ≥ t) ≤ e^(−λt) Π_groups mean_k e^(λ (mean c − c_k)). The p-value is the least of these bounds over a grid of λ.

    It holds for any distribution of data and samples, also for samples that are far from the data or too smooth, which
    a comparison of distances to training items alone would take for copies. Raises DataError for an empty part.
    """
    m = min(len(held_out), len(train))
    if m == 0 or len(samples) == 0:
        raise DataError("FEW", "features", "there are no items of a part", "Give samples, training and held-out items")
    group = torch.cat([torch.arange(m), torch.arange(len(train)) % m])
    slot = torch.cat([torch.zeros(m, dtype=torch.long), 1 + torch.arange(len(train)) // m])
    order = torch.argsort(group, stable=True)  # of equally near items the first group's counts, whichever is held out
    group, slot, items = group[order], slot[order], torch.cat([held_out[:m], train])[order]
    nearest = torch.cat([torch.cdist(rows, items).argmin(1) for rows in row_chunks(samples, items)])
    counts = torch.bincount(nearest, minlength=len(items)).double()
    sizes = torch.bincount(group).double()
    mean = torch.zeros(m, dtype=torch.float64).index_add(0, group, counts) / sizes
    differences = torch.full((m, int(slot.max()) + 1), -math.inf, dtype=torch.float64)
    differences[group, slot] = mean[group] - counts
    t, largest = float(differences[:, 0].sum()), float((mean[group] - counts).abs().max())
    strengths = torch.logspace(-3, 2, 50, dtype=torch.float64) / max(largest, 1e-9)
    bounds = [float(((x * differences).logsumexp(1) - sizes.log()).sum() - x * t) for x in strengths]
    share = 1 - float(counts[slot == 0].sum()) / len(samples)
    p_value = math.exp(min(0.0, *bounds))
    expected = share - t / len(samples)
    return Copying(share, expected, p_value, len(train), m, p_value <= COPYING_FALSE_ALARM_RATE)


def matched_items(data: Dataset, split: Split, max_items: int) -> tuple[np.ndarray, np.ndarray]:
    """As many held-out items as training items, at most ``max_items`` of each, chosen at random with a fixed seed.

    Of equal items, which are all in one part, only the first is chosen: distinct items are exchangeable, rows are not.
    """
    g = np.random.Generator(np.random.PCG64(0))
    firsts = np.sort(np.unique(data.digests, return_index=True)[1])
    distinct = [part[np.isin(part, firsts)] for part in (split.validation, split.train)]
    n = min(max_items, *map(len, distinct))
    return tuple(g.choice(part, n, replace=False) for part in distinct)  # type: ignore[return-value]
