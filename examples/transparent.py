"""Learn images with transparency: ``python examples/transparent.py FOLDER OUT [MINUTES]``.

FOLDER contains PNG files, such as ``img/twitter/64`` of npm's package emoji-datasource-twitter. They are resized to
16×16, with opacity as the fourth channel. OUT/generated contains generated images as PNG files with transparency,
OUT/generated.png shows them on a checkerboard.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from undiffuse import Config, fit, load, load_data, preset, replace_train

SIDE, COLUMNS = 16, 8


def main(folder: Path, out: Path, recipe: Config, n: int = 64) -> Path:
    data = load_data(folder, size=SIDE, crop=True, channels=4)
    model = load(fit(recipe, data, out / "run"))
    (out / "generated").mkdir(exist_ok=True)
    images = [Image.fromarray(np.moveaxis(values, 0, -1)) for values in model.sample(n, seed=1).numpy()]
    rows, cell = -(-n // COLUMNS), SIDE + 2
    checks = np.where(np.indices((rows * cell, COLUMNS * cell)).sum(0) // 4 % 2, 255, 208).astype(np.uint8)
    sheet = Image.fromarray(checks).convert("RGBA")
    for i, image in enumerate(images):
        image.save(out / "generated" / f"{i:03d}.png")
        sheet.alpha_composite(image, (i % COLUMNS * cell + 1, i // COLUMNS * cell + 1))
    sheet = sheet.resize((4 * sheet.width, 4 * sheet.height), Image.Resampling.NEAREST)
    sheet.convert("RGB").save(out / "generated.png")
    return out / "generated.png"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    minutes = float(sys.argv[3]) if len(sys.argv) > 3 else 30.0
    print(main(Path(sys.argv[1]), Path(sys.argv[2]), replace_train(preset("cpu-small"), minutes=minutes)))
