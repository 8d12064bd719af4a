"""One image that a person names, for a model to work on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from undiffuse.data.folder import MAX_BYTES
from undiffuse.data.image import Picture, Prepare, decode
from undiffuse.data.problems import Refused, refusal
from undiffuse.errors import DataError


def load_image(path: str | Path, channels: int, size: Sequence[int] | None = None) -> Picture:
    """The picture in a file with 1 (grey), 3 (RGB) or 4 (RGBA) channels, of ``size`` (height, width).

    Raises `DataError`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("NO_FILE", path, "there is no such file", "Name an image file")
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise Refused("TOO_LARGE", f"it is larger than {MAX_BYTES:,} bytes")
        picture = decode(path.read_bytes(), path.suffix, Prepare(channels=channels))
    except OSError as error:
        raise refusal(error).at(path) from None
    except Refused as refused:
        raise refused.at(path) from None
    height, width = picture.pixels.shape[1:]
    if size is not None and tuple(size) != (height, width):
        cause = f"it has {width} x {height} pixels, and {size[1]} x {size[0]} are needed"
        raise DataError("SIZE", path, cause, "Cut or resize it to that")
    return picture
