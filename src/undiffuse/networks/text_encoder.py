"""A transformer over the bytes of a prompt, trained with the network that it conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.networks.attention import TokenEmbedding, attend
from undiffuse.networks.condition import NUM_BYTES, Condition
from undiffuse.networks.embedding import ConditionEmbedding, sinusoids

TEXT_WIDTH, TEXT_DEPTH, TEXT_HEADS = 128, 2, 4
"""Features of a byte, layers and heads of the transformer."""


class TextLayer(nn.Module):
    """h + proj(attend(q, k, v)), then h + W₂ SiLU(W₁ norm(h)), for a sequence h (B, L, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return h + self.fc2(F.silu(self.fc1(self.norm2(h))))


class TextEncoder(nn.Module):
    """(pooled (B, out_width), sequence (B, L + 1, token_width), mask (B, 1, 1, L + 1)) of prompts ``cond.text``.

    A prompt is the bytes of its UTF-8, b + 1 at each position and 0 after its end. The sequence is a learned first
    token, then the embedded bytes with sinusoids of their positions, through `TEXT_DEPTH` layers; its first row gives
    ``pooled``. The first token is one of two: the null token where there is no prompt (all 0, or no ``cond.text``),
    which is then all that there is to attend to, else the start token.
    """

    def __init__(self, out_width: int, token_width: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(NUM_BYTES + 1, TEXT_WIDTH)
        self.start_token = nn.Parameter(torch.randn(1, TEXT_WIDTH))
        self.null_token = nn.Parameter(torch.randn(1, TEXT_WIDTH))
        self.layers = nn.ModuleList(TextLayer(TEXT_WIDTH, TEXT_HEADS) for _ in range(TEXT_DEPTH))
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        self.pooled = nn.Linear(TEXT_WIDTH, out_width)
        self.tokens = nn.Linear(TEXT_WIDTH, token_width)
        self.initialize()

    def initialize(self) -> None:
        """Zero ``pooled``, so that a network to which captions are added starts at what it was."""
        nn.init.zeros_(self.pooled.weight)
        nn.init.zeros_(self.pooled.bias)

    def forward(self, cond: Condition | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        text = cond.text if cond is not None else None
        text = torch.zeros(len(x), 0, dtype=torch.int64, device=x.device) if text is None else text
        given = text != 0
        first = torch.where(given.any(1, keepdim=True), self.start_token, self.null_token)
        positions = sinusoids(torch.arange(text.shape[1], device=x.device), TEXT_WIDTH).to(first.dtype)
        h = torch.cat([first[:, None], self.byte(text) + positions], 1)
        mask = F.pad(given, (1, 0), value=True)[:, None, None]
        for layer in self.layers:
            h = layer(h, mask)
        h = self.norm(h)
        return self.pooled(h[:, 0]), self.tokens(h), mask


class Conditioned(Protocol):
    """A network with the embeddings of its conditions; ``text`` and ``tokens`` are None where it accepts none."""

    embed: ConditionEmbedding
    text: TextEncoder | None
    tokens: TokenEmbedding | None


def embed_condition(
    network: Conditioned, x: Tensor, time: Tensor, cond: Condition | None
) -> tuple[Tensor, Sequence[Tensor]]:
    """(the embedding of the time and all of the condition, (tokens, mask) to attend to, or () without any)."""
    pooled, sequences = None, []
    if network.text is not None:
        pooled, *sequence = network.text(cond, x)
        sequences.append(sequence)
    if network.tokens is not None:
        sequences.append(network.tokens(cond, x))
    embedding = network.embed(time, cond, pooled)
    if len(sequences) < 2:
        return embedding, sequences[0] if sequences else ()
    (tokens, mask), (more, more_mask) = sequences
    return embedding, (torch.cat([tokens, more.to(tokens.dtype)], 1), torch.cat([mask, more_mask], 3))
