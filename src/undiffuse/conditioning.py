"""What a network may be told beside x_t: one object for every kind of condition."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """A batch of conditions; every field that is not None has the batch as its first dimension.

    ``label`` (B,) int64, −1 is the null class; ``vector`` (B, D); ``tokens`` (B, L, D) with ``mask``
    (B, L), True where a token counts; ``image`` (B, C, ...) with ``image_level`` (B,), its log-SNR.
    """

    label: Tensor | None = None
    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    image: Tensor | None = None
    image_level: Tensor | None = None

    def _map(self, function) -> Condition:
        return replace(self, **{f.name: function(v) for f in fields(self) if (v := getattr(self, f.name)) is not None})

    def null(self) -> Condition:
        """The same shapes with nothing told: label −1, all else zero (and every token masked)."""
        nothing = self._map(torch.zeros_like)
        return nothing if nothing.label is None else replace(nothing, label=nothing.label - 1)

    def drop(self, mask: Tensor) -> Condition:
        """A condition that is null where ``mask`` (B,) is True, for label dropout."""
        null = self.null()
        keep = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                keep[f.name] = torch.where(mask.view(-1, *[1] * (value.ndim - 1)), getattr(null, f.name), value)
        return replace(self, **keep)

    def cat(self, other: Condition) -> Condition:
        """This batch followed by ``other``'s, for two calls in one."""
        joined = {}
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"conditions to join must tell the same things; only one has {f.name!r}")
            joined[f.name] = None if mine is None else torch.cat([mine, theirs])
        return Condition(**joined)

    def take(self, items: Tensor | slice) -> Condition:
        """The conditions of some ``items``, an index tensor or a slice."""
        return self._map(lambda v: v[items])

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device."""
        return self._map(lambda v: v.to(device))
