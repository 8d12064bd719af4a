"""``undiffuse train``, and what it shares with ``undiffuse train-classifier``."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from undiffuse.cli.data_options import ReadData, lies_inside, print_notes, refuse_inside, with_data_options
from undiffuse.cli.options import (
    DataArgument,
    Device,
    NetworkFile,
    as_argument,
    console,
    network_option,
    register_network,
    resolve_device,
)
from undiffuse.cli.prompt_options import example_prompt
from undiffuse.errors import ConfigError, counted
from undiffuse.model.presets import PRESETS
from undiffuse.networks.tables import INSTALLED_NETWORKS
from undiffuse.process.tables import SCHEDULES

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.model.config import TrainConfig
    from undiffuse.training.run_folder import Run

T = TypeVar("T")
Minutes = Annotated[
    float | None,
    typer.Option(help="Train for about this many minutes; the learning-rate decay is planned to fit. Default 10."),
]
Steps = Annotated[int | None, typer.Option(help="Train for this many optimizer steps.")]
Epochs = Annotated[float | None, typer.Option(help="Train for this many passes over the training items.")]
Batch = Annotated[int | None, typer.Option(help="Items per optimizer step; by default that of the recipe.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate; by default that of the recipe.")]
OnNonfinite = Annotated[
    str | None,
    typer.Option(
        help="At a step whose loss or gradient is NaN or infinite: stop (default) ends the run, skip omits the step."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Resume a run although settings, data or torch have changed.")]
Extend = Annotated[
    bool, typer.Option("--extend", help="Make the run in --out longer by --minutes or --steps, with its own recipe.")
]


@with_data_options
def train(
    data: DataArgument,
    out: Annotated[Path | None, typer.Option(help="The run folder, outside of DATA; runs/DATA if not given.")] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch: Batch = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers; 0 if not given.")] = None,
    device: Device = "auto",
    preset: Annotated[
        str | None,
        typer.Option(help=f"A recipe: {', '.join(PRESETS)}; by default chosen from the data and the device."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file with tables [model] and [train], which override the preset. "
            f"Schedules: {', '.join(SCHEDULES)}. Kinds of network: {', '.join(INSTALLED_NETWORKS)}."
        ),
    ] = None,
    network: NetworkFile = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Start from the weights of this run or model file, with its settings (docs/recipes.md)."),
    ] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option(help="Train on the latents of this autoencoder: a run, or a file or folder of docs/latent.md."),
    ] = None,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Condition the network on the labels, vectors or tokens of the data.")
    ] = False,
    on_nonfinite: OnNonfinite = None,
    force: Force = False,
    extend: Extend = False,
    *,
    read: ReadData,
) -> None:
    """Train a model on DATA; an unfinished run is resumed."""
    from undiffuse.interop.autoencoders import load_autoencoder
    from undiffuse.model import config as configs
    from undiffuse.model import presets
    from undiffuse.training import initial_weights
    from undiffuse.training.diffusion_task import fit_diffusion

    device = resolve_device(device)
    conditional = conditional or bool(read.keywords.get("captions"))
    check_length(minutes, steps, epochs)
    network_class = register_network(network)
    run = open_run(out, data, stage_suffix(read.keywords) + ("" if autoencoder is None else "-latent"))
    dataset = read(data)
    print_notes(dataset)
    if extend:
        if (epochs, batch, lr, seed, preset, config, init, autoencoder) != (None,) * 8:
            cause = "an extended run keeps the recipe that it began with"
            raise ConfigError("USAGE", "--extend", cause, "Give it with --minutes or --steps alone")
        extend_run(run, dataset, device, configs.Config, steps, minutes, conditional=conditional, force=force)
        minutes = steps = None
    record, finished = run.record, run.finished
    encoder = None if autoencoder is None else load_autoencoder(autoencoder, dataset)
    if record is not None and (minutes, steps, epochs, batch, lr, seed, preset, config) == (None,) * 8:
        name, recipe = "as begun", configs.from_dict(configs.Config, record["config"], "run.json")
    else:
        name = preset or presets.choose(dataset.item_shape if encoder is None else encoder.latent_shape, device)
        base = presets.get(name) if encoder is None else presets.of_latents(presets.get(name))
        if init is not None and preset is None and config is None:
            name = str(init)
            if record is None:
                base = initial_weights.recipe_of(init, dataset, base.train, conditional, network_class)
            else:
                base = configs.from_dict(configs.Config, record["config"], "run.json")
        recipe = base if config is None else configs.read(config, base)
        given = {name: value for name, value in (("batch", batch), ("lr", lr), ("seed", seed)) if value is not None}
        recipe = configs.replace_train(recipe, **{"seed": 0, **given})
        if epochs is not None:
            steps = steps_of_epochs(epochs, dataset, recipe.train)
        recipe = with_length(recipe, minutes, steps)
    if conditional:
        recipe = configs.replace_train(recipe, conditional=True)
    if on_nonfinite is not None:
        recipe = configs.replace_train(recipe, on_nonfinite=on_nonfinite)
    if not finished:
        console.print(f"recipe {name!r}, {format_length(recipe.train)}, into {run.folder}")
    if dataset.report.skipped:
        console.print(f"skipped files are listed in {run.folder}/skipped.json")
    with changes_as_table():
        fit_diffusion(
            recipe, dataset, run.folder, device, init=init, force=force, network=network_class, autoencoder=encoder
        )
    if finished:
        report_finished(run)
        return
    console.print(f"done: {run.folder}/model.safetensors, pictures in {run.pictures}")
    has_test_part = dataset.held_out_fraction(recipe.train.held_out)[0] > 0 or dataset.test_from is not None
    own = network_option(network)
    part = "" if has_test_part else " --part train"
    folder = as_argument(run.folder)
    if "image" in dataset.condition_sizes:
        console.print(f"to sample: undiffuse sample BASE --then {folder}, BASE a model of the small images")
    else:
        console.print(f"next: undiffuse sample {folder}{example_prompt(dataset) if conditional else ''}{own}")
    console.print(f"next: undiffuse evaluate {folder}{part}{own}")


def check_length(minutes: float | None, steps: int | None, epochs: float | None = None) -> None:
    """Raise `ConfigError` if more than one is given, or a number of epochs that is not above 0 and finite."""
    given = [flag for flag, x in (("--minutes", minutes), ("--steps", steps), ("--epochs", epochs)) if x is not None]
    if len(given) > 1:
        raise ConfigError("USAGE", ", ".join(given), "each determines the length of the run", "Give one of them")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ConfigError("USAGE", f"--epochs {epochs:g}", "not a length", "Give a number above 0")


def steps_of_epochs(epochs: float, data: Dataset, settings: TrainConfig) -> int:
    """The steps in which each training item occurs ``epochs`` times, rounded up: ⌈epochs · items / batch⌉."""
    held_out, _ = data.held_out_fraction(settings.held_out)
    return math.ceil(epochs * len(data.split(held_out).train) / settings.batch)


def open_run(out: Path | None, data: str, suffix: str = "") -> Run:
    """The run in ``out``, by default runs/DATA with a ``suffix``, next to DATA if that is inside them; none is created.

    Raises `ConfigError` if ``out`` is inside the data.
    """
    from undiffuse.data.sources.registry import path_of
    from undiffuse.training.run_folder import Run

    source = path_of(data)
    if out is None:
        path = Path(data) if source is None else source.resolve()
        out = Path("runs") / f"{path.name.lstrip('.').split('.')[0] or 'data'}{suffix}"
        if lies_inside(out, source):
            out = Path(os.path.relpath(path.parent)) / out
    refuse_inside(out, data)
    return Run(out)


def stage_suffix(options: Mapping[str, Any]) -> str:
    """What is added to the name of a run for the stage of a cascade that the ``options`` of data name."""
    sides = (("", options.get("reduce_to")), ("-from", options.get("from_side")))
    return "".join(f"{word}-{side}" for word, side in sides if side is not None)


def report_finished(run: Run) -> None:
    """Print that the run is finished, which `undiffuse.training.fit.fit` has compared with the command."""
    console.print(f"{run.folder} is a finished run already; give --out another folder to train again")


def extend_run(
    run: Run,
    dataset: Dataset,
    device: str,
    config_type: type,
    steps: int | None,
    minutes: float | None,
    **options: Any,
) -> None:
    """Extend the run in one process of those that the launcher started; the others wait."""
    from undiffuse.runtime.distributed_group import init_process_group
    from undiffuse.training.extend import extend

    group = init_process_group(device)
    if group.rank == 0:
        _, step = extend(run.folder, dataset, steps, minutes, config_type=config_type, **options)
        console.print(f"{run.folder} is extended and resumes from step {step:,}")
    group.gather(None)


def format_length(settings: TrainConfig) -> str:
    """The length of a run in words."""
    return counted(settings.minutes, "minute") if settings.minutes else counted(settings.max_steps or 0, "step")


@contextmanager
def changes_as_table() -> Iterator[None]:
    """Print a table of what has changed since the run began, if that is the error."""
    from undiffuse.report import table
    from undiffuse.training.run_folder import ChangedError

    try:
        yield
    except ChangedError as error:
        table.render([{"": what, "as begun": old, "now": new} for what, old, new in error.rows], error.where)
        raise


def with_length(recipe: T, minutes: float | None, steps: int | None, default: float = 10.0) -> T:
    """The recipe with the length given by flags, else its own, else ``default`` minutes."""
    from undiffuse.model.config import replace_train

    if minutes is not None or steps is not None:
        return replace_train(recipe, minutes=minutes, max_steps=steps)
    settings: TrainConfig = recipe.train  # pyright: ignore[reportAttributeAccessIssue]
    has_length = settings.minutes is not None or settings.max_steps is not None
    return recipe if has_length else replace_train(recipe, minutes=default)
