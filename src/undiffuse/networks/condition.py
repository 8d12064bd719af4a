"""The condition of a network beside x_t and the time: one object for all kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import NoReturn

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.runtime.device import to_device

CONDITION_NAMES = {"classes": "labels", "vector": "vectors", "tokens": "tokens", "image": "images", "text": "captions"}
"""Settings of a network that make it accept a condition, and what the condition is called: the number of classes, the
size of a vector or a token, the channels of an image, the longest prompt in bytes."""
CONDITION_SETTINGS = tuple(CONDITION_NAMES)
FIELD_TO_SETTING = {"label": "classes", "vector": "vector", "tokens": "tokens", "mask": "tokens", "text": "text"}
FIELD_TO_SETTING |= {"image": "image", "image_level": "image"}
"""The setting for each field of a condition; no network accepts the other fields."""
NUM_BYTES = 256


@dataclass(frozen=True)
class Condition:
    """A batch of conditions; every field that is not None has the batch as its first dimension.

    ``label`` (B,) of any integer type, kept as int64, −1 is the null class; ``vector`` (B, D) floats, a row with a NaN
    is the null vector; ``tokens`` (B, L, D) with ``mask`` (B, L), True where a token counts, by default everywhere;
    ``image`` (B, C, ...) of any size with ``image_level`` (B,), its log-SNR, by default +inf: without noise;
    ``text`` (B, L) bytes of prompts in UTF-8, b + 1 each and 0 after the end, kept as int64, all 0 is the null prompt.
    ``end_time`` (B,) is no condition but the time that a flow map goes to (`undiffuse.denoising.two_times`). Raises
    `ConfigError` for fields of another type.
    """

    label: Tensor | None = None
    vector: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    image: Tensor | None = None
    image_level: Tensor | None = None
    end_time: Tensor | None = None
    text: Tensor | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not isinstance(value, Tensor):
                _refuse(f.name, f"it is a {type(value).__name__}, not a tensor", "Give a tensor")
        for name in ("label", "mask", "text"):
            value = getattr(self, name)
            if value is not None and (value.is_floating_point() or value.is_complex()):
                _refuse(name, f"it holds {value.dtype}, not whole numbers", "Give integers")
        if self.label is not None:
            object.__setattr__(self, "label", self.label.to(torch.int64))
        if self.text is not None:
            object.__setattr__(self, "text", self.text.to(torch.int64))
        if self.mask is not None:
            object.__setattr__(self, "mask", self.mask.to(torch.bool))
        elif self.tokens is not None:
            object.__setattr__(self, "mask", torch.ones_like(self.tokens[..., 0], dtype=torch.bool))
        if self.image is not None and self.image_level is None:
            object.__setattr__(self, "image_level", self.image.new_full(self.image.shape[:1], math.inf))

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """The same with ``function`` of each field."""
        return replace(self, **{name: function(value) for name, value in self.given().items()})

    def given(self) -> dict[str, Tensor]:
        """The fields that are not None, by name."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def null(self) -> Condition:
        """The null condition in the same shapes: label −1, vector NaN, tokens zero and masked.

        ``image``, ``image_level`` and ``end_time`` are kept: guidance never drops them.
        """
        kept = {name: getattr(self, name) for name in ("image", "image_level", "end_time")}
        null = replace(self.map(torch.zeros_like), **kept)
        if null.label is not None:
            null = replace(null, label=null.label - 1)
        return null if null.vector is None else replace(null, vector=null.vector + math.nan)

    def drop(self, mask: Tensor) -> Condition:
        """This condition, null where ``mask`` (B,) is True, for condition dropout."""
        null = self.null().given()
        masks = {name: mask.view(-1, *[1] * (value.ndim - 1)) for name, value in null.items()}
        return replace(self, **{name: torch.where(masks[name], null[name], v) for name, v in self.given().items()})

    def accepted_by(self, sizes: Mapping[str, int]) -> Condition | None:
        """The fields that a network of these ``sizes`` accepts, None if there are none."""
        kept = {name: value for name, value in self.given().items() if FIELD_TO_SETTING.get(name) in sizes}
        return Condition(**kept) if kept else None

    def with_image_noise(self, std: Tensor, eps: Tensor) -> Condition:
        """The image √(1 − std²) image + std eps, at the log-SNR log((1 − std²)/std²); of an image without noise.

        ``std`` (B,) in [0, 1], ``eps`` of the image's shape.
        """
        assert self.image is not None
        scale = std.view(-1, *[1] * (self.image.ndim - 1)).to(self.image)
        image = (1 - scale**2).sqrt() * self.image + scale * eps
        std = std.to(torch.float64)
        return replace(self, image=image, image_level=(torch.log1p(-(std**2)) - 2 * std.log()).to(self.image.dtype))

    def cat(self, other: Condition) -> Condition:
        """This batch followed by ``other``'s, of the longer texts and tokens. Raises ValueError for other fields."""
        joined = {}
        for f in fields(self):
            one, two = getattr(self, f.name), getattr(other, f.name)
            if (one is None) != (two is None):
                raise ValueError(f"conditions to join must have the same fields; only one has {f.name!r}")
            joined[f.name] = None if one is None else torch.cat(_same_length(f.name, one, two))
        return Condition(**joined)

    def take(self, items: Tensor | slice) -> Condition:
        """The conditions of some ``items``, an index tensor or a slice."""
        return self.map(lambda v: v[items])

    def to(self, device: torch.device | str) -> Condition:
        """The same on another device."""
        return self.map(lambda v: to_device(v, torch.device(device)))

    def validate_for(self, sizes: Mapping[str, int], items: int, for_classifier: bool = False) -> Condition:
        """This condition, if it is one for ``items`` items of the ``sizes`` that a network accepts.

        ``sizes`` is by setting, as in `undiffuse.networks.protocol.condition_sizes`. With ``for_classifier`` fields
        that the network does not accept are those of a classifier, of which the number of items alone is checked.
        Raises `ConfigError`.
        """
        length = self.mask.shape[-1] if self.mask is not None else 0
        for f in fields(self):
            value, size = getattr(self, f.name), sizes.get(FIELD_TO_SETTING.get(f.name, ""), 0)
            if value is None:
                continue
            if not size and for_classifier:
                if value.shape[:1] != (items,):
                    cause = f"its shape is {tuple(value.shape)}, not ({items}, ...)"
                    _refuse(f.name, cause, "Give one for each item")
                continue
            if not size:
                _refuse(
                    f.name, "the model was trained without it", "Leave it out, or use a model that was trained with it"
                )
            shape = {"vector": (items, size), "tokens": (items, length, size), "mask": (items, length)}
            shape["image"] = (items, size, *value.shape[2:])
            if f.name == "text":
                if value.ndim == 2 and value.shape[1] > size:
                    cause = f"its prompts have up to {value.shape[1]} bytes, and the model takes {size}"
                    _refuse(f.name, cause, "Give shorter prompts")
                if value.numel() and not 0 <= int(value.min()) <= int(value.max()) <= NUM_BYTES:
                    cause = f"it ranges from {int(value.min())} to {int(value.max())}"
                    _refuse(f.name, cause, f"Give bytes + 1, 1 to {NUM_BYTES}, and 0 after the end")
                shape["text"] = (items, value.shape[1] if value.ndim == 2 else size)
            expected = shape.get(f.name, (items,))
            if value.shape != expected:
                _refuse(f.name, f"its shape is {tuple(value.shape)}, not {expected}", "Give one for each item")
            if f.name == "label" and ((value < -1) | (value >= size)).any():
                cause = f"it ranges from {int(value.min())} to {int(value.max())}"
                _refuse(f.name, cause, f"Labels are 0 to {size - 1}, or -1 for none")
            if f.name == "image" and not (value.is_floating_point() and bool(value.isfinite().all())):
                cause = "it is not a floating-point image, or holds NaN or infinite values"
                _refuse(f.name, cause, "Give the image in the units of x")
            if f.name == "image_level" and (self.image is None or bool(value.isnan().any())):
                cause = "there is no image" if self.image is None else "some are NaN"
                _refuse(f.name, cause, "Give the log-SNR of each image")
        return self


def _same_length(name: str, one: Tensor, two: Tensor) -> list[Tensor]:
    """Both, where they are sequences (B, L, ...) with zeros after the end of the shorter one."""
    if name not in ("text", "tokens", "mask") or one.shape[1] == two.shape[1]:
        return [one, two]
    length = max(one.shape[1], two.shape[1])
    return [torch.cat([v, v.new_zeros(len(v), length - v.shape[1], *v.shape[2:])], 1) for v in (one, two)]


def _refuse(name: str, cause: str, fix: str) -> NoReturn:
    raise ConfigError("CONDITION", f"condition.{name}", cause, fix)
