"""Captions as conditions: bytes, or the embeddings of a text encoder, one row for each distinct caption."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from undiffuse.networks.condition import Condition

MIN_PROMPT_BYTES, PROMPT_STEP = 64, 32
"""A network takes prompts of at least so many bytes, and lengths that are multiples of the second number."""


def prompt_bytes(captions: Iterable[Sequence[str]]) -> int:
    """The longest caption in bytes of UTF-8."""
    return max((len(text.encode()) for texts in captions for text in texts), default=0)


def text_setting(longest: int) -> int:
    """The setting ``text`` of a network for prompts of up to ``longest`` bytes, with room for others."""
    return max(MIN_PROMPT_BYTES, -(-longest // PROMPT_STEP) * PROMPT_STEP)


def text_rows(texts: Sequence[str], length: int | None = None) -> torch.Tensor:
    """`Condition.text` (n, L) of the ``texts``: bytes of UTF-8 + 1, then zeros up to ``length``, or to the longest."""
    encoded = [text.encode() for text in texts]
    rows = np.zeros((len(texts), max(map(len, encoded), default=0) if length is None else length), np.int64)
    for row, content in zip(rows, encoded, strict=True):
        row[: len(content)] = np.frombuffer(content, np.uint8)
        row[: len(content)] += 1
    return torch.from_numpy(rows)


def distinct(captions: Iterable[Sequence[str]]) -> list[str]:
    """Every caption once, in the order in which they occur."""
    return list(dict.fromkeys(text for texts in captions for text in texts))


@dataclass(frozen=True, eq=False)
class CaptionEmbeddings:
    """Embeddings of the distinct ``texts``: ``pooled`` (K, D) float32, and for each token (K, L, E) with a ``mask``.

    ``tokens`` are float16; ``mask`` (K, L) is True where a token counts. ``encoder`` identifies what made them: its
    ``name`` and its ``digest``.
    """

    encoder: dict[str, Any]
    texts: tuple[str, ...]
    pooled: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        K, L = len(self.texts), self.tokens.shape[1:2]
        shapes = (self.pooled.shape[:1], self.tokens.shape[:2], self.mask.shape)
        if shapes != ((K,), (K, *L), (K, *L)) or (self.pooled.ndim, self.tokens.ndim) != (2, 3):
            raise ValueError(f"embeddings of {K} captions have the shapes {shapes}")

    @cached_property
    def _row(self) -> dict[str, int]:
        return {text: row for row, text in enumerate(self.texts)}

    @property
    def sizes(self) -> dict[str, int]:
        """Settings of a network that accepts them."""
        return {"vector": self.pooled.shape[1], "tokens": self.tokens.shape[2]}

    def condition(self, texts: Sequence[str]) -> Condition:
        """The vectors and tokens of some of the `texts`; null for an empty text."""
        rows = np.array([self._row[text] if text else -1 for text in texts], np.int64)
        pooled, tokens, mask = self.pooled[rows], self.tokens[rows].astype(np.float32), self.mask[rows]
        pooled = np.where((rows < 0)[:, None], np.float32(np.nan), pooled)
        mask, tokens = mask & (rows >= 0)[:, None], np.where((rows < 0)[:, None, None], np.float32(0), tokens)
        return Condition(vector=torch.from_numpy(pooled), tokens=torch.from_numpy(tokens), mask=torch.from_numpy(mask))

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """``pooled`` of some of the `texts`, (n, D)."""
        return self.pooled[[self._row[text] for text in texts]]
