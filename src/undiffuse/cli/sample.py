"""``undiffuse sample``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from undiffuse import checkpoint
from undiffuse.cli.options import Device, RunArgument, beside, console, device_of
from undiffuse.report.files import write_samples


def sample(
    run: RunArgument,
    n: Annotated[int, typer.Option(help="How many samples.", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="Item i is a function of (seed, i) alone.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps of the solver.", min=1)] = 100,
    solver: Annotated[str, typer.Option(help="ddim (deterministic) or ancestral.")] = "ddim",
    batch: Annotated[int, typer.Option(help="Samples at a time; changes no result.", min=1)] = 64,
    out: Annotated[Path | None, typer.Option(help="Where to put them; a folder in the run if not given.")] = None,
    device: Device = "auto",
) -> None:
    """Draw samples from a trained model: single files, a grid, an array, and a manifest of seeds."""
    model = checkpoint.load(run, device_of(device))
    steps = min(steps, model.steps)
    folder = out or beside(run) / "samples" / f"{solver}-{steps}-seed-{seed}"
    began = time.perf_counter()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("sampling", total=n * steps)
        values = model.sample(n, seed, solver, steps, batch, lambda done: bar.advance(task, done))
    seconds = time.perf_counter() - began
    manifest = {"model": str(run), "seed": seed, "solver": solver, "steps": steps}
    grid = write_samples(folder, values.numpy(), model.info.get("levels"), manifest)
    console.print(
        f"{n} samples by {solver} in {steps} steps, {seconds:.1f} s ({n / seconds:.1f} a second)", markup=False
    )
    if grid is not None:
        console.print(f"grid: {grid}", markup=False)
    console.print(f"all of them: {folder}/samples.npz, seeds in {folder}/manifest.json", markup=False)
