"""Learns two years of carbon dioxide in the air, week by week: ``python examples/series.py OUT [MINUTES]``.

The measurements are those of Mauna Loa that come with statsmodels (``pip install statsmodels``). The model learns from
windows of the first decades and is measured on the last years, which it has not seen. OUT/windows.png shows windows
that it draws, the table how they compare with real ones.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from statsmodels.datasets import co2

from undiffuse import Config, data, fit, load, presets
from undiffuse.config import replace_train
from undiffuse.report import pictures, table

WEEKS, EVERY, LEARNED = 104, 2, 0.8  # of a window, between two of them, and the share of time to learn from


def windows() -> data.Dataset:
    """(N, 1, 104) ppm above the window's mean; the last are an official test part that shares no week with the rest."""
    air = co2.load_pandas().data.co2.interpolate().to_numpy(np.float32)
    cut = int(LEARNED * len(air))
    early, late = (np.lib.stride_tricks.sliding_window_view(part, WEEKS)[::EVERY] for part in (air[:cut], air[cut:]))
    both = np.concatenate([early, late])[:, None]
    made = data.from_array(both - both.mean(-1, keepdims=True), layout="NCL", name="co2")
    return replace(made, test_from=len(early))


def told(values: np.ndarray) -> dict[str, float]:
    """What one can say of windows in ppm: how far they swing, rise in a year, and jump from week to week."""
    values = values[:, 0].astype(float)
    year = values[:, 52:].mean(1) - values[:, :52].mean(1)
    swing, jump = values.max(1) - values.min(1), np.diff(values)
    return {"swing": swing.mean(), "a year's rise": year.mean(), "its spread": year.std(), "weekly jump": jump.std()}


def main(out: Path, recipe: Config) -> Path:
    seen = windows()
    model = load(fit(recipe, seen, out / "run"))
    drawn = model.sample(200, seed=1).numpy()
    split = seen.split(recipe.train.held_out)
    groups = {"learned from": seen.values[split.train], "years after": seen.values[split.test], "drawn": drawn}
    table.render([{"ppm": name, **told(values)} for name, values in groups.items()], "windows of two years")
    pictures.grid(drawn[:16]).save(out / "windows.png")
    return out / "windows.png"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    minutes = float(sys.argv[2]) if len(sys.argv) > 2 else 5.0
    print(main(Path(sys.argv[1]), replace_train(presets.get("series"), minutes=minutes)))
