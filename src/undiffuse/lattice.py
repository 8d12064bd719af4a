"""A network that knows that data come in levels: it says how likely each is, and Bayes' rule says what x is."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.conditioning import Condition

FEATURES = 24
"""Numbers that the network says of each value; `Lattice` makes the logits of all levels of them."""
MANY = 1024
"""Levels of which a network may say one by one how likely they are."""
CELLS = (2**27, 2**18)
"""Numbers times levels that are computed at a time: on a processor, what fits into its cache."""


class Lattice(nn.Module):
    """x̂ = Σ_k v_k softmax_k(logits_k − (x_t − alpha v_k)²/(2 sigma²)), of x_t's shape, float32 at least.

    The mean of x given x_t where x is one of the ``levels`` values v_k = −1 … 1 and the ``network`` says by its
    logits how likely each was before x_t was seen (what it gathers of the value's neighbours). Near the clean
    end it rounds, as the exact mean does, without having to learn that. The network says ``FEATURES`` numbers a
    channel, from which the logits are linear; channels beyond those (a learned variance) come out after x̂.
    """

    def __init__(self, network: nn.Module, channels: int, levels: int) -> None:
        super().__init__()
        self.network, self.channels, self.levels = network, channels, levels
        k = torch.arange(levels)
        waves = torch.cos(math.pi * torch.outer(torch.arange(FEATURES - 2), (k + 0.5) / levels))
        ends = torch.stack([k == 0, k == levels - 1]).float()
        self.weight = nn.Parameter(torch.cat([waves, ends]).repeat(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, levels))

    @torch.no_grad()
    def start_from(self, counts: Tensor) -> None:
        """Before any training, gives each level its share in the data, from their ``counts`` (channels, levels)."""
        share = (counts.double() + 1) / (counts.double() + 1).sum(1, keepdim=True)
        self.bias.copy_(share.log()[:, None])

    def forward(
        self, scaled: Tensor, time: Tensor, cond: Condition | None, x_t: Tensor, alpha: Tensor, sigma: Tensor
    ) -> Tensor:
        """(x̂, and what else the network says) from its own inputs, and x_t (B, C, ...) with its level's scales."""
        y = self.network(scaled, time, cond).to(scaled.dtype)
        said, rest = y[:, : self.channels * FEATURES], y[:, self.channels * FEATURES :]
        said = said.reshape(len(x_t), self.channels, FEATURES, -1).transpose(2, 3)
        places = x_t.to(said.dtype).reshape(len(x_t), self.channels, -1, 1)
        alpha, sigma = (scale.reshape(-1, 1, 1, 1).expand(len(x_t), 1, 1, 1) for scale in (alpha, sigma))
        inputs = [said, places, alpha, sigma]
        size = max(1, CELLS[x_t.device.type == "cpu"] // (places[0].numel() * self.levels))
        with torch.autocast(x_t.device.type, enabled=False):
            x = torch.cat([self._mean(*p) for p in zip(*(part.split(size) for part in inputs), strict=True)])
        return torch.cat([x.reshape(x_t.shape), rest], 1)

    def _mean(self, said: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        v = (2 * torch.arange(self.levels, device=said.device).to(said) - (self.levels - 1)) / (self.levels - 1)
        logits = F.pad(said, (0, 1), value=1.0) @ torch.cat([self.weight, self.bias], 1).to(said)
        off = x_t / sigma - alpha / sigma * v
        return torch.softmax(torch.addcmul(logits, off, off, value=-0.5), -1) @ v
