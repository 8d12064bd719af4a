"""Distances between two sets of features: Fréchet, kernel, precision and recall, nearest neighbours.

Features are rows of real numbers from any extractor (an Inception network, principal components, the raw values). All
of these numbers depend on the number of rows, the Fréchet distance strongly: a number means something only beside that
of two sets of real items of the same size, the floor (see `comparison.compare`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from undiffuse.errors import ConfigError, DataError, NonFiniteError
from undiffuse.process.statistics import mean_with_stderr

NEIGHBOURS = 3
"""The k of improved precision and recall [Kynkäänniemi19 §3]."""
JACKKNIFE_GROUPS = 10
"""Groups of rows of which the jackknife omits one at a time."""
ROUNDING = 1e-6
"""Tolerance of distances relative to the spread of the data, so that equal rows are within each other's balls."""
CHUNK_DISTANCES = 1 << 24
"""Distances that are in memory at a time."""


def frechet(a: Tensor, b: Tensor) -> float:
    """|μ_a − μ_b|² + tr Σ_a + tr Σ_b − 2 tr (Σ_a Σ_b)^½ of the Gaussians fitted to the rows [Heusel17 eq. 6].

    ``a`` (N, D) and ``b`` (M, D) with N, M ≥ 2, which may be less than D; covariances are unbiased. In squared units of
    the features, 0 for equal moments.

    With centred rows A such that Σ_a = AᵀA, the trace of the root is the sum of the singular values of A Bᵀ. A may be
    the R of a QR decomposition, so no covariance is formed and no root of a rounded eigenvalue is taken: the error is
    that of float64 times the traces, also for singular Σ.
    """
    a, b = _features(a, b)
    root_a, root_b = _root(a), _root(b)
    overlap = torch.linalg.svdvals(root_a @ root_b.mT).sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(mean + root_a.square().sum() + root_b.square().sum() - 2 * overlap))


def kernel(a: Tensor, b: Tensor, blocks: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and standard error of the unbiased MMD² under k(x, y) = (x·y/D + 1)³ [Bińkowski18 eq. 4 and §4].

    ``a`` (N, D) and ``b`` (M, D) are shuffled by ``seed`` and cut into ``blocks`` disjoint, independent blocks. For
    equal distributions the mean is below 0 about as often as above. Symmetric in ``a`` and ``b``.

    Raises ConfigError for fewer than two blocks, DataError for blocks of fewer than two rows.
    """
    a, b = _features(a, b)
    if blocks < 2:
        raise ConfigError("BLOCKS", "blocks", f"a standard error needs at least 2 blocks, not {blocks}", "Give 10")
    if min(len(a), len(b)) < 2 * blocks:
        cause = f"{len(a)} and {len(b)} rows are too few for {blocks} blocks of at least 2"
        raise DataError("FEW", "features", cause, "Give more rows or fewer blocks")
    pairs = zip(_blocks(a, blocks, seed), _blocks(b, blocks, seed), strict=True)
    values = torch.stack([_mmd2(x, y) for x, y in pairs])
    return mean_with_stderr(values)


def precision(a: Tensor, b: Tensor, k: int = NEIGHBOURS) -> float:
    """The share of rows of ``a`` (N, D) that lie within the estimated manifold of ``b`` (M, D) [Kynkäänniemi19 eq. 2].

    The manifold is the union of balls around the rows of ``b`` that reach to their k-th nearest other row of ``b``.
    precision(samples, data) is improved precision, precision(data, samples) improved recall; neither reaches 1
    for finite sets of one distribution. Raises DataError unless ``b`` has more than ``k`` rows.
    """
    a, b = _features(a, b)
    if len(b) <= k:
        raise DataError("FEW", "features", f"{len(b)} rows have no {k} neighbours each", "Give more rows")
    a, b = a - b.mean(0), b - b.mean(0)
    radius = torch.cat([torch.cdist(rows, b).kthvalue(k + 1).values for rows in row_chunks(b, b)])
    radius += ROUNDING * b.square().sum(1).mean().sqrt()
    inside = [(torch.cdist(rows, b) <= radius).any(1) for rows in row_chunks(a, b)]
    return float(torch.cat(inside).double().mean())


def nearest(a: Tensor, b: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The Euclidean distances (N, k), rising, from each row of ``a`` (N, D) to its nearest rows of ``b``; indices."""
    a, b = _features(a, b)
    indices = [torch.cdist(rows, b).topk(min(k, len(b)), largest=False).indices for rows in row_chunks(a, b)]
    index = torch.cat(indices)
    return torch.stack([(a - b[column]).norm(dim=1) for column in index.T], 1), index


def row_chunks(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The rows of ``a`` in parts whose distances to all rows of ``b`` fit into memory."""
    return a.split(max(1, CHUNK_DISTANCES // len(b)))


def jackknife(function: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor) -> float:
    """The standard error of ``function(a, b)`` over the rows of both sets, by the delete-a-group jackknife.

    f_g of `jackknife_stderr` omits every G-th row of both sets from the g-th on: rows have to be in random order.
    G is `JACKKNIFE_GROUPS`. Raises DataError for fewer than 2 G rows.
    """
    groups, fewest = JACKKNIFE_GROUPS, min(len(a), len(b))
    if fewest < 2 * groups:
        raise DataError("FEW", "features", f"{fewest} rows are too few for {groups} groups", "Give more rows")
    in_a, in_b = (torch.arange(len(rows)) % groups for rows in (a, b))
    omitted = torch.tensor([function(a[in_a != g], b[in_b != g]) for g in range(groups)], dtype=torch.float64)
    return jackknife_stderr(omitted)


def jackknife_stderr(omitted: Tensor) -> float:
    """√((G − 1)/G Σ_g (f_g − mean f)²) of the G values f_g, (G,), each computed without one of G groups."""
    return float(((len(omitted) - 1) * omitted.var(correction=0)).sqrt())


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2 or a.shape[1] == 0:
        cause = f"features must be (N, D) and (M, D) with N and M at least 2, not {tuple(a.shape)}, {tuple(b.shape)}"
        raise DataError("SHAPE", "features", cause, "Flatten each item to one row")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise NonFiniteError("NON_FINITE", "features", "a feature is NaN or infinite", "Check the samples")
    return a.double(), b.double()


def _root(rows: Tensor) -> Tensor:
    """R (min(N, D), D) such that RᵀR is the unbiased covariance of the rows (N, D)."""
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
