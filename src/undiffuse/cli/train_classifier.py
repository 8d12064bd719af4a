"""``undiffuse train-classifier``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.data_options import ReadData, print_notes, with_data_options
from undiffuse.cli.options import DataArgument, Device, console, resolve_device
from undiffuse.cli.train import (
    Batch,
    Epochs,
    Extend,
    Force,
    LearningRate,
    Minutes,
    OnNonfinite,
    Steps,
    changes_as_table,
    check_length,
    extend_run,
    format_length,
    open_run,
    report_finished,
    steps_of_epochs,
    with_length,
)
from undiffuse.errors import ConfigError, counted
from undiffuse.model.presets import PRESETS

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.training.classifier_task import ClassifierConfig


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
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers; 0 if not given.")] = None,
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
    force: Force = False,
    extend: Extend = False,
    *,
    read: ReadData,
) -> None:
    """Train a classifier of noisy items on the labels of DATA, for `sample --classifier`; 5 minutes if not given.

    An unfinished run is resumed.
    """
    from undiffuse.model import config as configs
    from undiffuse.model.noisy_classifier import load
    from undiffuse.report import table
    from undiffuse.training.classifier_task import ClassifierConfig, fit_classifier

    device = resolve_device(device)
    check_length(minutes, steps, epochs)
    run = open_run(out, data, "-classifier")
    dataset = read(data)
    print_notes(dataset)
    if extend:
        if (epochs, batch, lr, seed, preset, config) != (None,) * 6:
            cause = "an extended run keeps the recipe that it began with"
            raise ConfigError("USAGE", "--extend", cause, "Give it with --minutes or --steps alone")
        extend_run(run, dataset, device, ClassifierConfig, steps, minutes, force=force)
        minutes = steps = None
    record, finished = run.record, run.finished
    if record is not None and (minutes, steps, epochs, batch, lr, seed, preset, config) == (None,) * 8:
        recipe = configs.from_dict(ClassifierConfig, record["config"], "run.json")
    else:
        recipe = recipe_for(dataset, device, preset)
        recipe = recipe if config is None else configs.read(config, recipe)
        given = {name: value for name, value in (("batch", batch), ("lr", lr), ("seed", seed)) if value is not None}
        recipe = configs.replace_train(recipe, **{"seed": 0, **given})
        if epochs is not None:
            steps = steps_of_epochs(epochs, dataset, recipe.train)
        recipe = with_length(recipe, minutes, steps, default=5.0)
    if on_nonfinite is not None:
        recipe = replace(recipe, train=replace(recipe.train, on_nonfinite=on_nonfinite))
    length = format_length(recipe.train)
    if not finished:
        console.print(f"a classifier of {len(dataset.classes)} classes, {length}, into {run.folder}")
    with changes_as_table():
        fit_classifier(recipe, dataset, run.folder, device, force=force)
    if finished:
        report_finished(run)
        return
    if rows := load(run.folder).info.get("accuracy"):
        table.render([_row(row) for row in rows], counted(rows[0]["items"], "held-out item"))
    console.print(f"done: {run.folder}; use it by `undiffuse sample` with --classifier {run.folder} and --label")


def recipe_for(data: Dataset, device: str, name: str | None = None, **settings: Any) -> ClassifierConfig:
    """The network, batch and learning rate of the preset called ``name``, with ``settings`` of `TrainConfig`.

    The preset is by default that for these data. Weight decay is that of Dhariwal21's code. There are no snapshots,
    because `undiffuse ema` is for diffusion models.
    """
    from undiffuse.model import presets
    from undiffuse.model.noisy_classifier import NoisyClassifierConfig
    from undiffuse.training.classifier_task import ClassifierConfig

    name = name or presets.choose(data.item_shape, device)
    base = presets.adapt_to_data(presets.get(name), data.num_values)
    log_snr = {name: base.model.schedule[name] for name in ("low", "high") if name in base.model.schedule}
    train = replace(base.train, weight_decay=0.05, snapshots=0, **settings)
    pooling = presets.CLASSIFIER_POOLING.get(name, "mean")
    return ClassifierConfig(NoisyClassifierConfig(base.model.network, **log_snr, pooling=pooling), train)


def _row(row: dict[str, float]) -> dict[str, Any]:
    return {
        "log SNR": f"{row['log_snr']:.1f}",
        "held-out accuracy": (row["accuracy"], row["stderr"]),
        "log p(label), nats": row["log_prob"],
    }
