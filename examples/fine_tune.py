"""Fine-tunes a model of eight digits on the other two: ``python examples/fine_tune.py FOLDER [MINUTES]``.

Three runs go into FOLDER: a model of the digits 0 to 7, that model fine-tuned on 8 and 9, and a model that is trained
on 8 and 9 alone, each for MINUTES (by default 1). The bound of each on held-out images of 8 and 9 is printed.
"""

import sys
from pathlib import Path

import numpy as np
import torch

import undiffuse
from undiffuse.data.dataset import Dataset
from undiffuse.data.from_array import from_array
from undiffuse.training.initial_weights import recipe_of


def digits(first: int, last: int) -> Dataset:
    """The images of the digits ``first`` to ``last`` of the built-in set."""
    data = undiffuse.load_data("digits")
    chosen = np.flatnonzero((data.labels >= first) & (data.labels <= last))
    return from_array(np.asarray(data.values)[chosen], num_values=data.num_values, name=f"digits {first} to {last}")


def main(folder: str | Path, recipe: undiffuse.Config | None = None, **length) -> dict[str, float]:
    folder, length = Path(folder), length or {"minutes": 1.0}
    fresh = undiffuse.replace_train(recipe or undiffuse.preset("digits"), **length)
    many, few = digits(0, 7), digits(8, 9)
    run = undiffuse.fit(fresh, many, folder / "start")
    tuned = undiffuse.replace_train(recipe_of(run, few, fresh.train), **length)
    runs = {
        "trained on 0 to 7": run,
        "fine-tuned on 8 and 9": undiffuse.fit(tuned, few, folder / "tuned", init=run),
        "trained on 8 and 9": undiffuse.fit(fresh, few, folder / "alone"),
    }
    held_out = torch.from_numpy(few.values[few.split().test])
    bounds = {}
    for name, path in runs.items():
        model = undiffuse.load(path)
        bounds[name] = float(model.nll(held_out, mc_samples=50).bits_per_dim(model.dims).mean())
        print(f"{name:22} at most {bounds[name]:.3f} bits per dimension of 8 and 9")
    return bounds


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1], minutes=float(sys.argv[2]) if len(sys.argv) > 2 else 1.0)
    else:
        print(__doc__)
