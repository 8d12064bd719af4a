"""The result of a likelihood or bound: nats per item, with the parts that add up to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.process.statistics import mean_with_stderr


class NLL(NamedTuple):
    """−log p(x) of each item, or an upper bound on it, in nats, with its parts; float64.

    ``prior``, ``diffusion_nats`` and ``decoder`` are (B,); ``stderr`` () is the standard error of the mean total
    over the items (NaN for one item); ``calls`` is the number of network calls per item; ``per_step`` (B, N) holds
    the terms of the N steps, from data to noise, NaN where a step was not evaluated. ``extra`` are further parts by
    name, (B,) each, such as those of an autoencoder.
    """

    prior: Tensor
    diffusion_nats: Tensor
    decoder: Tensor
    stderr: Tensor
    calls: int
    per_step: Tensor
    extra: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def total(self) -> Tensor:
        """prior + diffusion_nats + decoder + Σ extra, (B,) nats."""
        return sum(self.extra.values(), self.prior + self.diffusion_nats + self.decoder)

    def cpu(self) -> NLL:
        """The same result on the CPU."""
        prior, diffusion_nats, decoder, stderr = (part.cpu() for part in self[:4])
        extra = {name: part.cpu() for name, part in self.extra.items()}
        return NLL(prior, diffusion_nats, decoder, stderr, self.calls, self.per_step.cpu(), extra)

    def with_parts(self, extra: Mapping[str, Tensor]) -> NLL:
        """The same result with further parts, and the ``stderr`` of the new total."""
        parts = {**self.extra, **extra}
        return make_nll(self.prior, self.diffusion_nats, self.decoder, self.calls, self.per_step, parts)

    def bits_per_dim(self, dims: int) -> Tensor:
        """total/(dims ln 2): bits per dimension, (B,), for items of ``dims`` dimensions."""
        return self.total / (dims * math.log(2))


def make_nll(
    prior: Tensor,
    diffusion_nats: Tensor,
    decoder: Tensor,
    calls: int,
    per_step: Tensor,
    extra: Mapping[str, Tensor] = MappingProxyType({}),
) -> NLL:
    """An `NLL` whose ``stderr`` is computed from the totals, with ``extra`` in the order of the names."""
    extra = {name: extra[name] for name in sorted(extra)}
    nll = NLL(prior, diffusion_nats, decoder, prior.new_tensor(math.nan), calls, per_step, extra)
    return nll._replace(stderr=prior.new_tensor(mean_with_stderr(nll.total)[1]))


def concatenate(parts: Sequence[NLL]) -> NLL:
    """The items of several batches as one result; ``calls`` is the mean over the items, rounded up."""
    prior, diffusion_nats, decoder = (
        torch.cat([getattr(part, field) for part in parts]) for field in ("prior", "diffusion_nats", "decoder")
    )
    calls = math.ceil(sum(part.calls * len(part.prior) for part in parts) / len(prior))
    extra = {name: torch.cat([part.extra[name] for part in parts]) for name in parts[0].extra}
    return make_nll(prior, diffusion_nats, decoder, calls, torch.cat([part.per_step for part in parts]), extra)
