"""One image file, for commands that apply a model to it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from undiffuse.data.image_decoding import DecodedImage, ImageOptions, decode_image
from undiffuse.data.sources.image_folder import MAX_FILE_BYTES
from undiffuse.errors import DataError
from undiffuse.runtime.file_errors import FileError, file_errors_at


def load_image(path: str | Path, channels: int, size: Sequence[int] | None = None) -> DecodedImage:
    """The image in a file, with 1 (grey), 3 (RGB) or 4 (RGBA) ``channels``.

    Raises `DataError`, also if ``size`` (height, width) is given and the image has another size.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("NO_FILE", path, "no such file", "Name an image file")
    with file_errors_at(path):
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise FileError("TOO_LARGE", f"it has more than {MAX_FILE_BYTES:,} bytes")
        image = decode_image(path.read_bytes(), path.suffix, ImageOptions(channels=channels))
    height, width = image.pixels.shape[1:]
    if size is not None and tuple(size) != (height, width):
        cause = f"it has {width} x {height} pixels instead of {size[1]} x {size[0]}"
        raise DataError("SIZE", path, cause, "Crop or resize it")
    return image
