"""Classifiers from networks: logits (B, labels), whose softmax is p(label|x)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.errors import ConfigError
from undiffuse.networks.attention import attend
from undiffuse.networks.condition import Condition
from undiffuse.networks.norm import NORMS
from undiffuse.networks.protocol import declared_method

POOLINGS = ("mean", "attention")
"""How a classifier makes one vector of the features of all positions."""
MAX_POSITIONS = 1 << 16
"""The most positions that attention pooling learns an embedding of."""


class MeanPool(nn.Module):
    """(B, width): h (B, width, ...) averaged over positions."""

    def forward(self, h: Tensor) -> Tensor:
        return h.flatten(2).mean(2) if h.ndim > 2 else h


class AttentionPool(nn.Module):
    """(B, width) attend(q, k, v), q linear in the mean of h's positions, k and v in the mean and in every position.

    h is (B, width, *size) of one to three dimensions. A learned embedding of each place is added to the positions and
    to their mean before [Radford21 §2.4, Dhariwal21 §4 in its code].
    """

    def __init__(self, width: int, size: Sequence[int], heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(1 + math.prod(size), width) / math.sqrt(width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor) -> Tensor:
        h = h.flatten(2).transpose(1, 2)
        h = torch.cat([h.mean(1, keepdim=True), h], 1) + self.position
        q = self.q(h[:, :1]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(h).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return attend(q, k, v).flatten(1)


class ClassifierHead(nn.Module):
    """W pool(SiLU(norm(h))) + b, (B, labels) in x's dtype, with h the features of ``encoder``.

    ``pool`` is `MeanPool` by default, or `AttentionPool` [Dhariwal21 §4]. Zero at initialization.
    """

    def __init__(self, encoder: nn.Module, labels: int, pool: nn.Module | None = None) -> None:
        super().__init__()
        width: int = encoder.feature_channels  # type: ignore[assignment]
        self.norm = NORMS[getattr(encoder, "feature_norm", "group")](width)
        self.fc = nn.Linear(width, labels)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.pool = MeanPool() if pool is None else pool
        self.encoder = encoder

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        h = F.silu(self.norm(self.encoder(x, time, cond)))
        return self.fc(self.pool(h)).to(x.dtype)


class PooledOutput(nn.Module):
    """(B, labels): the output (B, labels, ...) of ``network`` averaged over positions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.pool = network, MeanPool()

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        return self.pool(self.network(x, time, cond))


def make_classifier(
    network: nn.Module, labels: int, pooling: str = "mean", item_size: Sequence[int] | None = None
) -> nn.Module:
    """A classifier from a network of ``labels`` output channels: on its ``encoder()`` if it declares one.

    ``pooling`` is one of `POOLINGS`; that by attention is for items of ``item_size`` alone (without the channels), and
    for encoders that declare their ``feature_size``. Raises `ConfigError`.
    """
    if pooling not in POOLINGS:
        raise ConfigError("CONFIG", f"pooling = {pooling!r}", "unknown", f"Use {' or '.join(map(repr, POOLINGS))}")
    encode = declared_method(network, "encoder")
    encoder = None if encode is None else encode()
    if pooling == "mean":
        return PooledOutput(network) if encoder is None else ClassifierHead(encoder, labels)
    feature_size = None if encoder is None else declared_method(encoder, "feature_size")
    if encoder is None or feature_size is None or not item_size:
        cause = "this network declares no size of the features of an item"
        raise ConfigError("CONFIG", "pooling = 'attention'", cause, "Use a unet, or the pooling 'mean'")
    size = feature_size(item_size)
    if math.prod(size) > MAX_POSITIONS:
        cause = f"the features have {math.prod(size):,} positions, more than {MAX_POSITIONS:,}"
        raise ConfigError("CONFIG", "pooling = 'attention'", cause, "Use more levels, or the pooling 'mean'")
    pool = AttentionPool(encoder.feature_channels, size, getattr(encoder, "feature_heads", 1))
    return ClassifierHead(encoder, labels, pool)
