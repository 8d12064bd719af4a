"""A network for vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.conditioning import Condition
from undiffuse.networks.attention import CrossAttention, Tokens
from undiffuse.networks.check import DEEPEST, require, share, whole
from undiffuse.networks.embedding import Embedding


class Layer(nn.Module):
    """h + W₂ dropout(SiLU(W₁ (norm(h) (1 + scale) + shift))), scale and shift linear in what is told."""

    def __init__(self, width: int, told: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.told = nn.Linear(told, 2 * width)
        self.rise = nn.Linear(width, 2 * width)
        self.dropout = nn.Dropout(dropout)
        self.fall = nn.Linear(2 * width, width)
        nn.init.zeros_(self.fall.weight)
        nn.init.zeros_(self.fall.bias)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.told(told).chunk(2, 1)
        y = torch.addcmul(shift, self.norm(h).to(shift.dtype), 1 + scale)
        return h + self.fall(self.dropout(F.silu(self.rise(y))))


class MLP(nn.Module):
    """y (B, out_channels) in x's dtype, from x (B, channels), time (B,) or () and what it is told.

    ``depth`` residual layers of ``width`` features, each told the time. It hears labels 0 … ``classes`` − 1 beside
    the null label −1, vectors of ``vector`` numbers, and tokens of ``tokens`` numbers, to which it attends before
    every layer. Zero at initialisation.
    ``ConfigError`` for settings that cannot work.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        *,
        width: int = 256,
        depth: int = 4,
        dropout: float = 0.0,
        time_width: int | None = None,
        classes: int = 0,
        vector: int = 0,
        tokens: int = 0,
    ) -> None:
        super().__init__()
        channels, width, depth = whole("channels", channels), whole("width", width), whole("depth", depth)
        require(depth <= DEEPEST, "depth", f"{depth:,} layers are more than {DEEPEST:,}", "Give fewer")
        out_channels = channels if out_channels is None else whole("out_channels", out_channels)
        time_width = width if time_width is None else whole("time_width", time_width)
        self.embed = Embedding(64, time_width, whole("classes", classes, 0), whole("vector", vector, 0))
        self.tokens = Tokens(tokens) if whole("tokens", tokens, 0) else None
        self.attend = nn.ModuleList(CrossAttention(width, tokens) for _ in range(depth if tokens else 0))
        self.enter = nn.Linear(channels, width)
        self.layers = nn.ModuleList(Layer(width, time_width, share("dropout", dropout)) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, out_channels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        told = self.embed(time, cond)
        context = self.tokens(cond, x) if self.tokens is not None else None
        h = self.enter(x)
        for i, layer in enumerate(self.layers):
            if context is not None:
                h = self.attend[i](h[..., None], *context)[..., 0]
            h = layer(h, told)
        return self.leave(F.silu(self.norm(h))).to(x.dtype)
