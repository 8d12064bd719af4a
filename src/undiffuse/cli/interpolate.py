"""``undiffuse interpolate``: images between two images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.data_options import recorded_options, refuse_inside
from undiffuse.cli.guidance_options import class_names
from undiffuse.cli.label_options import make_condition, parse_labels
from undiffuse.cli.options import (
    Device,
    NetworkFile,
    RunArgument,
    console,
    limit_steps,
    register_network,
    require_memory_for,
    resolve_device,
    run_folder,
)
from undiffuse.cli.prompt_options import EncoderFolder, PromptOfImage, prompt_condition
from undiffuse.errors import ConfigError, counted
from undiffuse.runtime.side_files import numbered


def interpolate(
    run: RunArgument,
    one: Annotated[Path, typer.Argument(help="The first image.", metavar="A")],
    other: Annotated[Path, typer.Argument(help="The last image.", metavar="B")],
    n: Annotated[int, typer.Option(help="Number of images, including A and B.", min=2)] = 9,
    steps: Annotated[
        int, typer.Option(help="Steps of the flow each way, four calls each, at most those of the chain.", min=1)
    ] = 50,
    label: Annotated[str | None, typer.Option(help="The class of A and B.")] = None,
    prompt: PromptOfImage = None,
    text_encoder: EncoderFolder = None,
    out: Annotated[Path | None, typer.Option(help="The PNG file; default is a new one in the run's pictures.")] = None,
    network: NetworkFile = None,
    device: Device = "auto",
) -> None:
    """Draw a strip of images from A to B.

    The noise that the model's flow assigns to A and B is interpolated on an arc.
    """
    import torch

    from undiffuse.data.single import load_image
    from undiffuse.data.transform import IntegerLevels
    from undiffuse.model import checkpoint, inversion
    from undiffuse.model.arguments import check_predicts_mean
    from undiffuse.model.restoration import check_image_model
    from undiffuse.report import figures
    from undiffuse.runtime.own_output import refuse_other_file, save_picture

    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError("OUT", out, "it is not the name of a PNG file", "Give a name that ends in .png")
    refuse_inside(out, None, run)
    strip = out or _free_picture(run_folder(run) / "pictures", f"{one.stem}-to-{other.stem}")
    refuse_other_file(strip)
    register_network(network)
    model = checkpoint.load(run, resolve_device(device))
    transform = check_image_model(model, run)
    check_predicts_mean(model.config, run)
    channels, *sides = model.item_shape
    require_memory_for(f"--n {n}", 4 * n * model.dims)
    steps = limit_steps(steps, model.chain_length)
    text = prompt_condition(model, run, [prompt] if prompt else (), text_encoder)
    labels = parse_labels(class_names(model), [label]) if label else ()
    if len(labels) > 1:
        raise ConfigError("LABEL", f"--label {label}", "A and B have one class", "Give its name")
    condition = make_condition(class_names(model), [label] if label else (), text=text)
    prepare = recorded_options(run)
    images = [load_image(path, channels, sides, prepare) for path in (one, other)]
    for path, image in zip((one, other), images, strict=True):
        if prepare and image.changes:
            console.print(f"note: {path}: {', '.join(image.changes)}")
    x = [IntegerLevels(image.num_values).to_model(torch.tensor(image.pixels)[None]) for image in images]
    ends = torch.cat([transform.to_data(item) for item in x])
    values = inversion.interpolate(model, ends, n, steps, condition and condition(range(n)))
    error = (values[[0, -1]].long() - ends.long()).abs().max()
    strip.parent.mkdir(parents=True, exist_ok=True)
    captions = [f"{weight:.2f}" for weight in torch.linspace(0, 1, n).tolist()]
    save_picture(figures.image_strip(values[:, None].numpy(), captions, transform.num_values), strip)
    console.print(
        f"{n} images: {strip}; the first and last differ from A and B by at most {counted(int(error), 'level')}",
    )


def _free_picture(folder: Path, stem: str) -> Path:
    """The first of STEM.png, STEM-2.png, STEM-3.png ... that is not in ``folder``."""
    return next(path for name in numbered(stem) if not os.path.lexists(path := folder / f"{name}.png"))
