"""Learns images with transparency: ``python examples/transparent.py FOLDER OUT [MINUTES]``.

FOLDER holds PNG files, such as ``img/twitter/64`` of npm's package emoji-datasource-twitter. They are made 16×16, their
colours multiplied by their opacity, so that what is transparent has no colour to be learned. OUT/drawn.png shows images
that the model draws on a check pattern, and OUT/drawn has each as a PNG file with its transparency.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from undiffuse import Config, data, fit, load, presets
from undiffuse.config import replace_train

SIDE, COLUMNS = 16, 8


def read(folder: Path) -> data.Dataset:
    """All PNG files of ``folder`` as (N, 4, 16, 16): red, green and blue times the opacity, and the opacity."""
    images = []
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:  # RGBa: colours times opacity, the only ones that may be averaged
            images.append(np.asarray(image.convert("RGBA").convert("RGBa").resize((SIDE, SIDE), Image.Resampling.BOX)))
    return data.from_array(np.stack(images), layout="NHWC", name=folder.name)


def plain(values: np.ndarray) -> Image.Image:
    """One of them as an ordinary image; colours brighter than their opacity allows are cut off."""
    pixels = np.moveaxis(values, 0, -1).copy()
    pixels[..., :3] = np.minimum(pixels[..., :3], pixels[..., 3:])
    return Image.frombytes("RGBa", (SIDE, SIDE), pixels.tobytes()).convert("RGBA")


def main(folder: Path, out: Path, recipe: Config, n: int = 64) -> Path:
    model = load(fit(recipe, read(folder), out / "run"))
    (out / "drawn").mkdir(exist_ok=True)
    images = [plain(values) for values in model.sample(n, seed=1).numpy()]
    rows, cell = -(-n // COLUMNS), SIDE + 2
    checks = np.where(np.indices((rows * cell, COLUMNS * cell)).sum(0) // 4 % 2, 255, 208).astype(np.uint8)
    sheet = Image.fromarray(checks).convert("RGBA")
    for i, image in enumerate(images):
        image.save(out / "drawn" / f"{i:03d}.png")
        sheet.alpha_composite(image, (i % COLUMNS * cell + 1, i // COLUMNS * cell + 1))
    sheet.resize((4 * sheet.width, 4 * sheet.height), Image.Resampling.NEAREST).convert("RGB").save(out / "drawn.png")
    return out / "drawn.png"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    minutes = float(sys.argv[3]) if len(sys.argv) > 3 else 30.0
    print(main(Path(sys.argv[1]), Path(sys.argv[2]), replace_train(presets.get("cpu-small"), minutes=minutes)))
