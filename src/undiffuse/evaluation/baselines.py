"""Two exact likelihoods of integer images that a model has to beat: independent pixels and Gaussian mixtures.

Both give the probability of the integers themselves, so their bits compare with those of any other model without a
bound, a dequantization or a correction. All settings are chosen on the validation part.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
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
    """``nats`` (N,), −log P of each held-out item; ``dims`` values per item; ``chosen``, the best settings."""

    nats: np.ndarray
    dims: int
    chosen: dict[str, float]

    @property
    def bits_per_dim(self) -> np.ndarray:
        """nats / (dims log 2) of each item, (N,)."""
        return self.nats / (self.dims * math.log(2))


def independent_pixels(train, validation, held_out, num_values: int) -> Baseline:
    """−log Π_d (n_dv + α)/(N + α L): a categorical distribution for every pixel, α chosen on ``validation``.

    Items are integers 0 .. L − 1 with L = ``num_values``, arrays or tensors (N, ...). Raises DataError for other values
    or shapes that differ.
    """
    train, validation, held_out = _integers(num_values, train=train, validation=validation, held_out=held_out)
    counts = torch.stack([(train == v).sum(0) for v in range(num_values)], 1).double()

    def nats(alpha: float, items: Tensor) -> Tensor:
        return -_pick(((counts + alpha) / (len(train) + alpha * num_values)).log(), items)

    alpha = min(np.geomspace(1e-3, 10, 41).tolist(), key=lambda alpha: float(nats(alpha, validation).mean()))
    return Baseline(nats(alpha, held_out).numpy(), train.shape[1], {"alpha": alpha})


def shared_values(train: np.ndarray, held_out: np.ndarray) -> float:
    """−Σ_cv m_cv log₂ (n_cv + 1)/(Σ_v n_cv + L) / Σ m: one categorical distribution for each channel, bits per value.

    ``train`` n and ``held_out`` m, (C, L), are counts of the L values in each channel, from few items if need be:
    a model that has learned anything is better than this.
    """
    p = (train + 1) / (train.sum(1, keepdims=True) + train.shape[1])
    return float(-(held_out * np.log2(p)).sum() / held_out.sum())


def gaussian_mixtures(
    train,
    validation,
    held_out,
    num_values: int,
    seed: int = 0,
    averages: Sequence[int] = (1,),
    progress: Callable[[float], None] = lambda amount: None,
) -> list[Baseline]:
    """−log Σ_k π_k Π_d [Φ((hi_d − μ_kd)/σ_kd) − Φ((lo_d − μ_kd)/σ_kd)], the best mixtures scikit-learn fits.

    Items as in `independent_pixels`, fitted as x = 2 v/(num_values − 1) − 1; lo and hi are the edges of v's bin, the
    outermost of which are ±∞. Components and ``reg_covar`` are searched over COMPONENTS × REG_COVAR, then the five best
    pairs with RESTARTS more seeds, all by the discrete likelihood of ``validation``. One baseline for each of
    ``averages``: 1 is the best fit alone, n the mean of the n best. ``chosen`` holds the settings of the best fit and
    the number of fits. ``progress`` is called after each fit with the fraction of the work that it was. Raises
    ConfigError where scikit-learn is missing, DataError as `independent_pixels`.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture
        from threadpoolctl import threadpool_limits
    except ImportError as missing:
        cause = "the mixture baseline needs scikit-learn"
        raise ConfigError("MISSING", "scikit-learn", cause, "Run: pip install 'undiffuse[data]'") from missing
    train, validation, held_out = _integers(num_values, train=train, validation=validation, held_out=held_out)
    x = (2 * train.double() / (num_values - 1) - 1).numpy()

    def fit(components: int, reg_covar: float, seed: int):
        mixture = GaussianMixture(components, covariance_type="diag", reg_covar=reg_covar, random_state=seed)
        mixture.fit(x)
        fitted = (mixture.weights_, mixture.means_, np.sqrt(np.asarray(mixture.covariances_)))
        weights, means, scales = (torch.as_tensor(p) for p in fitted)
        loss = float(mixture_nats(validation, weights, means, scales, num_values).mean())
        progress(1 / (len(COMPONENTS) * len(REG_COVAR) + 5 * RESTARTS))
        return loss, (components, reg_covar, seed), (weights, means, scales)

    def by_loss(fit) -> float:
        return fit[0]

    # One thread: many small fits lose more by synchronizing threads than they gain (5 x on two busy cores).
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
        nats = mixture_nats(held_out, weights / len(best), means, scales, num_values).numpy()
        return Baseline(nats, x.shape[1], chosen | {"average": len(best)})

    return [mean_of(ranked[:n]) for n in averages]


def mixture_nats(items: Tensor, weights: Tensor, means: Tensor, scales: Tensor, num_values: int) -> Tensor:
    """−log P of ``items`` (N, D) int64 under the binned mixture: ``weights`` (K,), the others (K, D), float64."""
    edges = (2 * torch.arange(num_values + 1, dtype=torch.float64) - 1) / (num_values - 1) - 1
    edges[0], edges[-1] = -math.inf, math.inf
    parts = []
    for weight, mean, scale in zip(weights, means, scales, strict=True):
        gaussian = Gaussian(mean[:, None], 2 * scale[:, None].log())
        parts.append(weight.log() + _pick(gaussian.bin_log_prob((edges[:-1], edges[1:])), items))
    return -torch.stack(parts).logsumexp(0)


def _pick(table: Tensor, items: Tensor) -> Tensor:
    """Σ_d table[d, items[n, d]], (N,), for ``table`` (D, L) and ``items`` (N, D)."""
    return table.gather(1, items.T).sum(0)


def _integers(num_values: int, **parts) -> list[Tensor]:
    """Each part as (N, D) int64."""
    if num_values < 2:
        cause = f"items of {num_values} possible values carry no information"
        raise ConfigError("NUM_VALUES", "num_values", cause, "Give at least 2")
    tensors = {name: torch.as_tensor(part) for name, part in parts.items()}
    shape = next(iter(tensors.values())).shape[1:]
    for name, items in tensors.items():
        if items.shape[1:] != shape or items.ndim < 2 or items.numel() == 0:
            cause = f"items of shape {tuple(items.shape)} do not fit (N, {', '.join(map(str, shape))})"
            raise DataError("SHAPE", name, cause, "Give at least one item of the same shape in every part")
        whole = items.to(torch.int64)
        if not torch.equal(whole.to(items.dtype), items) or whole.min() < 0 or whole.max() >= num_values:
            cause = f"values must be whole numbers from 0 to {num_values - 1}"
            raise DataError("NUM_VALUES", name, cause, "Give the integers themselves, not values in model units")
        tensors[name] = whole.flatten(1)
    return list(tensors.values())
