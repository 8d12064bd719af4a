"""``undiffuse interpolate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from undiffuse import checkpoint
from undiffuse.cli.guide import class_names
from undiffuse.cli.options import Device, RunArgument, at_most, beside, console, device_of
from undiffuse.cli.restore import image_model
from undiffuse.cli.told import tell
from undiffuse.codec import Pixels
from undiffuse.data.single import load_image
from undiffuse.errors import ConfigError
from undiffuse.inverse.codes import slerp
from undiffuse.report import pictures


def interpolate(
    run: RunArgument,
    one: Annotated[Path, typer.Argument(help="The image to begin with.", metavar="A")],
    other: Annotated[Path, typer.Argument(help="The image to end with.", metavar="B")],
    n: Annotated[int, typer.Option(help="How many images, A and B among them.", min=2)] = 9,
    steps: Annotated[
        int, typer.Option(help="Steps of the flow each way, four calls each, at most the chain's.", min=1)
    ] = 50,
    label: Annotated[str | None, typer.Option(help="What A and B are: a class of the model.")] = None,
    out: Annotated[Path | None, typer.Option(help="The PNG file; in the run's pictures if not given.")] = None,
    device: Device = "auto",
) -> None:
    """A strip of images from A to B: their codes under the model's flow, and what lies on the arc between."""
    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError("OUT", out, "it names no PNG file", "Give a name that ends in .png")
    model = image_model(checkpoint.load(run, device_of(device)), run)
    channels, *sides = model.item_shape
    steps = at_most(steps, model.steps)
    assert isinstance(model.codec, Pixels)
    ends, told = [], tell(class_names(model), [label] if label else ())
    for path in (one, other):
        picture = load_image(path, channels, sides)
        ends.append(model.codec.decode(Pixels(picture.levels).encode(torch.tensor(picture.pixels)[None])))
    codes = model.encode(torch.cat(ends), steps, told and told(range(2)))
    share = torch.linspace(0, 1, n)
    values = model.decode(slerp(codes[0], codes[1], share), steps, told and told(range(n)))
    away = (values[[0, -1]].long() - torch.cat(ends).long()).abs().max()
    path = out or beside(run) / "pictures" / f"{one.stem}-to-{other.stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [f"{float(w):.2f}" for w in share]
    pictures.strip(values[:, None].numpy(), labels, model.codec.levels).save(path)
    console.print(f"{n} images, of which the first and last are A and B to {int(away)} levels: {path}", markup=False)
