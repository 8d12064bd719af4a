"""Densities of discrete values: −log P(v) ≤ E[log q(z given x) − log P(v given z) − log p(z)], for any bin widths.

A dequantizer draws z near x from q(z given x) and returns z and log q(z given x) − log P(v given z), where
P(v given z) is the probability that the value v is decoded from z: 1 within v's bin, or that of a noisy decoder.
z has x's units. The outermost bins of a data transform are infinite; dequantizers that stay within the bin (uniform,
truncated, variational) replace the infinite edge by the mirror image of the finite one about x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from undiffuse.errors import ConfigError
from undiffuse.likelihood.decoder import Decoder, Edges, EdgesOf
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.seeded_noise import Noise
from undiffuse.process.statistics import item_sum


class Dequantizer(Protocol):
    def __call__(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """(z (B, ...), log q(z given x) − log P(v given z) (B,)), float64, with one draw of ``noise``."""
        ...


def dequantize(x: Tensor, noise: Noise | None, dequantizer: Dequantizer | None) -> tuple[Tensor, Tensor]:
    """What ``dequantizer`` returns, on one device; (x, 0) without one, for continuous data."""
    if dequantizer is None:
        return x.double(), x.new_zeros(len(x), dtype=torch.float64)
    z, log_q = dequantizer(x, noise)
    return z, log_q.to(z)


def finite_bins(edges: EdgesOf, x: Tensor) -> Edges:
    """(low, high), float64; an infinite edge is replaced by the mirror image of the other one about x."""
    bins = edges(x)
    if bins is None:
        cause, fix = "continuous data have no bins", "Leave the dequantizer out"
        raise ConfigError("DEQUANTIZE", "dequantizer", cause, fix)
    low, high = (edge.to(x.device).double() for edge in bins)
    return torch.where(low.isinf(), 2 * x - high, low), torch.where(high.isinf(), 2 * x - low, high)


def _draw(x: Tensor, noise: Noise | None) -> Tensor:
    if noise is None:
        raise ConfigError("DEQUANTIZE", "noise", "a dequantizer needs random numbers", "Pass noise, one draw per item")
    return noise(1)[0].to(x.device).double()


@dataclass(frozen=True)
class UniformDequantizer:
    """q(z given x) = 1/width on the bin: log q = −Σ log width [Uria13 §3.2; Theis16 §3.1]."""

    edges: EdgesOf

    def __call__(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        low, high = finite_bins(self.edges, x)
        z = low + (high - low) * torch.special.ndtr(_draw(x, noise))
        return z, item_sum(-torch.log(high - low))


@dataclass(frozen=True)
class ForwardNoise:
    """q(z given x) = N(x, sigma_0²/alpha_0²): the forward process at its clean end ``level``, in x's units.

    For a model that was trained down to this level. ``decode`` gives P(v given z), the decoder of the bounds.
    """

    level: NoiseLevel
    decode: Decoder

    def __call__(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        data = x.double()
        log_var = broadcast_like(2 * torch.log(self.level.sigma / self.level.alpha), data)
        q = Gaussian(data, log_var)
        z = q.sample(_draw(x, noise))
        return z, item_sum(q.log_prob(z) - self.decode(x, broadcast_like(self.level.alpha, z) * z, self.level))


@dataclass(frozen=True)
class TruncatedNormal:
    """q(z given x) = N(x, s²) within the bin of x, s = sigma_0/alpha_0 of the clean end ``level`` [Zheng23 §4.1].

    log q = Σ log N(z; x, s²) − log(Φ((high − x)/s) − Φ((low − x)/s)).
    """

    edges: EdgesOf
    level: NoiseLevel

    def __call__(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        (low, high), data = finite_bins(self.edges, x), x.double()
        std = broadcast_like(self.level.sigma / self.level.alpha, data)
        below, above = torch.special.ndtr((low - data) / std), torch.special.ndtr((high - data) / std)
        z = data + std * torch.special.ndtri(below + (above - below) * torch.special.ndtr(_draw(x, noise)))
        log_q = Gaussian(data, 2 * torch.log(std)).log_prob(z) - torch.log(above - below)
        return z, item_sum(log_q)


class VariationalDequantizer(nn.Module):
    """z = low + width sigmoid(y), y ~ N(mean, std²): a learned distribution within the bin [Ho19 §3.1].

    log q = Σ log N(y; mean, std²) − log width − log sigmoid(y) − log sigmoid(−y). ``network`` maps x (B, C, ...) to
    (B, 2C, ...), mean and log std (`ConstantParameters` ignores x). z and log q are differentiable.
    """

    def __init__(self, edges: EdgesOf, network: nn.Module) -> None:
        super().__init__()
        self.edges, self.network = edges, network

    def forward(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        low, high = finite_bins(self.edges, x)
        mean, log_std = self.network(x).double().chunk(2, dim=1)
        q = Gaussian(mean, 2 * log_std)
        y = q.sample(_draw(x, noise))
        log_q = q.log_prob(y) - torch.log(high - low) - logsigmoid(y) - logsigmoid(-y)
        return low + (high - low) * torch.sigmoid(y), item_sum(log_q)


class ConstantParameters(nn.Module):
    """Mean and log std of each channel as (B, 2C, ...), the same for every item and position.

    Initial values are 0 and log 1.75, the normal y whose sigmoid is closest to uniform.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        log_std = torch.full((channels,), math.log(1.75), dtype=torch.float64)
        self.values = nn.Parameter(torch.cat([torch.zeros_like(log_std), log_std]))

    def forward(self, x: Tensor) -> Tensor:
        return self.values.view(1, -1, *[1] * (x.ndim - 2)).expand(len(x), -1, *x.shape[2:])
