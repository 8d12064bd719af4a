"""Two likelihoods that a model of discrete images has to beat, exact to the last level.

Both give the probability of the integers themselves, so their bits compare with any other model's
without a bound, a dequantisation or a correction. Everything is tuned on the validation part only.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from undiffuse.errors import ConfigError, DataError
from undiffuse.process.gaussian import Gaussian

COMPONENTS = (1, 2, 5, 10, 20, 30, 40, 50, 70, 100, 140, 200)
REG_COVAR = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # in squared units of x in [-1, 1]
RESTARTS = 4


@dataclass(frozen=True)
class Baseline:
    """``nats`` (N,), −log P of each held-out item; ``dims``, the values per item; ``chosen``, what won."""

    nats: np.ndarray
    dims: int
    chosen: dict[str, float]

    @property
    def bits_per_dim(self) -> np.ndarray:
        """nats / (dims log 2) of each item, (N,)."""
        return self.nats / (self.dims * math.log(2))


def independent_pixels(train, validation, held_out, levels: int) -> Baseline:
    """−log Π_d (n_dv + α)/(N + α L): every pixel a categorical of its own, α chosen on ``validation``.

    Items are integers 0 .. ``levels`` − 1, arrays or tensors (N, ...).
    Raises DataError for values that are not such levels or shapes that differ.
    """
    train, validation, held_out = _levels(levels, train=train, validation=validation, held_out=held_out)
    counts = torch.stack([(train == v).sum(0) for v in range(levels)], 1).double()

    def nats(alpha: float, items: Tensor) -> Tensor:
        return -_pick(((counts + alpha) / (len(train) + alpha * levels)).log(), items)

    alpha = min(np.geomspace(1e-3, 10, 41).tolist(), key=lambda alpha: float(nats(alpha, validation).mean()))
    return Baseline(nats(alpha, held_out).numpy(), train.shape[1], {"alpha": alpha})


def gaussian_mixtures(
    train, validation, held_out, levels: int, seed: int = 0, averages: Sequence[int] = (1,)
) -> list[Baseline]:
    """−log Σ_k π_k Π_d [Φ((hi_d − μ_kd)/σ_kd) − Φ((lo_d − μ_kd)/σ_kd)], the best mixtures scikit-learn fits.

    Items as in `independent_pixels`, seen by the fit as x = 2 v/(levels − 1) − 1; lo and hi are the
    edges of v's bin, the outermost reach to ±∞. Components and ``reg_covar`` are searched over
    COMPONENTS × REG_COVAR, then the five best pairs from RESTARTS more seeds, all by the discrete
    likelihood of ``validation``. One baseline for each of ``averages``: 1 is the best fit alone, n the
    mean of the n best, a stronger mixture still. ``chosen`` says what the best fit was, and out of how many.
    Raises ConfigError where scikit-learn is missing, DataError as `independent_pixels`.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits
    except ImportError as missing:
        cause = "the mixture baseline needs scikit-learn"
        raise ConfigError("MISSING", "scikit-learn", cause, "Run: pip install 'undiffuse[data]'") from missing
    train, validation, held_out = _levels(levels, train=train, validation=validation, held_out=held_out)
    x = (2 * train.double() / (levels - 1) - 1).numpy()

    def fit(components: int, reg_covar: float, seed: int):
        mixture = GaussianMixture(components, covariance_type="diag", reg_covar=reg_covar, random_state=seed)
        mixture.fit(x)
        fitted = (mixture.weights_, mixture.means_, np.sqrt(np.asarray(mixture.covariances_)))
        weights, means, scales = (torch.as_tensor(p) for p in fitted)
        loss = float(mixture_nats(validation, weights, means, scales, levels).mean())
        return loss, (components, reg_covar, seed), (weights, means, scales)

    def by_loss(tried) -> float:
        return tried[0]

    # One thread: many small fits lose more to waiting threads than they gain (5 x on two busy cores).
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        fits = [fit(k, reg, seed) for k in COMPONENTS if k <= len(x) for reg in REG_COVAR]
        best = sorted(fits, key=by_loss)[:5]
        fits += [fit(k, reg, seed + i) for _, (k, reg, _), _ in best for i in range(1, RESTARTS + 1)]
    ranked = sorted(fits, key=by_loss)

    def mean_of(best) -> Baseline:
        weights, means, scales = (torch.cat(p) for p in zip(*(parameters for *_, parameters in best), strict=True))
        components, reg_covar, seed = best[0][1]
        chosen: dict[str, float] = {"components": components, "reg_covar": reg_covar, "seed": seed, "fits": len(fits)}
        nats = mixture_nats(held_out, weights / len(best), means, scales, levels).numpy()
        return Baseline(nats, x.shape[1], chosen | {"average": len(best)})

    return [mean_of(ranked[:n]) for n in averages]


def mixture_nats(items: Tensor, weights: Tensor, means: Tensor, scales: Tensor, levels: int) -> Tensor:
    """−log P of ``items`` (N, D) int64 under the binned mixture: ``weights`` (K,), the others (K, D), float64."""
    edges = (2 * torch.arange(levels + 1, dtype=torch.float64) - 1) / (levels - 1) - 1
    edges[0], edges[-1] = -math.inf, math.inf
    parts = []
    for weight, mean, scale in zip(weights, means, scales, strict=True):
        law = Gaussian(mean[:, None], 2 * scale[:, None].log())
        parts.append(weight.log() + _pick(law.bin_log_prob((edges[:-1], edges[1:])), items))
    return -torch.stack(parts).logsumexp(0)


def _pick(table: Tensor, items: Tensor) -> Tensor:
    """Σ_d table[d, items[n, d]], (N,), for ``table`` (D, L) and ``items`` (N, D)."""
    return table.gather(1, items.T).sum(0)


def _levels(levels: int, **parts) -> list[Tensor]:
    """Each part as (N, D) int64."""
    if levels < 2:
        raise ConfigError("LEVELS", "levels", f"{levels} levels carry no information", "Give at least 2")
    tensors = {name: torch.as_tensor(part) for name, part in parts.items()}
    shape = next(iter(tensors.values())).shape[1:]
    for name, items in tensors.items():
        if items.shape[1:] != shape or items.ndim < 2 or items.numel() == 0:
            cause = f"items of shape {tuple(items.shape)} do not match (N, {', '.join(map(str, shape))})"
            raise DataError("SHAPE", name, cause, "Give at least one item of the same shape in every part")
        whole = items.to(torch.int64)
        if not torch.equal(whole.to(items.dtype), items) or whole.min() < 0 or whole.max() >= levels:
            cause = f"values must be whole numbers from 0 to {levels - 1}"
            raise DataError("LEVELS", name, cause, "Give the integers themselves, not the encoded values")
        tensors[name] = whole.flatten(1)
    return list(tensors.values())
