"""Learn two-year windows of weekly CO2 measurements: ``python examples/series.py OUT [MINUTES]``.

The measurements are those of Mauna Loa in statsmodels (``pip install statsmodels``). The model is trained on the first
80 % of the time and tested on the rest. OUT/windows.png shows generated windows; a table compares them with real ones.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from statsmodels.datasets import co2

from undiffuse import Config, Dataset, fit, from_array, load, preset, replace_train
from undiffuse.report import table
from undiffuse.report.figures import image_grid

WEEKS, STRIDE, TRAIN_FRACTION = 104, 2, 0.8  # weeks in a window and between two windows; fraction of the time


def windows() -> Dataset:
    """(N, 1, 104) ppm above the window's mean. The last windows are the test part; no week is in both parts."""
    ppm = co2.load_pandas().data.co2.interpolate().to_numpy(np.float32)
    cut = int(TRAIN_FRACTION * len(ppm))
    early, late = (np.lib.stride_tricks.sliding_window_view(part, WEEKS)[::STRIDE] for part in (ppm[:cut], ppm[cut:]))
    values = np.concatenate([early, late])[:, None]
    data = from_array(values - values.mean(-1, keepdims=True), layout="NCL", name="co2")
    return replace(data, test_from=len(early))


def statistics(values: np.ndarray) -> dict[str, float]:
    """Mean range within a window, mean and standard deviation of the yearly rise, and that of the weekly change."""
    values = values[:, 0].astype(float)
    rise = values[:, 52:].mean(1) - values[:, :52].mean(1)
    extent = values.max(1) - values.min(1)
    return {"range": extent.mean(), "rise": rise.mean(), "rise std": rise.std(), "weekly std": np.diff(values).std()}


def main(out: Path, recipe: Config) -> Path:
    data = windows()
    model = load(fit(recipe, data, out / "run"))
    samples = model.sample(200, seed=1).numpy()
    split = data.split(recipe.train.held_out)
    groups = {"training": data.values[split.train], "test": data.values[split.test], "generated": samples}
    table.render([{"ppm": name, **statistics(values)} for name, values in groups.items()], "two-year windows")
    image_grid(samples[:16]).save(out / "windows.png")
    return out / "windows.png"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    minutes = float(sys.argv[2]) if len(sys.argv) > 2 else 5.0
    print(main(Path(sys.argv[1]), replace_train(preset("series"), minutes=minutes)))
