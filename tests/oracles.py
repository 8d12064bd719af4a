"""Exact denoisers, scores, densities and flows of Gaussian, mixture and empirical data, in float64.

Derived from the definition x_t = alpha x + sigma eps, without the formulas of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Prediction, predicts_at_data
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.schedule import Schedule


def gaussian_log_prob(x: Tensor, mean: Tensor | float, var: Tensor | float) -> Tensor:
    """log N(x; mean, var) per element."""
    return -0.5 * (torch.log(2 * math.pi * torch.as_tensor(var)) + (x - mean) ** 2 / var)


def gaussian_kl(mean: Tensor, var: Tensor, mean2: Tensor, var2: Tensor) -> Tensor:
    """KL(N(mean, var) to N(mean2, var2)) per element, nats."""
    return 0.5 * (torch.log(var2 / var) - 1 + (var + (mean - mean2) ** 2) / var2)


class Mixture:
    """Σ_k weights_k N(means_k, covs_k): ``means`` (K, *shape); ``covs`` of variances (K, *shape) or (K, D, D)."""

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor) -> None:
        means = torch.as_tensor(means, dtype=torch.float64)
        covs = torch.as_tensor(covs, dtype=torch.float64)
        self.weights = torch.as_tensor(weights, dtype=torch.float64) / torch.as_tensor(weights).sum()
        self.shape = means.shape[1:]
        self.means = means.flatten(1)
        D = self.means.shape[1]
        self.rotated = covs.shape != means.shape
        if not self.rotated:
            self.values, self.vectors = covs.flatten(1), torch.eye(D, dtype=torch.float64).expand(len(means), D, D)
        else:
            self.values, self.vectors = torch.linalg.eigh(covs)
            self.values = self.values.clamp(min=0)

    def _at(
        self, x_t: Tensor, level: NoiseLevel, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma (B or 1, 1, 1); residuals in each component's eigenbasis (B, K, D), their variances; log w_k."""
        alpha, sigma = (v.detach().double().cpu().reshape(-1, 1, 1) for v in (level.alpha, level.sigma))
        x = x_t.double().flatten(1)[:, None]
        residual = x - alpha * self.means
        if self.rotated:
            residual = torch.einsum("bkd,kde->bke", residual, self.vectors)
        variance = alpha**2 * self.values + sigma**2
        log_w = torch.log(self.weights) + gaussian_log_prob(residual, 0.0, variance).sum(-1)
        return alpha, sigma, residual, variance, log_w

    def log_density(self, x_t: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor:
        """log q(x_t), (B,) nats; for a `LabelledMixture` log q(x_t|label) with labels (B,)."""
        return torch.logsumexp(self._at(x_t, level, label)[-1], dim=1)

    def _mean(self, coordinates: Tensor, log_w: Tensor) -> Tensor:
        weights = torch.softmax(log_w, 1)
        if not self.rotated:
            return (weights[..., None] * coordinates).sum(1)
        return torch.einsum("bk,bke,kde->bd", weights, coordinates, self.vectors)

    def score(self, x_t: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Tensor:
        """∇ log q(x_t), of x_t's shape; for a `LabelledMixture` ∇ log q(x_t|label) with labels (B,)."""
        _, _, residual, variance, log_w = self._at(x_t, level, label)
        return self._mean(-residual / variance, log_w).reshape(x_t.shape)

    def predict(self, x_t: Tensor, level: NoiseLevel, label: Tensor | None = None) -> Prediction:
        """E[x|x_t] and E[eps|x_t], float64; for a `LabelledMixture` given the labels (B,)."""
        alpha, sigma, residual, variance, log_w = self._at(x_t, level, label)
        x = torch.softmax(log_w, 1) @ self.means + self._mean(alpha * self.values / variance * residual, log_w)
        eps = self._mean(sigma / variance * residual, log_w)
        return Prediction(x.reshape(x_t.shape), eps.reshape(x_t.shape))

    def denoiser(self, schedule: Schedule, var_interp: float | Tensor | None = None) -> ExactDenoiser:
        """The exact denoiser, which predicts the given ``var_interp``."""
        return ExactDenoiser(self, schedule, var_interp)

    def velocity(self, x_t: Tensor, level: NoiseLevel, alpha_rate: float, sigma_rate: float) -> Tensor:
        """dx_t/dt of the probability flow, alpha' x̂ + sigma' ε̂."""
        x, eps, _ = self.predict(x_t, level)
        return alpha_rate * x + sigma_rate * eps

    def cdf(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """P(X_t ≤ x_t) of one-dimensional data, of x_t's shape."""
        std = torch.sqrt(level.alpha**2 * self.values[:, 0] + level.sigma**2)
        z = (x_t[..., None] - level.alpha * self.means[:, 0]) / std
        return (self.weights * torch.special.ndtr(z)).sum(-1)

    def flow(self, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
        """The end of the probability flow from x_t, which preserves the quantile of one-dimensional data."""
        assert self.means.shape[1] == 1
        goal = self.cdf(x_t, t)
        reach = 50 * (s.alpha * (self.means.abs().max() + self.values.max().sqrt()) + s.sigma)
        low, high = -reach.expand(x_t.shape), reach.expand(x_t.shape)
        for _ in range(100):
            middle = (low + high) / 2
            below = self.cdf(middle, s) < goal
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def mean(self) -> Tensor:
        return (self.weights @ self.means).reshape(self.shape)

    def covariance(self) -> Tensor:
        """(D, D)."""
        within = torch.einsum("k,kde,ke,kfe->df", self.weights, self.vectors, self.values, self.vectors)
        centred = self.means - self.weights @ self.means
        return within + torch.einsum("k,kd,ke->de", self.weights, centred, centred)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, *shape) samples of the data."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        x = self.means[k] + torch.einsum("nde,ne->nd", self.vectors[k], self.values[k].sqrt() * z)
        return x.reshape(n, *self.shape)


class MixtureData(Mixture):
    """A mixture of Gaussians, diagonal or full."""


class LabelledMixture(Mixture):
    """A mixture whose component k has the label ``labels[k]``, a whole number from 0; −1 or None means any label.

    Its denoiser is conditioned on ``cond.label``. log q(x_t|label) + log P(label) = log q(x_t) +
    log p(label|x_t), so the classifier's gradient is score(x_t, level, label) − score(x_t, level).
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor, labels: Tensor) -> None:
        super().__init__(weights, means, covs)
        self.labels = torch.as_tensor(labels)
        self.label_probs = torch.stack(
            [self.weights[self.labels == c].sum() for c in range(int(self.labels.max()) + 1)]
        )

    def _at(
        self, x_t: Tensor, level: NoiseLevel, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *others, log_w = super()._at(x_t, level)
        if label is not None:
            label = label.cpu()[:, None]
            prob = torch.where(label < 0, 1.0, self.label_probs[label.clamp(min=0)])
            log_w = torch.where((label < 0) | (label == self.labels), log_w - prob.log(), -math.inf)
        return *others, log_w  # pyright: ignore[reportReturnType]

    def log_posterior(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """log p(label|x_t) of every label, (B, labels) nats, differentiable in x_t."""
        log_w = self._at(x_t, level)[-1]
        each = [torch.logsumexp(log_w[:, self.labels == c], 1) for c in range(len(self.label_probs))]
        return torch.log_softmax(torch.stack(each, 1), 1)

    def group(self, label: int) -> MixtureData:
        """The distribution of the data with this ``label``."""
        mine = self.labels == label
        covs = torch.einsum("kde,ke,kfe->kdf", self.vectors[mine], self.values[mine], self.vectors[mine])
        return MixtureData(self.weights[mine], self.means[mine].reshape(-1, *self.shape), covs)

    def sample_labelled(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples (n, *shape) of the data, and their labels (n,)."""
        label = torch.multinomial(self.label_probs, n, replacement=True, generator=generator)
        x = torch.empty(n, *self.shape, dtype=torch.float64)
        for c in range(len(self.label_probs)):
            x[label == c] = self.group(c).sample(int((label == c).sum()), generator)
        return x, label


class EmpiricalData(Mixture):
    """The ``points`` (n, *shape), equally likely: the data of a network that has memorized them."""

    def __init__(self, points: Tensor) -> None:
        points = torch.as_tensor(points, dtype=torch.float64)
        super().__init__(torch.ones(len(points)), points, torch.zeros_like(points))


class GaussianData(Mixture):
    """N(mean, cov): ``cov`` are variances of ``mean``'s shape, or a matrix (D, D)."""

    def __init__(self, mean: Tensor, cov: Tensor) -> None:
        self.m = torch.as_tensor(mean, dtype=torch.float64)
        self.cov = torch.as_tensor(cov, dtype=torch.float64)
        super().__init__(torch.ones(1), self.m[None], self.cov[None])

    def flow(self, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
        """alpha_s m + √(V_s/V_t)(x_t − alpha_t m) along each axis of the covariance, V = alpha² var + sigma²."""
        V_t, V_s = (v.alpha**2 * self.values[0] + v.sigma**2 for v in (t, s))
        axes, m = self.vectors[0], self.means[0]
        x_s = s.alpha * m + ((x_t.double().flatten(1) - t.alpha * m) @ axes * torch.sqrt(V_s / V_t)) @ axes.T
        return x_s.reshape(x_t.shape)

    def marginal_var(self, level: NoiseLevel) -> Tensor:
        """alpha² var + sigma² for independent dimensions, of the item's shape."""
        return level.alpha**2 * self.cov + level.sigma**2

    def reverse_log_var(self, t: NoiseLevel, s: NoiseLevel) -> Tensor:
        """log var(x_s|x_t) = log(V_s (V_t − c² V_s)/V_t), c = alpha_t/alpha_s, for independent dimensions."""
        if t.alpha.ndim:
            t, s = (
                level.broadcast_like(torch.empty(len(t.alpha), *self.shape, dtype=torch.float64)) for level in (t, s)
            )
        V_t, V_s, c = self.marginal_var(t), self.marginal_var(s), t.alpha / s.alpha
        return torch.log(V_s * (t.sigma**2 - c**2 * s.sigma**2) / V_t)

    def loss_minimum(self, level: NoiseLevel) -> Tensor:
        """min E‖eps − ε̂‖² per dimension, the mean of alpha² var/(alpha² var + sigma²)."""
        signal = level.alpha[..., None] ** 2 * self.values[0]
        return (signal / (signal + level.sigma[..., None] ** 2)).mean(-1)

    def entropy(self) -> Tensor:
        """The entropy of the data, nats per item."""
        return 0.5 * torch.log(2 * math.pi * math.e * self.values[0]).sum()


@dataclass(frozen=True)
class ExactDenoiser:
    data: Mixture
    schedule: Schedule
    var_interp: float | Tensor | None = None
    predicts_at_data: bool = True

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        label = None if cond is None else cond.label
        x, eps, _ = (None if v is None else v.to(x_t.dtype) for v in self.data.predict(x_t, level, label))
        var_interp = (
            None if self.var_interp is None else torch.as_tensor(self.var_interp, dtype=x_t.dtype).expand(x_t.shape)
        )
        return Prediction(x, eps, var_interp)


@dataclass
class Spy:
    """A denoiser that records the arguments of its calls."""

    denoise: Callable[..., Prediction]

    def __post_init__(self) -> None:
        self.seen: list[tuple] = []

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    @property
    def predicts_at_data(self) -> bool:
        return predicts_at_data(self.denoise)

    def __call__(self, x_t, level, cond=None, next_level=None) -> Prediction:
        self.seen.append((x_t, level, cond, next_level))
        return self.denoise(x_t, level, cond, next_level)
