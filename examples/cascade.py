"""Trains a cascade of digits, 4×4 then 8×8, and draws it: ``python examples/cascade.py OUT [MINUTES]``.

Each of the two models trains for MINUTES (1 by default) into a run in OUT. stages.png has pairs of rows: images of the
base, enlarged, and below them what the second model makes of them. The bound of ten held-out digits is printed.
"""

import sys
from pathlib import Path

import torch

from undiffuse import fit, load_data, preset, replace_train
from undiffuse.data.stage_data import reduce_data, split_data
from undiffuse.model.cascade import Cascade
from undiffuse.report import figures


def main(out: str, minutes: float | None = 1.0, columns: int = 12, name: str = "haar", **settings) -> Path:
    data = load_data("digits")
    config = replace_train(preset("digits"), minutes=minutes, **settings)
    base = fit(config, reduce_data(data, 4, name), Path(out) / "base")
    large = fit(config, split_data(data, 4, name), Path(out) / "large")
    cascade = Cascade.load([base, large])

    small = cascade.models[0].sample(2 * columns)
    enlarged = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    drawn = cascade.sample(2 * columns)  # of the same small images: item i depends on (seed, i) alone
    rows = torch.cat([part for i in (0, columns) for part in (enlarged[i : i + columns], drawn[i : i + columns])])
    path = Path(out) / "stages.png"
    figures.image_grid(rows.numpy(), data.num_values, columns=columns).save(path)

    items = data.split().test[:10]
    nll = cascade.nll(torch.from_numpy(data.values[items]), mc_samples=100)
    bits = nll.bits_per_dim(cascade.dims).mean()
    print(f"{bits:.3f} bits per dimension, of which the base {nll.per_step[:, 0].sum() / nll.total.sum():.0%}")
    return path


if __name__ == "__main__":
    print(main(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 1.0) if len(sys.argv) > 1 else __doc__)
