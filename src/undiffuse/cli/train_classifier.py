"""``undiffuse train-classifier``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.data_options import ReadData, print_notes, with_data_options
from undiffuse.cli.options import DataArgument, Device, as_argument, console, resolve_device
from undiffuse.cli.recipe_options import RecipeOptions, format_length
from undiffuse.cli.results import show, with_json
from undiffuse.cli.training_options import (
    Batch,
    Epochs,
    Extend,
    Force,
    LearningRate,
    Log,
    Minutes,
    OnNonfinite,
    Steps,
    changes_as_table,
    open_run,
    report_done,
    report_finished,
)
from undiffuse.errors import counted
from undiffuse.model.presets import PRESETS

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.training.classifier_task import ClassifierRecipe


@with_json
@with_data_options
def train_classifier(
    data: DataArgument,
    out: Annotated[
        Path | None, typer.Option(help="The run folder, outside of DATA; runs/DATA-classifier if not given.")
    ] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch: Batch = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers; default that of --config or 0.")] = None,
    device: Device = "auto",
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"The recipe of the network: {', '.join(PRESETS)}; by default chosen from the data and the device."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with tables [model] and [train], which override the preset.")
    ] = None,
    on_nonfinite: OnNonfinite = None,
    log: Log = None,
    force: Force = False,
    extend: Extend = False,
    *,
    read: ReadData,
) -> None:
    """Train a classifier on DATA for `sample --classifier`.

    It predicts the labels of DATA from noisy items. An unfinished run is resumed. Training takes 5 minutes if no length
    is given.
    """
    from undiffuse.model.noisy_classifier import load
    from undiffuse.training.classifier_task import ClassifierRecipe, fit_classifier

    device = resolve_device(device)
    options = RecipeOptions(minutes, steps, epochs, batch, lr, seed, config, own=(preset,))
    run = open_run(out, data, "-classifier")
    dataset = read(data)
    print_notes(dataset)
    if extend:
        options = options.extended(run, dataset, device, ClassifierRecipe, force=force)
    finished = run.finished
    recipe, _ = options.recipe(
        run, dataset, ClassifierRecipe, lambda: recipe_for(dataset, device, preset), 5.0, on_nonfinite
    )
    length = format_length(recipe.train)
    if not finished:
        console.print(f"a classifier of {len(dataset.classes)} classes, {length}, into {run.folder}")
    with changes_as_table():
        fit_classifier(recipe, dataset, run.folder, device, force=force, loggers=log or ())
    if finished:
        report_finished(run)
        return
    if rows := load(run.folder).info.get("accuracy"):
        show([_row(row) for row in rows], counted(rows[0]["items"], "held-out item"), accuracy=rows)
    report_done(run)
    console.print(f"use it by `undiffuse sample` with --classifier {as_argument(run.folder)} and --label")


def recipe_for(data: Dataset, device: str, name: str | None = None) -> ClassifierRecipe:
    """The network, batch and learning rate of the preset called ``name``.

    The preset is by default that for these data. Weight decay is that of Dhariwal21's code. There are no snapshots,
    because `undiffuse ema` is for diffusion models.
    """
    from undiffuse.model import presets
    from undiffuse.model.noisy_classifier import NoisyClassifierConfig
    from undiffuse.training.classifier_task import ClassifierRecipe

    name = name or presets.choose(data.item_shape, device)
    base = presets.adapt_to_data(presets.get(name), data.num_values)
    log_snr = {name: base.model.schedule[name] for name in ("low", "high") if name in base.model.schedule}
    train = replace(base.train, optimizer="adamw", weight_decay=0.05, snapshots=0)
    pooling = presets.CLASSIFIER_POOLING.get(name, "mean")
    return ClassifierRecipe(NoisyClassifierConfig(base.model.network, **log_snr, pooling=pooling), train)


def _row(row: dict[str, float]) -> dict[str, Any]:
    return {
        "log SNR": f"{row['log_snr']:.1f}",
        "held-out accuracy": (row["accuracy"], row["stderr"]),
        "log p(label), nats": row["log_prob"],
    }
