"""One image file, for commands that apply a model to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from undiffuse.data.image_decoding import DecodedImage, ImageOptions, decode_image
from undiffuse.data.sources.image_folder import MAX_FILE_BYTES
from undiffuse.errors import DataError
from undiffuse.runtime.file_errors import FileError, file_errors_at

PREPARATION = ("size", "crop", "background", "upscale")
"""Options of data that decide how an image of another size becomes an item."""


def load_image(
    path: str | Path, channels: int, size: Sequence[int] | None = None, options: Mapping[str, Any] | None = None
) -> DecodedImage:
    """The image in a file, with 1 (grey), 3 (RGB) or 4 (RGBA) ``channels``.

    With ``options`` of data, of which those of `PREPARATION` are used, an image of another size than ``size``
    (height, width) is prepared as the images of those data were. Raises `DataError`, also if the image has another
    size in the end.
    """
    path = Path(path)
    if not path.is_file():
        other = "it is a folder" if path.is_dir() else "it is a pipe, a socket or a device"
        raise DataError("NO_FILE", path, other if path.exists() else "no such file", "Name an image file")
    with file_errors_at(path):
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise FileError("TOO_LARGE", f"it has more than {MAX_FILE_BYTES:,} bytes")
        prepare = {name: value for name, value in (options or {}).items() if name in PREPARATION}
        background = {name: value for name, value in prepare.items() if name == "background"}
        content = path.read_bytes()
        image = decode_image(content, path.suffix, ImageOptions(channels=channels, **background))
        if size is not None and tuple(size) != image.pixels.shape[1:] and prepare.keys() & {"size", "crop"}:
            try:
                image = decode_image(content, path.suffix, ImageOptions(channels=channels, **prepare))
            except FileError as error:
                raise FileError(error.code, error.reason, "Crop or resize it") from error
    height, width = image.pixels.shape[1:]
    if size is not None and tuple(size) != (height, width):
        cause = f"it has {width} x {height} pixels instead of {size[1]} x {size[0]}"
        raise DataError("SIZE", path, cause, "Crop or resize it")
    return image
