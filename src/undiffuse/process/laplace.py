"""Laplace distributions of independent elements."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.process.gaussian import mirrored_edges


class Laplace(NamedTuple):
    """exp(−|x − mean|/scale)/(2 scale); ``log_scale`` broadcasts to ``mean``. Results are per element, in nats."""

    mean: Tensor
    log_scale: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) = −|x − mean| exp(−log_scale) − log_scale − log 2."""
        return -(x - self.mean).abs() * torch.exp(-self.log_scale) - self.log_scale - math.log(2)

    def bin_log_prob(self, edges: tuple[Tensor, Tensor]) -> Tensor:
        """log(F((high − mean)/scale) − F((low − mean)/scale)) in float64, F(u) = ½ e^u for u ≤ 0, 1 − ½ e^−u above.

        ``edges`` = (low, high), low < high, each of ``mean``'s shape, possibly infinite. A bin above the mean is
        mirrored: below it the logarithm is high − log 2 + log(1 − e^(low − high)), without cancellation.
        """
        low, high = mirrored_edges(edges, self.mean.double(), torch.exp(-self.log_scale.double()))
        below = torch.clamp(high, max=0) - math.log(2) + torch.log(-torch.expm1(low - high))
        around = torch.log(-0.5 * (torch.expm1(torch.clamp(low, max=0)) + torch.expm1(-torch.clamp(high, min=0))))
        return torch.where(high > 0, around, below)
