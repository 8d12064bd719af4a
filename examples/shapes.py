"""Write folders of small images with a sub-folder per class, as test data: ``python examples/shapes.py OUT``.

OUT/square (grey, 32×32), OUT/wide (grey, 24×40) and OUT/colour (RGB, 32×32) contain discs, boxes and stripes.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

FORMATS = {"square": (32, 32, 1), "wide": (24, 40, 1), "colour": (32, 32, 3)}
CLASSES = ("discs", "boxes", "stripes")


def draw(shape: str, random: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """(height, width, channels) uint8: a shape with a soft edge, at a random position, of random size and shade."""
    y, x = np.mgrid[:height, :width].astype(float)
    size = random.uniform(4, 0.4 * min(height, width))
    y, x = y - random.uniform(size, height - size), x - random.uniform(size, width - size)
    if shape == "discs":
        distance = np.hypot(y, x) - size
    elif shape == "boxes":
        distance = np.maximum(abs(y), abs(x)) - size
    else:
        angle = random.uniform(0, np.pi)
        distance = size / 2 * np.sin((y * np.sin(angle) + x * np.cos(angle)) * 4 / size)
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    background, colour = random.uniform(0, 90, channels), random.uniform(120, 255, channels)
    return (background + (colour - background) * inside).round().astype(np.uint8)


def main(out: Path, count: int = 300) -> None:
    random = np.random.default_rng(0)
    for name, (height, width, channels) in FORMATS.items():
        for i in range(count):
            shape = CLASSES[i % len(CLASSES)]
            pixels = draw(shape, random, height, width, channels)
            folder = out / name / shape
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels).save(folder / f"{i:04d}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "shapes"))
