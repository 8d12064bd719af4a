"""Learns a table and draws new rows of it, kind by kind: ``python examples/tables.py OUT [MINUTES]``.

The table is scikit-learn's of 178 wines: thirteen measurements and which of three growers. OUT/wine.csv is what it
learns from, OUT/drawn.csv has as many new rows, OUT/drawn.png shows them, and the table compares columns.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_wine

from undiffuse import Condition, Config, data, fit, load, presets
from undiffuse.config import replace_train
from undiffuse.report import pictures, table


def write(path: Path, names: list[str], rows: np.ndarray, words: list[str]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*names, "label"], *([*row, word] for row, word in zip(rows, words, strict=True))])


def main(out: Path, recipe: Config) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    wine = load_wine()
    write(out / "wine.csv", wine.feature_names, wine.data, [str(wine.target_names[i]) for i in wine.target])
    real = data.load(out / "wine.csv")
    model = load(fit(replace_train(recipe, conditional=True), real, out / "run"))
    labels = torch.from_numpy(real.labels)
    drawn = model.sample(len(real), seed=1, cond=Condition(label=labels)).numpy()
    write(out / "drawn.csv", list(real.columns), drawn, [real.classes[i] for i in real.labels])
    pictures.grid(drawn, names=real.columns).save(out / "drawn.png")
    rows = []
    for i, name in enumerate(real.columns):
        row: dict[str, object] = {"column": name}
        for kind, word in enumerate(real.classes):
            values, new = (rows[real.labels == kind, i].astype(float) for rows in (real.values, drawn))
            row |= {
                word: f"{values.mean():.4g} ± {values.std():.2g}",
                f"drawn {word}": f"{new.mean():.4g} ± {new.std():.2g}",
            }
        rows.append(row)
    table.render(rows, "mean ± standard deviation of a column")
    apart = np.abs(np.corrcoef(real.values.T) - np.corrcoef(drawn.T)).max()
    print(f"correlations of two columns are at most {apart:.2f} apart; drawn.csv is in {out}")
    return out / "drawn.png"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    minutes = float(sys.argv[2]) if len(sys.argv) > 2 else 2.0
    print(main(Path(sys.argv[1]), replace_train(presets.get("vector"), batch=128, minutes=minutes)))
