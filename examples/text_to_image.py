"""Draws shapes with captions, and trains a model of them by text: ``python examples/text_to_image.py OUT [MINUTES]``.

OUT gets 600 pictures of 16×16 and metadata.csv with their captions, such as "a red disc" or "the disc is red"; no
caption asks for a blue box. With MINUTES a model trains on them for so long into OUT-run, and prompts.png there shows
four drawings of each colour and shape, a blue box too.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from undiffuse import Sampler, fit, load, load_data, preset, replace_train
from undiffuse.report.figures import image_grid

COLOURS = {"red": (220, 50, 40), "green": (30, 160, 70), "blue": (50, 80, 220), "yellow": (240, 200, 40)}
SHAPES = ("disc", "box", "cross")
NEVER = ("blue", "box")
SIDE = 16


def draw(colour: str, shape: str, random: np.random.Generator) -> np.ndarray:
    """(SIDE, SIDE, 3) uint8: a shape on white, at a random position and of random size."""
    size, (y, x) = random.uniform(3, 6), np.mgrid[:SIDE, :SIDE].astype(float)
    y, x = abs(y - random.uniform(size, SIDE - size)), abs(x - random.uniform(size, SIDE - size))
    cross = np.maximum(np.minimum(y, x) - size / 3, np.maximum(y, x) - size)
    distance = {"disc": np.hypot(y, x) - size, "box": np.maximum(y, x) - size, "cross": cross}[shape]
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    return (255 + (np.array(COLOURS[colour]) - 255) * inside).round().astype(np.uint8)


def write(out: Path, count: int = 600) -> None:
    random, pairs = np.random.default_rng(0), [(c, s) for c in COLOURS for s in SHAPES if (c, s) != NEVER]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        for i in range(count):
            colour, shape = pairs[i % len(pairs)]
            Image.fromarray(draw(colour, shape, random)).save(out / f"{i:04d}.png")
            table.writerows([[f"{i:04d}.png", f"a {colour} {shape}"], [f"{i:04d}.png", f"the {shape} is {colour}"]])


def train_and_draw(data: Path, guidance: float = 3.0, **settings) -> Path:
    recipe = replace_train(preset("digits"), conditional=True, **settings)
    run = fit(recipe, load_data(data, captions=True), f"{data}-run")
    model, prompts = load(run), [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES for _ in range(4)]
    cond = model.text_condition(prompts)
    values = model.sample(len(prompts), sampler=Sampler(guidance=guidance), cond=cond)
    image_grid(values.numpy(), 256, columns=12).save(path := run / "prompts.png")
    return path


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "shapes")
    write(folder)
    print(train_and_draw(folder, minutes=float(sys.argv[2])) if len(sys.argv) > 2 else f"pictures in {folder}")
