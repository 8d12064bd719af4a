"""Learns images with transparency: ``python examples/transparent.py FOLDER OUT [MINUTES]``.

FOLDER holds PNG files, such as ``img/twitter/64`` of npm's package emoji-datasource-twitter. They are made 16×16, with
their opacity as a fourth channel. OUT/drawn.png shows images that the model draws on a check pattern, and OUT/drawn has
each as a PNG file with its transparency.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from undiffuse import Config, data, fit, load, presets
from undiffuse.config import replace_train

SIDE, COLUMNS = 16, 8


def main(folder: Path, out: Path, recipe: Config, n: int = 64) -> Path:
    model = load(fit(recipe, data.load(folder, size=SIDE, crop=True, channels=4), out / "run"))
    (out / "drawn").mkdir(exist_ok=True)
    images = [Image.fromarray(np.moveaxis(values, 0, -1)) for values in model.sample(n, seed=1).numpy()]
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
