"""The result of a likelihood or bound: nats per item, with the parts that add up to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.process.statistics import mean_with_stderr


class NLL(NamedTuple):
    """−log p(x) of each item, or an upper bound on it, in nats, with its parts; float64.

    ``prior``, ``diffusion_nats`` and ``decoder`` are (B,); ``stderr`` () is the standard error of the mean total
    over the items (NaN for one item); ``calls`` is the number of network calls per item; ``per_step`` (B, N) holds
    the terms of the N steps, from data to noise, NaN where a step was not evaluated.
    """

    prior: Tensor
    diffusion_nats: Tensor
    decoder: Tensor
    stderr: Tensor
    calls: int
    per_step: Tensor

    @property
    def total(self) -> Tensor:
        """prior + diffusion_nats + decoder, (B,) nats."""
        return self.prior + self.diffusion_nats + self.decoder

    def cpu(self) -> NLL:
        """The same result on the CPU."""
        prior, diffusion_nats, decoder, stderr = (part.cpu() for part in self[:4])
        return NLL(prior, diffusion_nats, decoder, stderr, self.calls, self.per_step.cpu())

    def bits_per_dim(self, dims: int) -> Tensor:
        """total/(dims ln 2): bits per dimension, (B,), for items of ``dims`` dimensions."""
        return self.total / (dims * math.log(2))


def make_nll(prior: Tensor, diffusion_nats: Tensor, decoder: Tensor, calls: int, per_step: Tensor) -> NLL:
    """An `NLL` whose ``stderr`` is computed from the totals."""
    total = prior + diffusion_nats + decoder
    stderr = total.new_tensor(mean_with_stderr(total)[1])
    return NLL(prior, diffusion_nats, decoder, stderr, calls, per_step)


def concatenate(parts: Sequence[NLL]) -> NLL:
    """The items of several batches as one result; ``calls`` is the mean over the items, rounded up."""
    prior, diffusion_nats, decoder = (
        torch.cat([getattr(part, field) for part in parts]) for field in ("prior", "diffusion_nats", "decoder")
    )
    calls = math.ceil(sum(part.calls * len(part.prior) for part in parts) / len(prior))
    return make_nll(prior, diffusion_nats, decoder, calls, torch.cat([part.per_step for part in parts]))
