"""Draws folders of small pictures, a class a sub-folder, to try the command line on: ``python examples/shapes.py OUT``.

OUT/square (grey, 32×32), OUT/wide (grey, 24×40) and OUT/colour (RGB, 32×32) hold discs, boxes and stripes.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = {"square": (32, 32, 1), "wide": (24, 40, 1), "colour": (32, 32, 3)}
CLASSES = ("discs", "boxes", "stripes")


def draw(kind: str, random: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """One picture, (height, width, channels) uint8: a shape with a soft edge, of any place, size and shade."""
    y, x = np.mgrid[:height, :width].astype(float)
    size = random.uniform(4, 0.4 * min(height, width))
    y, x = y - random.uniform(size, height - size), x - random.uniform(size, width - size)
    if kind == "discs":
        distance = np.hypot(y, x) - size
    elif kind == "boxes":
        distance = np.maximum(abs(y), abs(x)) - size
    else:
        angle = random.uniform(0, np.pi)
        distance = size / 2 * np.sin((y * np.sin(angle) + x * np.cos(angle)) * 4 / size)
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    ground, shade = random.uniform(0, 90, channels), random.uniform(120, 255, channels)
    return (ground + (shade - ground) * inside).round().astype(np.uint8)


def main(out: Path, count: int = 300) -> None:
    random = np.random.default_rng(0)
    for name, (height, width, channels) in KINDS.items():
        for i in range(count):
            kind = CLASSES[i % len(CLASSES)]
            picture = draw(kind, random, height, width, channels)
            folder = out / name / kind
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.squeeze(-1) if channels == 1 else picture).save(folder / f"{i:04d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "shapes"))
