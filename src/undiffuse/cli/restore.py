"""``undiffuse restore``."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from undiffuse import checkpoint
from undiffuse.cli.guide import class_names
from undiffuse.cli.options import Device, RunArgument, at_most, beside, console, device_of
from undiffuse.cli.told import tell
from undiffuse.codec import Pixels
from undiffuse.data.single import load_image
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.report import pictures
from undiffuse.report.files import write_samples
from undiffuse.restore import NAMES, Damage, best, degraded, misfit, restored, rounding, walked

SHOWN = 6
"""Answers in the strip."""


def restore(
    run: RunArgument,
    image: Annotated[Path, typer.Argument(help="The image to restore.", metavar="IMAGE")],
    mask: Annotated[
        Path | None,
        typer.Option(help="An image of IMAGE's size: white or transparent where IMAGE is to be made up, else black."),
    ] = None,
    upsample: Annotated[int, typer.Option(help="IMAGE is so many times smaller a side than the model's.", min=1)] = 1,
    blur: Annotated[float, typer.Option(help="IMAGE was blurred by a Gaussian of so many (large) pixels.", min=0)] = 0,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of IMAGE's noise, as a share of black to white.", min=0)
    ] = 0,
    degrade: Annotated[
        bool, typer.Option("--degrade", help="IMAGE is whole: do all this to it first, then restore it.")
    ] = False,
    method: Annotated[
        str | None, typer.Option(help=f"{', '.join(NAMES)}; pigdm if not given and blurred, else mmps.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="What IMAGE is: a class of the model; several in turn.")
    ] = None,
    n: Annotated[int, typer.Option(help="How many answers: all agree with IMAGE, none is the truth.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Answer i is a function of (seed, i) alone.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the solver, at most the chain's own.", min=1)] = 100,
    batch: Annotated[int, typer.Option(help="Answers at a time; changes no result.", min=1)] = 16,
    out: Annotated[Path | None, typer.Option(help="A new folder for them; one in the run if not given.")] = None,
    device: Device = "auto",
) -> None:
    """Fill in, enlarge, sharpen or denoise IMAGE with a model of such images: answers, their mean and spread."""
    if out is not None and (out.is_file() or _taken(out)):
        cause = "it is a file" if out.is_file() else "there are answers already"
        raise ConfigError("OUT", out, cause, "Give another folder, or remove it")
    model = image_model(checkpoint.load(run, device_of(device)), run)
    channels, *sides = model.item_shape
    if mask is None and upsample == 1 and not blur and not noise:
        fix = "Give --mask, --upsample, --blur or --noise"
        raise ConfigError("USAGE", "restore", "nothing is said of what is wrong with the image", fix)
    damage = Damage(model.item_shape, blur, upsample, 2 * noise)
    small = damage.whole.seen[1:]
    picture = load_image(image, channels, sides if degrade else small)
    given = Pixels(picture.levels).encode(torch.tensor(picture.pixels)[None])[0]
    if mask is not None:
        hidden = load_image(mask, 1, small)
        known = torch.tensor(2 * hidden.pixels.astype(int) < hidden.levels)
        damage = Damage(model.item_shape, blur, upsample, 2 * noise, known)
        if damage.only_mask and bool(known.all()):
            cause = "it hides nothing, so there is nothing to be made up"
            raise ConfigError("MASK", mask, cause, "Make white what is to be made up")
    method = method or best(damage)
    seen = degraded(damage, given, seed, picture.levels) if degrade else given
    steps, told = at_most(steps, model.steps), tell(class_names(model), label or ())
    began = time.perf_counter()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("restoring", total=n * walked(model, method, steps))
        settings: dict[str, Any] = {
            "method": method,
            "seed": seed,
            "steps": steps,
            "batch": batch,
            "floor": rounding(picture.levels),
        }
        settings |= {"progress": lambda done: bar.advance(task, done), "cond": told and told(range(n))}
        values = restored(model, damage, seen, n, **settings)
    seconds = time.perf_counter() - began
    folder = out or _free(beside(run) / "restored" / f"{image.stem}-{method}")
    fits = misfit(model, damage, seen, values)
    asked = {
        "mask": mask and str(mask),
        "upsample": upsample,
        "blur": blur,
        "noise": noise,
        "degrade": degrade,
        "label": label,
    }
    plan = {"model": str(run), "image": str(image), **asked, "method": method, "seed": seed, "steps": steps}
    write_samples(folder, values.numpy(), model.info.get("levels"), {**plan, "misfit": [float(f) / 2 for f in fits]})
    strip(model, damage, given if degrade else None, seen, values).save(folder / "strip.png")
    expected = 100 * float((damage.noise_std**2 + rounding(picture.levels) ** 2) ** 0.5) / 2
    console.print(f"{n} answers by {method} in {steps} steps, {seconds:.1f} s", markup=False)
    console.print(
        f"they fit what is seen to {50 * float(fits.mean()):.2f} % of black to white; its noise and rounding "
        f"are {expected:.2f} %",
        markup=False,
    )
    if degrade:
        error = 50 * float((model.codec.encode(values).mean(0) - given).square().mean().sqrt())
        console.print(f"their mean is {error:.2f} % away from the whole image (root mean square)", markup=False)
    console.print(f"side by side: {folder}/strip.png, one by one: {folder}/000000.png ...", markup=False)


def _taken(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def _free(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... where there are no answers yet."""
    names = itertools.chain([folder.name], (f"{folder.name}-{i}" for i in itertools.count(2)))
    return next(path for path in map(folder.with_name, names) if not _taken(path))


def image_model(model: Diffusion, run: Path) -> Diffusion:
    """The model, if it is one of grey or RGB images. Raises `ConfigError`."""
    if not isinstance(model.codec, Pixels) or len(model.item_shape) != 3 or model.item_shape[0] not in (1, 3):
        shape = "x".join(map(str, model.item_shape))
        fix = "Use a run that was trained on images"
        raise ConfigError("NOT_IMAGES", run, f"its items are {shape}, no grey or RGB images", fix)
    return model


def strip(model: Diffusion, damage: Damage, whole: torch.Tensor | None, seen: torch.Tensor, values: torch.Tensor):
    """Pictures side by side: the whole image if known, what is seen of it, answers, their mean and spread."""
    assert isinstance(model.codec, Pixels)
    x = model.codec.encode(values)
    shown = seen if damage.known is None else torch.where(damage.known, seen, 0.0)
    shown = shown.repeat_interleave(damage.shrink, -1).repeat_interleave(damage.shrink, -2)
    columns = [] if whole is None else [("whole", whole)]
    columns += [("seen", shown), *((f"answer {i}", x[i]) for i in range(min(len(x), SHOWN)))]
    if len(x) > 1:
        columns += [("mean", x.mean(0)), ("2 x spread", 2 * x.std(0, correction=0) - 1)]
    frames = model.codec.decode(torch.stack([column for _, column in columns])[:, None])
    return pictures.strip(frames.numpy(), [name for name, _ in columns], model.codec.levels)
