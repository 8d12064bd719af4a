"""How far two sets of features lie apart: the Fréchet and the kernel distance, and their honest floor.

Features are rows of real numbers from anywhere (an Inception network, a codec, the raw values). Both
distances depend on the number of rows, the Fréchet distance strongly so: a number means something
only beside that of two real sets of the same size, which `with_floor` gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.errors import ConfigError, DataError, NonFiniteError


class Distances(NamedTuple):
    """Both distances between two sets of ``n`` rows each; ``kernel_stderr`` is one standard error."""

    n: int
    frechet: float
    kernel: float
    kernel_stderr: float


def frechet(a: Tensor, b: Tensor) -> float:
    """|μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½ of the Gaussians fitted to the rows [Heusel17 eq. 6].

    ``a`` (N, D) and ``b`` (M, D), N and M ≥ 2 and free to be below D; covariances are unbiased. In the
    squared units of the features, 0 for equal moments.

    With centred rows A, Σ_a = AᵀA, the trace of the root is the sum of the singular values of A Bᵀ.
    Rows that are left after a QR reduction do as well, so no covariance is formed and no root of a
    rounded eigenvalue is taken: the error is that of float64 times the traces, for singular Σ also.
    """
    a, b = _features(a, b)
    root_a, root_b = _root(a), _root(b)
    overlap = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(mean + root_a.square().sum() + root_b.square().sum() - 2 * overlap))


def kernel(a: Tensor, b: Tensor, blocks: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard error of the unbiased MMD² under k(x, y) = (x·y/D + 1)³ [Bińkowski18 eq. 4 and §4].

    ``a`` (N, D) and ``b`` (M, D) are shuffled by ``seed`` and cut into ``blocks`` disjoint blocks;
    blocks are independent, so the error is an honest one. Unbiased: the mean is below 0 about as
    often as above when the laws agree. Swapping ``a`` and ``b`` changes nothing.

    Raises ConfigError for fewer than two blocks, DataError for blocks of fewer than two rows.
    """
    a, b = _features(a, b)
    if blocks < 2:
        raise ConfigError("BLOCKS", "blocks", f"a standard error needs at least 2 blocks, not {blocks}", "Ask for 10")
    if min(len(a), len(b)) < 2 * blocks:
        cause = f"{len(a)} and {len(b)} rows are too few for {blocks} blocks of at least 2"
        raise DataError("FEW", "features", cause, "Give more rows or ask for fewer blocks")
    pairs = zip(_blocks(a, blocks, seed), _blocks(b, blocks, seed), strict=True)
    values = torch.stack([_mmd2(x, y) for x, y in pairs])
    return float(values.mean()), float(values.std() / blocks**0.5)


def distances(a: Tensor, b: Tensor, n: int | None = None, seed: int = 0) -> Distances:
    """Both distances between ``n`` rows drawn by ``seed`` from each set; all of the smaller set by default."""
    n = min(len(a), len(b)) if n is None else n
    if not 2 <= n <= min(len(a), len(b)):
        cause = f"cannot draw {n} rows from sets of {len(a)} and {len(b)}"
        raise DataError("FEW", "features", cause, "Ask for at least 2 and at most the smaller set")
    a, b = (rows[_order(len(rows), seed)[:n].to(rows.device)] for rows in (a, b))
    return Distances(n, frechet(a, b), *kernel(a, b, blocks=min(10, n // 2), seed=seed))


def with_floor(samples: Tensor, train: Tensor, held_out: Tensor, seed: int = 0) -> tuple[Distances, Distances]:
    """The samples' distances from the held-out rows, and the training rows' at the same size: the floor.

    All sets (·, D) are cut to the smallest one's size. A model that has learned the law scores the
    floor; one that scores below it by more than the error has memorised or was fitted to the metric.
    """
    n = min(len(samples), len(train), len(held_out))
    return distances(samples, held_out, n, seed), distances(train, held_out, n, seed)


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2 or a.shape[1] == 0:
        cause = f"features must be (N, D) and (M, D) with N and M at least 2, not {tuple(a.shape)}, {tuple(b.shape)}"
        raise DataError("SHAPE", "features", cause, "Flatten each item to one row")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise NonFiniteError("NONFINITE", "features", "a feature is not a finite number", "Look at the samples first")
    return a.double(), b.double()


def _root(rows: Tensor) -> Tensor:
    """R (min(N, D), D) with RᵀR the unbiased covariance."""
    return torch.linalg.qr((rows - rows.mean(0)) / (len(rows) - 1) ** 0.5, mode="r").R


def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _blocks(rows: Tensor, blocks: int, seed: int) -> tuple[Tensor, ...]:
    size = len(rows) // blocks
    return rows[_order(len(rows), seed)[: blocks * size].to(rows.device)].split(size)


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    def cubic(p: Tensor, q: Tensor) -> Tensor:
        return (p @ q.mT / p.shape[1] + 1) ** 3

    def within(p: Tensor) -> Tensor:
        k = cubic(p, p)
        return (k.sum() - k.trace()) / (len(p) * (len(p) - 1))

    return within(x) + within(y) - 2 * cubic(x, y).mean()
