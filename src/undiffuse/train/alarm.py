"""Whether a model knows its training items better than others of their kind, with a false-alarm rate that is proved."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from undiffuse.data import Split

FALSE = 1e-3
"""At most this share of runs that remember nothing has a false alarm, at any of its looks."""


class Gap(NamedTuple):
    """``mean`` ± ``stderr`` of held-out minus training bits, and ``significant``: whether that is no accident."""

    mean: float
    stderr: float
    significant: bool


def gap(held_out: Tensor, trained_on: Tensor, looks: int) -> Gap:
    """mean(d) of d = held_out − trained_on, (n,) each, items in random order and measured with equal noise and times.

    Significant where Σd ≥ √(2 ln(looks/FALSE)) √Σd². If nothing is remembered the two items of a pair could change
    places, so each d is as often above 0 as below, whatever its law, and then this happens with a probability of at
    most FALSE/looks [Efron69; Hoeffding63], over all ``looks`` of a run at most FALSE.
    """
    d = (held_out - trained_on).double()
    n, root = len(d), math.sqrt(float((d**2).sum()))
    threshold = math.sqrt(2 * math.log(looks / FALSE))
    stderr = float(d.std()) / math.sqrt(n) if n > 1 else math.nan
    return Gap(float(d.mean()), stderr, root > 0 and float(d.sum()) >= threshold * root)


def pairs(split: Split, most: int) -> tuple[np.ndarray, np.ndarray]:
    """As many held-out items as training items, at most ``most`` of each, at random but always the same."""
    g = np.random.Generator(np.random.PCG64(0))
    n = min(most, len(split.validation), len(split.train))
    return tuple(g.choice(part, n, replace=False) for part in (split.validation, split.train))  # type: ignore[return-value]
