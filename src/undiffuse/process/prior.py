"""The model's prior p(x_T): N(0, I), or N(0, sigma_T² I) where the schedule does not preserve variance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from undiffuse.process.gaussian import Gaussian, forward_marginal
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.statistics import item_sum

Prior = Gaussian | Callable[[Tensor], Tensor]
"""A Gaussian, or a function of x_T (B, ...) that returns log p(x_T), (B,) nats."""


def prior_scale(level: NoiseLevel) -> float:
    """The standard deviation of the prior at ``level``: 1 where alpha² + sigma² = 1, otherwise sigma_T."""
    alpha, sigma = level.alpha.detach(), level.sigma.detach()
    preserving = abs(float(alpha**2 + sigma**2) - 1) < 1e-6
    return 1.0 if preserving else float(sigma)


def prior_sample(level: NoiseLevel, noise: Tensor) -> Tensor:
    """x_T = `prior_scale` noise, for standard normal ``noise`` (B, ...)."""
    return noise * prior_scale(level)


def prior_kl(x: Tensor, level: NoiseLevel, prior: Gaussian | None = None) -> Tensor:
    """KL(q(x_T given x) to p(x_T)) per element, nats; ``prior`` replaces the default p(x_T)."""
    return forward_marginal(x, level).kl(_default_prior(x, level) if prior is None else prior)


def prior_log_prob(x: Tensor, level: NoiseLevel, prior: Prior | None = None) -> Tensor:
    """log p(x_T), (B,) nats; ``prior`` replaces the default p(x_T)."""
    prior = _default_prior(x, level) if prior is None else prior
    return item_sum(prior.log_prob(x)) if isinstance(prior, Gaussian) else prior(x)


def _default_prior(x: Tensor, level: NoiseLevel) -> Gaussian:
    return Gaussian(torch.zeros_like(x), torch.full_like(x, 2 * math.log(prior_scale(level))))
