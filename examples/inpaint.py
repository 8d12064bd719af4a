"""Fills in the left half of images that a model has not seen: ``python examples/inpaint.py RUN [DATA]``.

RUN is a folder that `undiffuse train` made, DATA what it was trained on (by default the built-in set of that name).
RUN/pictures/inpainted.png has a row an image: the image, what is known of it, and three ways to go on.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from undiffuse import Diffusion, data, load
from undiffuse.report import pictures
from undiffuse.sample import to_data
from undiffuse.solvers.product import Product, known


def inpaint(model: Diffusion, values: Tensor, mask: Tensor, seed: int, steps: int = 100, repeats: int = 4) -> Tensor:
    """``values`` (n, C, H, W) with new numbers where ``mask`` is false, from a ``seed``.

    One pass hardly looks at what is known; each repeat of a step brings the new numbers nearer to their law given
    the known ones (docs/maths.md, products).
    """
    x = model.codec.encode(values).to(model.device)
    solver = Product(known(x, mask.to(x.device)), model.config.variance, repeats)
    *_, last = model.trajectory(range(len(x)), seed, solver, steps)
    return model.codec.decode(to_data(last.x, last.level)).cpu()


def main(run: str, source: str | None = None, images: int = 8, steps: int = 100, repeats: int = 4) -> Path:
    model = load(run)
    held = data.load(source or model.info["name"])
    if held.fingerprint != model.info["fingerprint"]:
        raise SystemExit(
            f"{held.name} is not what this model was trained on, so nothing says which items are new to it"
        )
    values = torch.from_numpy(held.values[held.split(model.info["held_out"]).test[:images]])
    mask = torch.arange(values.shape[-1]) >= values.shape[-1] // 2
    grey = values.double().mean().to(values.dtype)
    columns = [values, torch.where(mask, values, grey)]
    columns += [inpaint(model, values, mask, seed, steps, repeats) for seed in range(3)]
    picture = pictures.grid(torch.stack(columns, 1).flatten(0, 1).numpy(), held.levels, columns=len(columns))
    path = Path(run) / "pictures" / "inpainted.png"
    picture.save(path)
    return path


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None) if len(sys.argv) > 1 else __doc__)
