"""Attention over the positions of a feature map of any number of dimensions, and to tokens beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.conditioning import Condition
from undiffuse.networks.norm import GroupNorm


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√d) v for (B, heads, N, d), in float32 on a processor whatever comes.

    Only keys count whose ``mask``, which broadcasts to (B, heads, N, keys), is True.
    There the fused kernel's backward in bfloat16 takes six times as long as in float32
    (docs/networks-notes.md); on an accelerator the dtype stays.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v, mask)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)


class Attention(nn.Module):
    """h + proj(attend(q, k, v)) with q, k, v one linear map of the normed positions of h (B, width, ...)."""

    def __init__(self, width: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return h + mixed.transpose(1, 2).reshape(h.shape)


class Tokens(nn.Module):
    """(B, L + 1, width) normed tokens with one of its own before them, and their mask (B, 1, 1, L + 1).

    Its own always counts, and alone where nothing is told: no tokens at all, or every one of them masked.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, cond: Condition | None, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, own = cond.tokens if cond is not None else None, self.own.expand(len(x), -1, -1)
        mask = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
        if cond is not None and tokens is not None and cond.mask is not None:
            told = torch.where(cond.mask[..., None], tokens.to(own.dtype), 0.0)  # 0 · NaN would not be nothing
            own, mask = torch.cat([own, told], 1), torch.cat([mask, cond.mask[:, None, None]], 3)
        return self.norm(own), mask


class CrossAttention(nn.Module):
    """h + proj(attend(q, k, v)) with q linear in the normed positions of h (B, width, ...), k and v in the tokens."""

    def __init__(self, width: int, tokens: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(tokens, 2 * width)
        self.proj = nn.Linear(width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        q = self.q(self.norm(h).flatten(2).transpose(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return h + mixed.transpose(1, 2).reshape(h.shape)
