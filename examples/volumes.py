"""Learns volumes with a ball in each, in three dimensions: ``python examples/volumes.py OUT [MINUTES]``.

OUT/balls.npy is what it learns from, 16×16×16 cells with levels from 0 to 255. OUT/drawn.png shows the middle slices
of volumes that it draws, and the table says how much of them is filled and how round that is.
"""

import sys
from pathlib import Path

import numpy as np

from undiffuse import Config, data, fit, load, presets
from undiffuse.config import replace_train
from undiffuse.report import pictures, table

SIDE = 16


def balls(n: int, seed: int = 0) -> np.ndarray:
    """(n, 1, 16, 16, 16) uint8: in each a ball with a soft edge, of any place and of a radius from 3 to 6 cells."""
    random = np.random.default_rng(seed)
    radius = random.uniform(3, 6, (n, 1, 1, 1))
    place = [random.uniform(radius, SIDE - 1 - radius) for _ in range(3)]
    distance = np.sqrt(
        sum((axis - middle) ** 2 for axis, middle in zip(np.mgrid[:SIDE, :SIDE, :SIDE], place, strict=True))
    )
    return (255 * np.clip(radius - distance + 0.5, 0, 1)).round().astype(np.uint8)[:, None]


def told(values: np.ndarray) -> dict[str, float]:
    """How many cells are filled, the radius of a ball of as many, and how far from it that of their spread is."""
    mass = values[:, 0] / 255.0
    filled, spread = mass.sum((1, 2, 3)), np.zeros(len(mass))
    for places in np.mgrid[:SIDE, :SIDE, :SIDE]:
        middle = (mass * places).sum((1, 2, 3)) / filled
        spread += (mass * (places - middle[:, None, None, None]) ** 2).sum((1, 2, 3)) / filled
    radius = np.cbrt(0.75 * filled / np.pi)
    off = np.abs(radius - np.sqrt(spread * 5 / 3))
    return {"filled": filled.mean(), "its spread": filled.std(), "radius": radius.mean(), "out of round": off.mean()}


def main(out: Path, recipe: Config, n: int = 2000) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "balls.npy", balls(n))
    seen = data.load(out / "balls.npy")
    model = load(fit(recipe, seen, out / "run"))
    drawn = model.sample(64, seed=1).numpy()
    table.render([{"": "real", **told(seen.values)}, {"": "drawn", **told(drawn)}], "cells")
    pictures.grid(drawn[:24], seen.levels).save(out / "drawn.png")
    return out / "drawn.png"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    minutes = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    print(main(Path(sys.argv[1]), replace_train(presets.get("volume"), minutes=minutes)))
