"""What a likelihood is reported as."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NLL(NamedTuple):
    """−log p(x) of each item, or a bound on it, in nats, with its parts; float64.

    ``prior``, ``steps`` and ``decoder`` are (B,); ``stderr`` () is the standard error of the mean
    total over the items (NaN for one item); ``calls`` the network calls an item; ``per_step`` (B, N) the terms
    of the chain's steps from data to noise, NaN where a step was not drawn.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor
    stderr: Tensor
    calls: int
    per_step: Tensor

    @property
    def total(self) -> Tensor:
        """prior + steps + decoder, (B,) nats."""
        return self.prior + self.steps + self.decoder

    def cpu(self) -> NLL:
        """The same on the CPU."""
        prior, steps, decoder, stderr = (part.cpu() for part in self[:4])
        return NLL(prior, steps, decoder, stderr, self.calls, self.per_step.cpu())

    def bits_per_dim(self, dims: int) -> Tensor:
        """The total in bits per dimension, (B,), for items of ``dims`` numbers."""
        return self.total / (dims * math.log(2))


def nll(prior: Tensor, steps: Tensor, decoder: Tensor, calls: int, per_step: Tensor) -> NLL:
    """An `NLL` with its standard error filled in."""
    total = prior + steps + decoder
    stderr = total.std() / math.sqrt(len(total)) if len(total) > 1 else total.new_tensor(math.nan)
    return NLL(prior, steps, decoder, stderr, calls, per_step)


def concatenate(parts: Sequence[NLL]) -> NLL:
    """The items of several batches as one result; ``calls`` is their mean, rounded up."""
    prior, steps, decoder = (torch.cat([getattr(p, f) for p in parts]) for f in ("prior", "steps", "decoder"))
    calls = math.ceil(sum(p.calls * len(p.prior) for p in parts) / len(prior))
    return nll(prior, steps, decoder, calls, torch.cat([p.per_step for p in parts]))
