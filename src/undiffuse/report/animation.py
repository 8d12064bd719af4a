"""A moving picture of samples on their way: GIF by Pillow, MP4 where the encoder ffmpeg is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from undiffuse.errors import ConfigError, ResourceError
from undiffuse.report.pictures import grid

FRAME, LAST = 80, 1600
"""Milliseconds that a frame, and the last one, is shown."""


def check(path: Path) -> None:
    """Raises `ConfigError` where no moving picture can be written to ``path``."""
    if path.suffix not in (".gif", ".mp4"):
        raise ConfigError("ANIMATE", path, "no kind of moving picture", "Give a name that ends in .gif or .mp4")
    if path.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise ConfigError("ANIMATE", path, "MP4 needs the encoder ffmpeg, which is not installed", "Give a .gif name")


def animate(path: Path, frames: Iterable[np.ndarray], levels: int | None) -> None:
    """Writes ``frames``, each (N, C, H, W) as `grid` shows them, to ``path``, the last of them for longer.

    Raises `ConfigError`, `DataError` for other shapes, and `ResourceError` if the encoder fails.
    """
    check(path)
    shown = [grid(frame, levels) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        duration = [FRAME] * (len(shown) - 1) + [LAST]
        shown[0].save(path, save_all=True, append_images=shown[1:], duration=duration, loop=0)
    else:
        _encode(path, [*shown, *shown[-1:] * (LAST // FRAME - 1)])


def _encode(path: Path, shown: Sequence[Image.Image]) -> None:
    width, height = shown[0].size
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(1000 / FRAME), "-i", "-"]
    even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"]  # what every player takes
    command = ["ffmpeg", "-loglevel", "error", "-y", *raw, *even, f"file:{path}"]
    said = subprocess.run(command, input=b"".join(map(_bytes, shown)), capture_output=True, check=False)
    if said.returncode:
        last = said.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ResourceError("ENCODER", path, f"ffmpeg failed ({' '.join(last)})"[:300], "Give a .gif name")


def _bytes(picture: Image.Image) -> bytes:
    return picture.convert("RGB").tobytes()
