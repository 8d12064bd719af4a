"""The image file of a sample, and the array file of all."""

from __future__ import annotations

import hashlib
import io
import itertools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from undiffuse.runtime.atomic_file import write_error
from undiffuse.runtime.file_headers import npy_header


def image_name(item: int) -> str:
    """The name of the image file of sample number ``item``."""
    return f"{item:06d}.png"


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


def write_arrays(file: IO[bytes], parts: Iterable[np.ndarray], n: int, labels: np.ndarray | None = None) -> None:
    """Write an npz file of x, the ``n`` items of ``parts``, and y, the ``labels`` (n,), compressed as a stream."""
    arrays = {"x": iter(parts)} | ({} if labels is None else {"y": iter([labels])})
    with zipfile.ZipFile(file, "w") as archive:
        for name, chunks in arrays.items():
            first = next(chunks)
            entry = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same samples give the same bytes
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as stream:
                stream.write(npy_header((n, *first.shape[1:]), first.dtype))
                for chunk in itertools.chain([first], chunks):
                    stream.write(np.ascontiguousarray(chunk).data)
