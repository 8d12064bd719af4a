"""What a network may be told beside x_t: one object for every kind of condition."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from undiffuse.errors import ConfigError

HEARD = {"label": "classes", "vector": "vector", "tokens": "tokens", "mask": "tokens"}
"""The setting of a network that makes it hear each thing told; what is not here no network hears."""


@dataclass(frozen=True)
class Condition:
    """A batch of conditions; every field that is not None has the batch as its first dimension.

    ``label`` (B,) int64, −1 is the null class; ``vector`` (B, D) floats, a row with NaN is one that is not told;
    ``tokens`` (B, L, D) with ``mask`` (B, L), True where a token counts, as all do where it is not given; ``image``
    (B, C, ...) with ``image_level`` (B,), its log-SNR.
    """

    label: Tensor | None = None
    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    image: Tensor | None = None
    image_level: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.mask is None:
            object.__setattr__(self, "mask", torch.ones_like(self.tokens[..., 0], dtype=torch.bool))

    def _map(self, function) -> Condition:
        return replace(self, **{f.name: function(v) for f in fields(self) if (v := getattr(self, f.name)) is not None})

    def null(self) -> Condition:
        """The same shapes with nothing told: label −1, a vector of NaN, all else zero (and every token masked)."""
        nothing = self._map(torch.zeros_like)
        if nothing.label is not None:
            nothing = replace(nothing, label=nothing.label - 1)
        return nothing if nothing.vector is None else replace(nothing, vector=nothing.vector + math.nan)

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

    def heard_by(self, network: Mapping[str, Any], items: int) -> Condition:
        """The same, if a network of these settings hears all of it for so many ``items``. Raises `ConfigError`."""
        length = self.mask.shape[-1] if self.mask is not None else 0
        for f in fields(self):
            value, size = getattr(self, f.name), network.get(HEARD.get(f.name, ""), 0)
            if value is None:
                continue
            if not size:
                _refuse(f.name, "the model was trained without it", "Leave it out, or use a model that knows it")
            shape = {"vector": (items, size), "tokens": (items, length, size), "mask": (items, length)}
            wanted = shape.get(f.name, (items,))
            if value.shape != wanted:
                _refuse(f.name, f"its shape is {tuple(value.shape)}, not {wanted}", "Give one for each item")
            if f.name == "label" and ((value < -1) | (value >= size)).any():
                cause = f"it runs from {int(value.min())} to {int(value.max())}"
                _refuse(f.name, cause, f"Labels are 0 to {size - 1}, or -1 for none")
        return self


def _refuse(name: str, cause: str, fix: str) -> NoReturn:
    raise ConfigError("CONDITION", f"condition.{name}", cause, fix)
