"""Images between the page and a model: 8 bits a channel, as in the files that the page saves and commands read."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.data.image_decoding import ImageOptions, decode_image
from undiffuse.data.image_formats import FORMATS, detect_format
from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.runtime.file_errors import file_errors_at

LEVELS = IntegerLevels(256)


@dataclass(frozen=True)
class Picture:
    """``pixels`` (C, H, W) uint8, and ``changes`` that were made to a file's image."""

    pixels: np.ndarray
    changes: tuple[str, ...] = ()

    @property
    def x(self) -> Tensor:
        """(C, H, W) in [−1, 1], what `restore` and `interpolate` compute from the saved file."""
        return LEVELS.to_model(torch.from_numpy(self.pixels)[None])[0]

    def to_json(self) -> dict[str, Any]:
        return {**encode(self.pixels[None]), "changes": list(self.changes)}


def from_values(values: np.ndarray | Tensor, num_values: int) -> np.ndarray:
    """Values 0 .. ``num_values`` − 1 of any shape as 8 bits."""
    return (np.asarray(values).astype(np.float64) * 255 / (num_values - 1)).round().astype(np.uint8)


def encode(pixels: np.ndarray) -> dict[str, Any]:
    """(N, C, H, W) uint8 for the page: the shape, and the bytes (N, H, W, C) in base 64."""
    n, channels, height, width = pixels.shape
    data = base64.b64encode(np.moveaxis(pixels, 1, -1).tobytes()).decode()
    return {"n": n, "channels": channels, "height": height, "width": width, "data": data}


def decode_upload(content: bytes, channels: int, sides: Sequence[int]) -> Picture:
    """The image of an uploaded file with these ``channels`` and ``sides``; resized if the sides are equal.

    Raises `DataError` for content that is no image of an allowed format, and `ConfigError` for one that does not fit.
    """
    with file_errors_at(Path("your image")):
        suffix = FORMATS[detect_format(content)].split()[0]
        image = decode_image(content, suffix, ImageOptions(channels=channels))
        if tuple(sides) != image.pixels.shape[1:] and sides[0] == sides[1]:
            options = ImageOptions(channels=channels, size=sides[0], crop=True, upscale=True)
            image = decode_image(content, suffix, options)
    height, width = image.pixels.shape[1:]
    if (height, width) != tuple(sides):
        cause = f"it has {width} x {height} pixels, and the model's images {sides[1]} x {sides[0]}"
        raise ConfigError("SIZE", "your image", cause, "Crop or resize it")
    return Picture(from_values(image.pixels, image.num_values), image.changes)


def decode_mask(text: str, sides: Sequence[int]) -> np.ndarray:
    """(H, W) bool, True where hidden, from base 64 of bits. Raises `ConfigError`."""
    size = math.prod(sides)
    try:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))
    except (binascii.Error, ValueError):
        bits = np.zeros(0, np.uint8)
    if len(bits) != 8 * math.ceil(size / 8):
        raise ConfigError("MASK", "mask", "it is not the bits of an image of the model's size", "Paint it again")
    return bits[:size].reshape(sides).astype(bool)
