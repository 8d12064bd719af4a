"""What this package writes, recognized by its content, so that it does not become training data.

Run folders and sample folders are recognized by their records, single pictures and weights by their metadata.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from undiffuse.errors import ConfigError
from undiffuse.runtime.atomic_file import write_atomic
from undiffuse.runtime.folder_lock import LOCK_FILES

PICTURE_MARK = "undiffuse:picture"
"""Stands in the metadata of each picture that is no item: sheets, strips, plots, animations."""
DESCRIPTION = "Description"
"""The keyword of a PNG file for what it shows."""
SOFTWARE_TAG = 0x0131
"""The Exif tag for the name of the program."""
MARKABLE_SUFFIXES = frozenset([".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".gif"])
SCANNED_BYTES = 1 << 12
"""Bytes at the beginning and at the end of a picture in which the mark may stand."""

MAX_RECORD_BYTES = 1 << 30
RECORD_KEYS = {
    "run.json": {"config", "data", "finished"},
    "manifest.json": {"key", "sha256", "first", "n", "files"},
}
"""Keys of the records of a run folder and of a sample folder, by the name of the file."""
UNRECORDED_RUN = {"checkpoints", "pictures", "run.json.partial", "init.safetensors", "init.safetensors.partial"}
UNRECORDED_RUN.update(LOCK_FILES)
"""Names in the folder of a run that was stopped before it wrote its record."""


def save_picture(image: Any, path: Path, **options: Any) -> None:
    """Save a PIL image with `PICTURE_MARK` in its metadata, durably. BMP has none, so such a picture has no mark."""
    from PIL import Image

    content, suffix = io.BytesIO(), path.suffix.lower()
    image.save(content, Image.registered_extensions()[suffix], **mark_options(suffix), **options)
    write_atomic(path, content.getvalue())


def save_described(image: Any, path: Path, words: str) -> None:
    """`save_picture` of a PNG file, with ``words`` about what it shows for `described_picture`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(DESCRIPTION, words)
    save_picture(image, path, pnginfo=info)


def described_picture(path: Path) -> tuple[Any, str] | None:
    """The picture in a PNG file of ours, and the words that `save_described` put beside it; None if there is none."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB"), str(image.info.get(DESCRIPTION, ""))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def mark_options(suffix: str) -> dict[str, Any]:
    """The options of ``PIL.Image.save`` that put `PICTURE_MARK` into a file with this ``suffix``."""
    from PIL import Image

    exif = Image.Exif()
    exif[SOFTWARE_TAG] = PICTURE_MARK
    return {"comment": PICTURE_MARK.encode()} if suffix.lower() == ".gif" else {"exif": exif}


def is_marked_picture(path: str | Path) -> bool:
    """Whether the file has `PICTURE_MARK` near its beginning or its end; False where it cannot be read."""
    if os.path.splitext(path)[1].lower() not in MARKABLE_SUFFIXES:
        return False
    try:
        with open(path, "rb", buffering=0) as file:
            start = file.read(SCANNED_BYTES)
            file.seek(max(len(start), os.fstat(file.fileno()).st_size - SCANNED_BYTES))
            return PICTURE_MARK.encode() in start or PICTURE_MARK.encode() in file.read(SCANNED_BYTES)
    except OSError:
        return False


def refuse_other_file(path: Path, flag: str = "--out") -> None:
    """Raise `ConfigError` if there is a file at ``path`` that is no marked picture, which a command may write again."""
    if os.path.lexists(path) and not is_marked_picture(path):
        cause = "this file exists and is not marked as a picture of undiffuse"
        raise ConfigError("OUT", f"{flag} {path}", cause, "Give another name, or move the file away")


def is_own_folder(folder: Path, names: Collection[str]) -> bool:
    """Whether ``folder``, which contains ``names``, is a run folder or a sample folder, finished or not."""
    if any(name in names and keys <= _record(folder / name).keys() for name, keys in RECORD_KEYS.items()):
        return True
    if "checkpoints" in names and set(names) <= UNRECORDED_RUN:
        return True
    return "parts" in names and any(map(is_own_tensor_file, (folder / "parts").glob("*.safetensors")))


def _record(path: Path) -> dict[str, Any]:
    """The table in a JSON file; empty where the file has another content or cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_RECORD_BYTES:
            return {}
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_own_tensor_file(path: str | Path) -> bool:
    """Whether a safetensors file has the metadata of `tensor_file.write_tensors`: a model, a state, a part of a job."""
    if os.path.splitext(path)[1].lower() != ".safetensors":
        return False
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length <= min(MAX_RECORD_BYTES, os.path.getsize(path)) and b'"undiffuse":' in file.read(length)
    except OSError:
        return False
