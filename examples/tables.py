"""Learn a table and generate new rows of each class: ``python examples/tables.py OUT [MINUTES]``.

The table has 178 wines of scikit-learn: thirteen measurements, and three growers as classes. OUT/wine.csv is the
training data, OUT/generated.csv has as many new rows, OUT/generated.png plots them; a table compares the columns.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_wine

from undiffuse import Condition, Config, fit, load, load_data, preset, replace_train
from undiffuse.report import table
from undiffuse.report.figures import image_grid


def write(path: Path, columns: list[str], rows: np.ndarray, labels: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, "label"])
        writer.writerows([*row, label] for row, label in zip(rows, labels, strict=True))


def main(out: Path, recipe: Config) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    wine = load_wine()
    write(out / "wine.csv", wine.feature_names, wine.data, [str(wine.target_names[i]) for i in wine.target])
    data = load_data(out / "wine.csv")
    model = load(fit(replace_train(recipe, conditional=True), data, out / "run"))
    cond = Condition(label=torch.from_numpy(data.labels))
    samples = model.sample(len(data), seed=1, cond=cond).numpy()
    write(out / "generated.csv", list(data.columns), samples, [data.classes[i] for i in data.labels])
    image_grid(samples, names=data.columns).save(out / "generated.png")
    rows = []
    for i, column in enumerate(data.columns):
        row: dict[str, object] = {"column": column}
        for label, name in enumerate(data.classes):
            for title, values in ((name, data.values), (f"generated {name}", samples)):
                cells = values[data.labels == label, i].astype(float)
                row[title] = f"{cells.mean():.4g} ± {cells.std():.2g}"
        rows.append(row)
    table.render(rows, "mean ± standard deviation")
    difference = np.abs(np.corrcoef(data.values.T) - np.corrcoef(samples.T)).max()
    print(f"correlations of two columns differ by at most {difference:.2f}; the rows are in {out}/generated.csv")
    return out / "generated.png"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    minutes = float(sys.argv[2]) if len(sys.argv) > 2 else 2.0
    print(main(Path(sys.argv[1]), replace_train(preset("vector"), batch=128, minutes=minutes)))
