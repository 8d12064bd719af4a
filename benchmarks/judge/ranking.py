"""The rank of the right name among random candidates, without drawing them, and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Rate(NamedTuple):
    """A share with its interval; ``n`` counts independent prompts."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def hit_probability(better: int, others: int, k: int = 1, candidates: int = 100) -> float:
    """P(rank <= k) = sum_{i<k} C(b, i) C(M - b, c - 1 - i) / C(M, c - 1).

    The right name is ranked among itself and c − 1 names drawn without replacement from M ``others``, of which b
    score at least as high (``better``): the number drawn of those is hypergeometric. A tie counts against the image.
    """
    if others < candidates - 1:
        raise ValueError(f"{others} other names are fewer than {candidates - 1}")
    drawn = candidates - 1
    ways = sum(math.comb(better, i) * math.comb(others - better, drawn - i) for i in range(min(k, drawn + 1)))
    return ways / math.comb(others, drawn)


def hits(scores: np.ndarray, right: Sequence[int], k: int = 1, candidates: int = 100) -> np.ndarray:
    """`hit_probability` of each image, (N,). ``scores`` (N, M + 1) are those of all names, ``right`` the columns."""
    rows = np.arange(len(scores))
    own = scores[rows, right]
    better = (scores >= own[:, None]).sum(1) - 1
    others = scores.shape[1] - 1
    table = {b: hit_probability(int(b), others, k, candidates) for b in set(better.tolist())}
    return np.array([table[b] for b in better.tolist()])


def wilson(value: float, n: int, level: float = 0.95) -> Rate:
    """Wilson's score interval of the mean ``value`` of n independent numbers in [0, 1].

    (p + z²/2n ± z sqrt(p (1 − p)/n + z²/4n²)) / (1 + z²/n). Exact counts have variance p (1 − p)/n; means and
    probabilities in [0, 1] have at most that, so that the interval is on the safe side.
    """
    if n < 1:
        raise ValueError("no prompts")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre, half = value + z * z / (2 * n), z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return Rate(value, max(0.0, low) if value > 0 else 0.0, min(1.0, high) if value < 1 else 1.0, n)


def rate(values: np.ndarray, prompts: Sequence[str], level: float = 0.95) -> Rate:
    """The mean over prompts of the mean over their images: images of one prompt are not independent."""
    names = sorted(set(prompts))
    prompts = np.asarray(prompts)
    means = [float(values[prompts == name].mean()) for name in names]
    return wilson(float(np.mean(means)), len(names), level)


def derangement(n: int, seed: int) -> np.ndarray:
    """A random cyclic permutation of n numbers: no number stays (n > 1)."""
    order = np.random.default_rng(seed).permutation(n)
    result = np.empty(n, int)
    result[order] = np.roll(order, 1)
    return result


def best_among(scores: np.ndarray, right: Sequence[int], groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) whether the right name is the only best one of its group, and (N,) the group's size.

    ``groups`` has the group of each column, such as the thing of a colour and a thing: the chance is 1 / size.
    """
    groups = np.asarray(groups)
    best, size = [], []
    for row, column in zip(scores, right, strict=True):
        same = groups == groups[column]
        best.append((row[same] >= row[column]).sum() == 1)
        size.append(int(same.sum()))
    return np.array(best, float), np.array(size)
