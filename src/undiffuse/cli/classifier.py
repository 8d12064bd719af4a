"""``undiffuse train-classifier``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from undiffuse import config as configuration
from undiffuse import data as datasets
from undiffuse import presets
from undiffuse.cli.options import DataArgument, Device, console, device_of
from undiffuse.cli.reading import Read, reads_data
from undiffuse.errors import ConfigError
from undiffuse.report import table
from undiffuse.train import Run
from undiffuse.train.classifier import ClassifierConfig, load
from undiffuse.train.classifier_loop import Recipe, fit


@reads_data
def train_classifier(
    data: DataArgument,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/DATA-classifier if not given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for about so long; 5 if not given.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for so many optimiser steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Device = "auto",
    *,
    read: Read,
) -> None:
    """Train a classifier of noisy items on the labels of DATA, for `sample --classifier`; goes on where it stopped."""
    if minutes is not None and steps is not None:
        raise ConfigError("USAGE", "--minutes, --steps", "both say when to stop", "Give one of them")
    dataset = read(data)
    run = Run(out or Path("runs") / f"{Path(data.rstrip('/')).name.split('.')[0]}-classifier")
    if run.finished:
        console.print(f"{run.folder} is a finished run already; give --out another folder to train again", markup=False)
        return
    if run.record is not None and (minutes, steps, seed) == (None, None, 0):
        recipe = configuration.from_dict(Recipe, run.record["config"], "run.json")
    else:
        minutes = 5.0 if (minutes, steps) == (None, None) else minutes
        recipe = recipe_for(dataset, device_of(device), minutes=minutes, steps=steps, seed=seed)
    length = f"{recipe.train.minutes:g} minutes" if recipe.train.minutes else f"{recipe.train.steps:,} steps"
    console.print(f"a classifier of {len(dataset.classes)} classes, {length}, into {run.folder}", markup=False)
    fit(recipe, dataset, run.folder, device_of(device), lambda line: console.print(line, markup=False))
    rows = load(run.folder).info["accuracy"]
    shown = [
        {
            "log SNR": f"{row['log_snr']:.1f}",
            "held-out accuracy": (row["accuracy"], row["stderr"]),
            "log p(label), nats": row["log_prob"],
        }
        for row in rows
    ]
    if rows:
        table.render(shown, f"{rows[0]['items']:,} held-out items")
    console.print(f"next: undiffuse sample RUN --classifier {run.folder} --label NAME", markup=False)


def recipe_for(data: datasets.Dataset, device: str, **settings) -> Recipe:
    """The network, batch and rate of the preset that suits the data, with the weight decay of Dhariwal21's code."""
    base = presets.fitted(presets.get(presets.choose(data.item_shape, data.levels, device)), data.levels)
    range_ = {name: base.model.schedule[name] for name in ("low", "high") if name in base.model.schedule}
    train = replace(base.train, weight_decay=0.05, **settings)
    return Recipe(ClassifierConfig(base.model.network, **range_), train)
