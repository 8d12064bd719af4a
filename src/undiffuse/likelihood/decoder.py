"""Decoders p(x given z_0): the last term of a bound, or of a flow's likelihood, at a clean end of finite log-SNR."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.denoiser import NetworkDenoiser
from undiffuse.errors import ConfigError
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.networks.condition import Condition
from undiffuse.process.gaussian import Gaussian, diffuse
from undiffuse.process.noise_level import NoiseLevel, broadcast_like

Edges = tuple[Tensor, Tensor]
"""(low, high) of the bin of each value of x, each (B, ...), possibly infinite."""
EdgesOf = Callable[[Tensor], Edges | None]
"""``edges`` of a data transform: the bin of each value of x (B, ...), or None for continuous data."""

TAIL = 40.0
"""The sum of a `ValueSoftmax` lacks at most e^−40 = 4e-18 of itself; float64 rounds it to 1.1e-16."""
MAX_LOG_SNR = 700.0
"""exp of larger numbers overflows; there a value is certain anyway."""
CHUNK_TERMS = 2**20
"""Elements times values that a `ValueSoftmax` holds at once."""


class Decoder(Protocol):
    """log p(x given z), nats per element, float64, for ``x`` (B, ...) and ``z`` of its shape, float64, at ``level`` ().

    ``x`` has the dtype that the network gets. ``calls`` is the number of network calls.
    """

    @property
    def calls(self) -> int: ...
    def __call__(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor: ...


class Density:
    """log N(x; z/alpha, sigma²/alpha²), the decoder of continuous data."""

    calls = 0

    def __call__(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        return clean_gaussian(z, level).log_prob(x.double())


@dataclass(frozen=True)
class ValueSoftmax:
    """log softmax_k(−(z − alpha v_k)²/(2 sigma²)) at the value of x: p(v given z) ∝ N(z; alpha v, sigma²) [VDM21 §3.5].

    v_k are the values of ``transform`` in x's units, a distance Δ apart. Where they are more than the noise reaches,
    the sum is over the W values on either side of the one nearest to z, W² ≥ 2 `TAIL` (sigma/(alpha Δ))². The term j
    places from the nearest is at most e^−TAIL times that j − W places from it on the same side (the exponents differ by
    at least W (W + 1) Δ² alpha²/(2 sigma²)), so what is left out is at most e^−TAIL/(1 − e^−TAIL) of the sum.
    """

    transform: IntegerLevels
    calls = 0

    def __call__(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        count = self.transform.num_values
        precision = broadcast_like(torch.exp(level.log_snr.clamp(max=MAX_LOG_SNR)), z).expand_as(z)
        position = z / broadcast_like(level.alpha, z)
        spread = math.exp(min(-0.5 * float(level.log_snr.detach()), MAX_LOG_SNR))  # sigma/alpha
        reach = math.ceil(min(math.sqrt(2 * TAIL) * spread * (count - 1) / 2, count))
        terms = min(2 * reach + 1, count)
        first = (self.transform.to_data(position).long() - reach).clamp(0, count - terms)
        own = self.transform.to_model(self.transform.to_data(x).long(), torch.float64)
        size = max(1, CHUNK_TERMS // terms)
        parts = (part.flatten().split(size) for part in (own, position, precision, first))
        return -torch.cat([self._log_sum(terms, *chunk) for chunk in zip(*parts, strict=True)]).reshape(z.shape)

    def _log_sum(self, terms: int, own: Tensor, position: Tensor, precision: Tensor, first: Tensor) -> Tensor:
        """log Σ_k exp(precision ((position − own)² − (position − v_k)²)/2) over ``terms`` values from the ``first``."""
        k = first[:, None] + torch.arange(terms, device=first.device)
        v, own = self.transform.to_model(k, torch.float64), own[:, None]
        product = (v - own) * (2 * position[:, None] - own - v)  # the difference of the squares, without their size
        return torch.logsumexp(0.5 * precision[:, None] * product, 1)


@dataclass(frozen=True)
class CategoricalDecoder:
    """log softmax_k(logits_k − (z − alpha v_k)²/(2 sigma²)) at the value of x: the output of a `CategoricalHead`.

    The logits of the network at z are the prior that `ValueSoftmax` leaves uniform.
    """

    denoise: NetworkDenoiser
    transform: IntegerLevels
    cond: Condition | None = None
    calls = 1

    def __call__(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        return self.denoise.value_log_prob(self.transform.to_data(x).long(), z, level, self.cond, x.dtype)


@dataclass(frozen=True)
class LastStep:
    """log p(x given z) of a chain's last step, from its first ``level`` above the data: the mass of the bin of x."""

    chain: ReverseChain
    edges: EdgesOf
    calls = 1

    def __call__(self, x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
        return -decoder_nll(self.chain.step(z, level, self.chain.noise_levels[-1], x.dtype), x.double(), self.edges(x))


def clean_gaussian(z: Tensor, level: NoiseLevel) -> Gaussian:
    """N(z/alpha, sigma²/alpha²), proportional to N(z; alpha x, sigma²) as a function of x."""
    return Gaussian(z / broadcast_like(level.alpha, z), broadcast_like(-level.log_snr, z))


def decoder_nll(model: Gaussian, x: Tensor, edges: Edges | None = None) -> Tensor:
    """−log p(x), or −log of the probability of x's bin if there are ``edges``: nats per element."""
    return -(model.log_prob(x) if edges is None else model.bin_log_prob(edges))


def clean_nll(x: Tensor, clean: NoiseLevel, eps: Tensor, decode: Decoder | None = None) -> Tensor:
    """−log p(x given z) at z = alpha x + sigma eps, the level ``clean``: nats per element, float64.

    ``decode`` is by default that of continuous data, `Density`.
    """
    return -(decode or Density())(x, diffuse(x.double(), clean, eps.double()), clean)


def clean_end_decoder(decode: Decoder | None, edges: Edges | None) -> Decoder:
    """``decode``, by default `Density`. Raises `ConfigError` for discrete data, which have ``edges``, without one."""
    if decode is None and edges is not None:
        cause = "discrete data need a decoder where the chain stays finite, as bins alone do not say which values exist"
        raise ConfigError("DECODER", "decode", cause, "Pass one, such as ValueSoftmax(transform)")
    return decode or Density()
