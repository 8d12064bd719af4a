"""Animations of sampling: GIF by Pillow, MP4 where ffmpeg is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from undiffuse.denoising.guidance import Guide
from undiffuse.errors import ConfigError, ResourceError
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.report.figures import image_grid
from undiffuse.runtime.own_output import refuse_other_file, save_picture
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.trajectory import frame_steps

MAX_FRAMES = 60
"""The most steps of a trajectory that an animation shows."""

FRAME_MS, LAST_FRAME_MS = 80, 1600
"""Milliseconds for which a frame, and the last frame, is shown."""


def check_animation_path(path: Path) -> None:
    """Raises `ConfigError` where no animation can be written to ``path``."""
    if path.suffix not in (".gif", ".mp4"):
        raise ConfigError("ANIMATE", path, "not an animation format", "Give a name that ends in .gif or .mp4")
    if path.suffix == ".mp4" and shutil.which("ffmpeg") is None:
        raise ConfigError("ANIMATE", path, "MP4 needs ffmpeg, which is not installed", "Give a .gif name")
    refuse_other_file(path, "--animate")


@torch.no_grad()
def animate_sampling(
    path: Path,
    model: Diffusion,
    items: range,
    seed: int,
    sampler: Sampler,
    cond: Condition | None = None,
    guide: Guide | None = None,
) -> None:
    """Writes the trajectory of the samples numbered ``items`` as `animate` does; arguments of `Diffusion.trajectory`.

    Shown are at most `MAX_FRAMES` steps, at equal distances, and the noise that they start from.
    """
    check_animation_path(path)
    shown = frame_steps(model.num_steps(sampler), MAX_FRAMES)
    states = model.trajectory(items, seed, sampler, cond, guide)
    values = (model.transform.to_data(state.x).cpu().numpy() for state in states if state.done in shown)
    animate(path, values, model.info.get("num_values"))


def animate(path: Path, frames: Iterable[np.ndarray], num_values: int | None) -> None:
    """Writes ``frames``, each (N, C, H, W) drawn by `image_grid`, to ``path``; the last frame is shown longer.

    Raises `ConfigError` for other file names, `DataError` for other shapes, and `ResourceError` if ffmpeg fails.
    """
    check_animation_path(path)
    images = [image_grid(frame, num_values) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        duration = [FRAME_MS] * (len(images) - 1) + [LAST_FRAME_MS]
        save_picture(images[0], path, save_all=True, append_images=images[1:], duration=duration, loop=0)
    else:
        _encode(path, [*images, *images[-1:] * (LAST_FRAME_MS // FRAME_MS - 1)])


def _encode(path: Path, images: Sequence[Image.Image]) -> None:
    width, height = images[0].size
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(1000 / FRAME_MS), "-i", "-"]
    even = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"]  # the format that all players read
    command = ["ffmpeg", "-loglevel", "error", "-y", *raw, *even, f"file:{path}"]
    content = b"".join(image.convert("RGB").tobytes() for image in images)
    done = subprocess.run(command, input=content, capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ResourceError("ENCODER", path, f"ffmpeg failed ({' '.join(last)})"[:300], "Give a .gif name")
