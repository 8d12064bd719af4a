"""Attention among the positions of a feature map of any number of dimensions, and to the tokens of a condition."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.networks.condition import Condition
from undiffuse.networks.norm import GroupNorm

EXPLICIT_POSITIONS = 200
"""Up to so many keys an explicit softmax is faster than the fused kernel in float32 (docs/networks-notes.md)."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√d) v for (B, heads, N, d), over the keys whose ``mask`` (..., keys) is True.

    ``mask`` broadcasts to (B, heads, N, keys) and leaves each row a key. On an accelerator it is computed in the dtype
    of q. On a CPU the softmax is computed in float32, and so is all of it for many keys, because the backward pass of
    the fused kernel takes six times as long in bfloat16.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16):
        return F.scaled_dot_product_attention(q, k, v, mask)
    with torch.autocast("cpu", enabled=False):
        if k.shape[-2] > EXPLICIT_POSITIONS:
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask).to(q.dtype)
        logits = (q.float() / math.sqrt(q.shape[-1])) @ k.float().mT
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf)
        return logits.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """h + proj(attend(q, k, v)), q, k, v linear in the normed positions of h (B, width, ...).

    ``norm`` is by default a `GroupNorm`.
    """

    def __init__(self, width: int, heads: int = 1, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(width) if norm is None else norm
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return h + mixed.transpose(1, 2).reshape(h.shape)


class TokenEmbedding(nn.Module):
    """A learned null token followed by the tokens, normed, (B, L + 1, width), and their mask (B, 1, 1, L + 1).

    The null token is never masked: it is all there is to attend to without tokens or where every token is masked.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.null_token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, cond: Condition | None, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, rows = cond.tokens if cond is not None else None, self.null_token.expand(len(x), -1, -1)
        mask = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
        if cond is not None and tokens is not None and cond.mask is not None:
            kept = torch.where(cond.mask[..., None], tokens.to(rows.dtype), 0.0)  # 0 · NaN would be NaN
            rows, mask = torch.cat([rows, kept], 1), torch.cat([mask, cond.mask[:, None, None]], 3)
        return self.norm(rows), mask


class CrossAttention(nn.Module):
    """h + proj(attend(q, k, v)), q linear in the normed positions of h (B, width, ...), k and v in the tokens.

    ``token_width`` is the size of a token. Returns h at initialization.
    """

    def __init__(self, width: int, token_width: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(token_width, 2 * width)
        self.proj = nn.Linear(width, width)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        q = self.q(self.norm(h).flatten(2).transpose(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return h + mixed.transpose(1, 2).reshape(h.shape)
