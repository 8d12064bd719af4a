"""``undiffuse sample``: as many as asked for, part by part, by any solver, guided or not, stopped and gone on with."""

from __future__ import annotations

import hashlib
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from undiffuse import checkpoint
from undiffuse.advise import Choice
from undiffuse.cli.choose import QUALITIES, choose, read_advice
from undiffuse.cli.crew import join
from undiffuse.cli.guide import class_names, guide
from undiffuse.cli.options import Device, RunArgument, at_most, beside, console, device_of
from undiffuse.cli.told import Tell, says_something, tell
from undiffuse.diffusion import Diffusion
from undiffuse.grids import SPACINGS
from undiffuse.guidance import THRESHOLDS, Guidance
from undiffuse.report import animation
from undiffuse.report.files import Album
from undiffuse.solvers import SOLVERS
from undiffuse.train import Interrupted

MOVING, MOMENTS = 16, 60
"""Items of a moving picture, and the most moments that it shows."""


def sample(
    run: RunArgument,
    n: Annotated[int, typer.Option(help="How many samples.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Item i is a function of (seed, i) alone.")] = 0,
    quality: Annotated[str | None, typer.Option(help=f"{', '.join(QUALITIES)}; good if nothing else is said.")] = None,
    calls: Annotated[
        int | None, typer.Option(help="Network calls a sample; by the advice of 'advise' if there is any.", min=1)
    ] = None,
    solver: Annotated[str | None, typer.Option(help=f"One of {', '.join(SOLVERS)}.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the solver, such as eta=0.5; may be repeated.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver, at most the chain's own.", min=1)] = None,
    spacing: Annotated[str | None, typer.Option(help=f"Where they are: {', '.join(SPACINGS)}.")] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A class by name or number, all or none; several are taken in turn.")
    ] = None,
    cond: Annotated[
        Path | None, typer.Option(help="An array file of vectors or tokens to be told, taken in turn.")
    ] = None,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1 is none.")] = 1.0,
    guidance_interval: Annotated[
        tuple[float, float] | None, typer.Option(help="The log-SNRs, low and high, between which it works.")
    ] = None,
    guidance_rescale: Annotated[float, typer.Option(help="Share in which its spread is brought back, 0 to 1.")] = 0.0,
    classifier: Annotated[Path | None, typer.Option(help="A run of train-classifier that guides to --label.")] = None,
    classifier_scale: Annotated[float, typer.Option(help="How much it does.")] = 1.0,
    autoguide: Annotated[Path | None, typer.Option(help="A weaker model, to be led away from.")] = None,
    autoguide_scale: Annotated[float, typer.Option(help="How much; 1 is not at all.")] = 2.0,
    threshold: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(THRESHOLDS)}: x̂ beyond the range of the data is cut off in any case (none and static); "
            "dynamic shrinks the item instead. Only for data that have a range."
        ),
    ] = "none",
    animate: Annotated[
        Path | None, typer.Option(help="Also a moving picture of the first ones' way, .gif or .mp4.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples at a time; changes no result.", min=1)] = 64,
    out: Annotated[Path | None, typer.Option(help="Where to put them; a folder in the run if not given.")] = None,
    device: Device = "auto",
) -> None:
    """Draw samples from a trained model: single files, a grid, an array, and a manifest. A stopped command goes on."""
    rank, processes, place, gather = join(device_of(device))
    say = (lambda line: console.print(line, markup=False)) if rank == 0 else (lambda line: None)
    model = checkpoint.load(run, place)
    weights = checkpoint.fingerprint(model)
    low, high = guidance_interval or (None, None)
    scales = Guidance(guidance, low, high, guidance_rescale, classifier_scale, autoguide_scale, threshold)
    asked = {"label": label, "guidance": None if scales == Guidance() else asdict(scales)}
    files = {"cond": cond, "classifier": classifier, "autoguide": autoguide}
    names = class_names(model, classifier)
    told = tell(names, label or (), cond)
    steps = steps and at_most(steps, model.steps, say)
    choice = choose(
        model,
        lambda calls: read_advice(beside(run), weights, calls, say, asked | files),
        *(quality, calls, solver, setting or (), steps, spacing),
    )
    walk = {
        "solver": model.solver(choice.solver, **choice.settings),
        "steps": choice.steps,
        "spacing": choice.spacing if choice.times is None else "uniform",
        "times": choice.times,
        "guide": guide(model, scales, classifier, autoguide, cond is not None or says_something(names, label or ())),
    }
    plan = {"weights": weights, "seed": seed, **asdict(choice), **asked}
    plan |= {name: None if path is None else _sha256(path) for name, path in files.items()}
    folder = out or beside(run) / "samples" / _name(choice, label, scales, [p for p in files.values() if p], seed)
    album, items = Album(folder, plan, model.info.get("levels"), model.info.get("columns", ())), range(n)
    if animate is not None and rank == 0:
        _animate(animate, model, seed, range(min(n, MOVING)), told, walk, say)
    if album.finished(items):
        if rank == 0:
            album.tidy()
        say(f"these {n:,} samples are all there already")
        picture = folder / "grid.png"
    else:
        began = time.perf_counter()
        if rank == 0:
            album.begin(say)
        gather(None)
        gaps, blocks = album.missing(items), [items[first : first + batch] for first in range(0, n, batch)]
        mine = [
            range(max(block.start, gap.start), min(block.stop, gap.stop))
            for block in blocks[rank::processes]
            for gap in gaps
        ]
        try:
            _draw(model, album, [part for part in mine if part], seed, told, walk)
            gather(None)
            if rank:
                return
            seconds = time.perf_counter() - began
            picture = album.finish(items, {"model": str(run), "seconds": round(seconds, 3)})
        except KeyboardInterrupt:
            raise Interrupted(signal.SIGINT) from None
        each = sum(map(len, gaps)) / seconds
        say(f"{n:,} samples by {choice} in {_steps(choice)} steps, {seconds:.1f} s ({each:.1f} a second)")
    if picture is not None and picture.is_file():
        say(f"grid: {picture}")
    say(f"all of them: {album.array}, how they were made in {album.manifest}")


def _draw(
    model: Diffusion, album: Album, parts: list[range], seed: int, told: Tell | None, walk: dict[str, Any]
) -> None:
    levels = model.walk(walk["steps"], walk["spacing"], walk["times"])
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sampling", total=sum(map(len, parts)) * (len(levels) - 1))
        for part in parts:
            values = model.sample(
                len(part),
                seed,
                batch=len(part),
                progress=lambda done: bar.advance(task, done),
                first=part.start,
                cond=told and told(part),
                **walk,
            )
            album.add(part.start, values.numpy())


@torch.no_grad()
def _animate(
    path: Path,
    model: Diffusion,
    seed: int,
    items: range,
    told: Tell | None,
    walk: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    animation.check(path)
    states = model.trajectory(items, seed, cond=told and told(items), **walk)
    steps = len(model.walk(walk["steps"], walk["spacing"], walk["times"])) - 1
    shown = {round(i * steps / min(steps, MOMENTS)) for i in range(min(steps, MOMENTS) + 1)}
    frames = (model.codec.decode(state.x).cpu().numpy() for state in states if state.done in shown)
    animation.animate(path, frames, model.info.get("levels"))
    say(f"moving: {path}")


def _steps(choice: Choice) -> int:
    return choice.steps if choice.times is None else len(choice.times) - 1


def _name(choice: Choice, label: list[str] | None, scales: Guidance, files: list[Path], seed: int) -> str:
    """A name for a folder that says what is in it, as far as it differs from what most people draw."""
    spacing = [] if choice.spacing == "uniform" else [choice.spacing]
    words = [*str(choice).split(), str(_steps(choice)), *spacing, *(label or [])]
    default = asdict(Guidance())
    words += [f"{key}-{value}" for key, value in asdict(scales).items() if value != default[key]]
    words += [path.stem for path in files]
    return re.sub(r"[^\w.+-]+", "-", "-".join([*words, f"seed-{seed}"]))[-120:].strip("-.")


def _sha256(path: Path) -> str:
    file = path / "model.safetensors" if path.is_dir() else path
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
