"""The image file of a sample."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from undiffuse.runtime.atomic_file import write_error


def sample_image(value: np.ndarray, num_values: int) -> Image.Image:
    """(C, H, W) whole numbers as an image of 8 bits a channel, or of 16 for grey with more than 256 values."""
    if num_values > 256 and value.shape[0] == 1:
        return Image.fromarray((value[0].astype(np.float64) * 65535 / (num_values - 1)).round().astype(np.uint16))
    scaled = (value.astype(np.float64) * 255 / (num_values - 1)).round().astype(np.uint8)
    return Image.fromarray(scaled[0] if len(scaled) == 1 else np.moveaxis(scaled, 0, -1))


def write_image(path: Path, image: Image.Image, **options: Any) -> str:
    """The sha256 of the PNG file that it writes with ``options`` of PIL. Raises `ResourceError`."""
    content = io.BytesIO()
    image.save(content, "PNG", **options)
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        raise write_error(path, content.getbuffer().nbytes, error) from None
    return hashlib.sha256(content.getbuffer()).hexdigest()
