"""Fills in the left half of images that a model has not seen: ``python examples/inpaint.py RUN [DATA]``.

RUN is a folder that `undiffuse train` made, DATA what it was trained on (by default the built-in set of that name).
RUN/pictures/inpainted.png has a row an image: the image, what is known of it, and three ways to go on.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from undiffuse import load_data
from undiffuse.model.checkpoint import load
from undiffuse.model.diffusion import Diffusion
from undiffuse.report import figures as pictures
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers.product import Product, inpainting_factor
from undiffuse.sampling.trajectory import rescale


def inpaint(model: Diffusion, values: Tensor, mask: Tensor, seed: int, steps: int = 100, repeats: int = 4) -> Tensor:
    """``values`` (n, C, H, W) with new numbers where ``mask`` is false, from a ``seed``.

    One pass hardly looks at what is known; each repeat of a step brings the new numbers nearer to their law given
    the known ones (docs/maths.md, products).
    """
    x = model.transform.to_model(values).to(model.device)
    solver = Product(inpainting_factor(x, mask.to(x.device)), model.config.variance, repeats)
    *_, last = model.trajectory(range(len(x)), seed, Sampler(solver, steps))
    return model.transform.to_data(rescale(last.x, last.level)).cpu()


def main(run: str, source: str | None = None, images: int = 8, steps: int = 100, repeats: int = 4) -> Path:
    model = load(run)
    held = load_data(source or model.info["name"])
    if held.fingerprint != model.info["fingerprint"]:
        raise SystemExit(
            f"{held.name} is not what this model was trained on, so nothing says which items are new to it"
        )
    values = torch.from_numpy(held.values[held.split(model.info["held_out"]).test[:images]])
    mask = torch.arange(values.shape[-1]) >= values.shape[-1] // 2
    grey = values.double().mean().to(values.dtype)
    columns = [values, torch.where(mask, values, grey)]
    columns += [inpaint(model, values, mask, seed, steps, repeats) for seed in range(3)]
    picture = pictures.image_grid(torch.stack(columns, 1).flatten(0, 1).numpy(), held.num_values, columns=len(columns))
    path = Path(run) / "pictures" / "inpainted.png"
    picture.save(path)
    return path


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None) if len(sys.argv) > 1 else __doc__)
