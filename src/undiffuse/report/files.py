"""Samples as files: one picture each where they are images, a grid, an array, a manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from undiffuse.errors import DataError
from undiffuse.report.pictures import grid


def write_samples(folder: Path, values: np.ndarray, levels: int | None, manifest: dict[str, Any]) -> Path | None:
    """Writes ``values`` (N, ...) into ``folder``; the path of the grid of the first 144, if their shape has one."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "samples.npz", x=values)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    picture = folder / "grid.png"
    try:
        grid(values[:144], levels).save(picture)
    except DataError:
        return None
    if values.ndim == 4 and values.shape[1] in (1, 3) and levels is not None:
        for item, value in zip(manifest["items"], values, strict=True):
            _image(value, levels).save(folder / f"{item:06d}.png")
    return picture


def _image(value: np.ndarray, levels: int) -> Image.Image:
    """(C, H, W) levels as an image of 8 bits, or of 16 where there are more than 256 grey levels."""
    if levels > 256 and value.shape[0] == 1:
        return Image.fromarray((value[0].astype(np.float64) * 65535 / (levels - 1)).round().astype(np.uint16))
    scaled = (value.astype(np.float64) * 255 / (levels - 1)).round().astype(np.uint8)
    return Image.fromarray(scaled[0] if len(scaled) == 1 else np.moveaxis(scaled, 0, -1))
