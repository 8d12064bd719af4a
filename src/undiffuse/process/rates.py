"""Derivatives of alpha and sigma with respect to time, which the log-SNR alone does not determine."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.schedule import Schedule


def scale_derivatives(schedule: Schedule, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """(alpha', sigma') = ½ log_snr' alpha sigma/(q sigma + p alpha) (q, −p), float64 of ``level``'s shape.

    The solution of alpha'/alpha − sigma'/sigma = ½ log_snr' and p alpha' + q sigma' = 0, the derivative of what the
    schedule keeps constant: (p, q) = (alpha, sigma) for alpha² + sigma² = 1, (1, 1) for alpha + sigma = 1 and (1, 0)
    for alpha = 1. Raises `ConfigError` for a schedule that keeps none of the three constant.
    """
    alpha, sigma = level.alpha, level.sigma
    p, q = _constraint(schedule, level)
    common = 0.5 * schedule.log_snr_rate(level.t) * alpha * sigma / (q * sigma + p * alpha)
    return q * common, -p * common


def _constraint(schedule: Schedule, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """(p, q) of `scale_derivatives`, by which of the three expressions is 1 at t = ½."""
    middle = schedule(0.5)
    alpha, sigma = float(middle.alpha.detach()), float(middle.sigma.detach())
    one, zero = torch.ones_like(level.alpha), torch.zeros_like(level.alpha)
    for total, constraint in (
        (alpha**2 + sigma**2, (level.alpha, level.sigma)),
        (alpha + sigma, (one, one)),
        (alpha, (one, zero)),
    ):
        if abs(total - 1) < 1e-9:
            return constraint
    cause = "it needs dalpha/dt, but the schedule keeps none of alpha² + sigma², alpha + sigma and alpha at 1"
    raise ConfigError("SOLVER", "a solver in t", cause, "Use a solver in another variable, such as 'heun'")
