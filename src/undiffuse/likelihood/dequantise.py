"""From discrete values to densities: −log P(v) ≤ E[log q − log p(z)], for bins of any width.

A dequantiser draws z near x from q(z given x) and returns with it log q(z given x) − log P(v given z), where
P(v given z) is the probability that the model reads v from z: 1 within v's bin, or that of a noisy decoder.
z is in x's units. The outermost bins of a codec reach to infinity; what draws z uniformly or from a learned
law within the bin takes them as wide on the outside as they are on the inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from undiffuse.errors import ConfigError
from undiffuse.likelihood.discrete import Edges, flat_sum
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.level import NoiseLevel, like
from undiffuse.randomness import Noise

EdgesOf = Callable[[Tensor], Edges | None]
"""A codec's ``edges``: the interval of x (B, ...) that stands for each value."""


class Dequantiser(Protocol):
    def __call__(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        """(z (B, ...), log q(z given x) − log P(v given z) (B,)), float64, from ``x`` and one draw of ``noise``."""
        ...


def _bins(edges: EdgesOf, x: Tensor) -> Edges:
    """(low, high) as the codec has them, float64."""
    found = edges(x)
    if found is None:
        cause, fix = "these data are continuous: they have no bins", "Leave the dequantiser out"
        raise ConfigError("DEQUANTISE", "dequantise", cause, fix)
    low, high = (edge.to(x.device).double() for edge in found)
    return low, high


def finite_bins(edges: EdgesOf, x: Tensor) -> Edges:
    """(low, high) float64, an infinite edge moved to the mirror image about x of the other one."""
    low, high = _bins(edges, x)
    return torch.where(low.isinf(), 2 * x - high, low), torch.where(high.isinf(), 2 * x - low, high)


def _draw(x: Tensor, noise: Noise | None) -> Tensor:
    if noise is None:
        raise ConfigError("DEQUANTISE", "noise", "a dequantiser draws random numbers", "Pass noise, one draw an item")
    return noise(1)[0].to(x.device).double()


@dataclass(frozen=True)
class Uniform:
    """q(z given x) = 1/width over the bin: log q = −Σ log width [Uria13 §3.2; Theis16 §3.1]."""

    edges: EdgesOf

    def __call__(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        low, high = finite_bins(self.edges, x)
        z = low + (high - low) * torch.special.ndtr(_draw(x, noise))
        return z, flat_sum(-torch.log(high - low))


@dataclass(frozen=True)
class OwnNoise:
    """q(z given x) = N(x, sigma_0²/alpha_0²), the process' own noise at its clean end ``level``, in x's units.

    P(v given z) is N(z, sigma_0²/alpha_0²) over v's bin, the decoder of `vlb`; for a model trained up to this level.
    ``decode`` is a better one where the noise is wider than the bins, such as a model's own last step: p(x) from z.
    """

    edges: EdgesOf
    level: NoiseLevel
    decode: Callable[[Tensor], Gaussian] | None = None

    def __call__(self, x: Tensor, noise: Noise | None) -> tuple[Tensor, Tensor]:
        data = x.double()
        log_var = like(2 * torch.log(self.level.sigma / self.level.alpha), data)
        q = Gaussian(data, log_var)
        z = q.sample(_draw(x, noise))
        reader = Gaussian(z, log_var) if self.decode is None else self.decode(z)
        return z, flat_sum(q.log_prob(z) - reader.bin_log_prob(_bins(self.edges, x)))


class Variational(nn.Module):
    """q(z given x) with z = low + width sigmoid(y), y ~ N(mean, std²): a learned law within the bin [Ho19 §3.1].

    log q = Σ log N(y; mean, std²) − log width − log sigmoid(y) − log sigmoid(−y). ``network`` maps x (B, C, ...) to
    (B, 2C, ...), mean and log std (`Constant` does so without looking). Both z and log q have gradients.
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
        return low + (high - low) * torch.sigmoid(y), flat_sum(log_q)


class Constant(nn.Module):
    """The mean and log std of each channel as (B, 2C, ...), the same for every item and place.

    They begin at 0 and log 1.75, next to which no normal y has a sigmoid that is closer to uniform.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        log_std = torch.full((channels,), math.log(1.75), dtype=torch.float64)
        self.values = nn.Parameter(torch.cat([torch.zeros_like(log_std), log_std]))

    def forward(self, x: Tensor) -> Tensor:
        return self.values.view(1, -1, *[1] * (x.ndim - 2)).expand(len(x), -1, *x.shape[2:])
