"""Learn three-dimensional volumes, each with a ball: ``python examples/volumes.py OUT [MINUTES]``.

OUT/balls.npy is the training data: 16×16×16 voxels, integers from 0 to 255. OUT/generated.png shows the middle slices
of generated volumes; a table compares the filled volume and the roundness.
"""

import sys
from pathlib import Path

import numpy as np

from undiffuse import Config, fit, load, load_data, preset, replace_train
from undiffuse.report import table
from undiffuse.report.figures import image_grid

SIDE = 16


def balls(n: int, seed: int = 0) -> np.ndarray:
    """(n, 1, 16, 16, 16) uint8: balls with soft edges, radius 3 to 6 voxels, at random positions."""
    random = np.random.default_rng(seed)
    radius = random.uniform(3, 6, (n, 1, 1, 1))
    centre = [random.uniform(radius, SIDE - 1 - radius) for _ in range(3)]
    grid = np.mgrid[:SIDE, :SIDE, :SIDE]
    distance = np.sqrt(sum((axis - middle) ** 2 for axis, middle in zip(grid, centre, strict=True)))
    return (255 * np.clip(radius - distance + 0.5, 0, 1)).round().astype(np.uint8)[:, None]


def statistics(values: np.ndarray) -> dict[str, float]:
    """Filled voxels, the radius of a ball of that volume, and its mean difference to the radius from the variance."""
    mass = values[:, 0] / 255.0
    filled, variance = mass.sum((1, 2, 3)), np.zeros(len(mass))
    for axis in np.mgrid[:SIDE, :SIDE, :SIDE]:
        centre = (mass * axis).sum((1, 2, 3)) / filled
        variance += (mass * (axis - centre[:, None, None, None]) ** 2).sum((1, 2, 3)) / filled
    radius = np.cbrt(0.75 * filled / np.pi)
    error = np.abs(radius - np.sqrt(variance * 5 / 3))
    return {"filled": filled.mean(), "filled std": filled.std(), "radius": radius.mean(), "not round": error.mean()}


def main(out: Path, recipe: Config, n: int = 2000, n_samples: int = 64) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "balls.npy", balls(n))
    data = load_data(out / "balls.npy")
    model = load(fit(recipe, data, out / "run"))
    samples = model.sample(n_samples, seed=1).numpy()
    table.render([{"": "real", **statistics(data.values)}, {"": "generated", **statistics(samples)}], "voxels")
    image_grid(samples[:24], data.num_values).save(out / "generated.png")
    return out / "generated.png"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    minutes = float(sys.argv[2]) if len(sys.argv) > 2 else 10.0
    print(main(Path(sys.argv[1]), replace_train(preset("volume"), minutes=minutes)))
