"""How the two scales of a schedule change with time, which the log-SNR alone does not say."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.process.level import NoiseLevel
from undiffuse.process.schedule import Schedule


def rates(schedule: Schedule, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """(alpha', sigma') = ½ log_snr' alpha sigma/(q sigma + p alpha) (q, −p), float64 of ``level``'s shape.

    It solves alpha'/alpha − sigma'/sigma = ½ log_snr' together with p alpha' + q sigma' = 0, by which the two scales
    are bound: (p, q) is (alpha, sigma) where alpha² + sigma² is 1, (1, 1) where alpha + sigma is, and (1, 0) where
    alpha is. Raises `ConfigError` for a schedule that keeps none of the three.
    """
    alpha, sigma = level.alpha, level.sigma
    p, q = _bond(schedule, level)
    common = 0.5 * schedule.log_snr_rate(level.t) * alpha * sigma / (q * sigma + p * alpha)
    return q * common, -p * common


def _bond(schedule: Schedule, level: NoiseLevel) -> tuple[Tensor, Tensor]:
    """(p, q) of `rates`, from which sum is 1 in the middle of the schedule."""
    middle = schedule(0.5)
    alpha, sigma = float(middle.alpha.detach()), float(middle.sigma.detach())
    one, none = torch.ones_like(level.alpha), torch.zeros_like(level.alpha)
    for total, bond in (
        (alpha**2 + sigma**2, (level.alpha, level.sigma)),
        (alpha + sigma, (one, one)),
        (alpha, (one, none)),
    ):
        if abs(total - 1) < 1e-9:
            return bond
    cause = "it needs dalpha/dt, and the schedule keeps neither alpha² + sigma², nor alpha + sigma, nor alpha at 1"
    raise ConfigError("SOLVER", "a solver in t", cause, "Use a solver in another variable, such as 'heun'")
