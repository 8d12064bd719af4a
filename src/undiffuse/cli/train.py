"""``undiffuse train``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.data_options import ReadData, print_notes, with_data_options
from undiffuse.cli.options import (
    DataArgument,
    Device,
    NetworkFile,
    as_argument,
    at_hand,
    console,
    network_option,
    register_network,
    resolve_device,
)
from undiffuse.cli.prompt_options import example_condition
from undiffuse.cli.recipe_options import RecipeOptions, format_length
from undiffuse.cli.results import with_json
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
from undiffuse.model.presets import PRESETS
from undiffuse.networks.tables import INSTALLED_NETWORKS
from undiffuse.process.tables import SCHEDULES

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.model.config import Config
    from undiffuse.training.run_folder import Run


@with_json
@with_data_options
def train(
    data: DataArgument,
    out: Annotated[Path | None, typer.Option(help="The run folder, outside of DATA; runs/DATA if not given.")] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch: Batch = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers; default that of --config or 0.")] = None,
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
        typer.Option(
            help="Start from the weights of this run or model file, with its settings (docs/fine-tuning.md).",
            callback=at_hand,
        ),
    ] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option(
            help="Train on the latents of this autoencoder: run, file or folder, see docs/latent.md.", callback=at_hand
        ),
    ] = None,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Condition the network on the labels, vectors or tokens of the data.")
    ] = False,
    on_nonfinite: OnNonfinite = None,
    log: Log = None,
    force: Force = False,
    extend: Extend = False,
    *,
    read: ReadData,
) -> None:
    """Train a model on DATA; an unfinished run is resumed.

    Training takes 10 minutes if no length is given.
    """
    from undiffuse.interop.autoencoders import load_autoencoder
    from undiffuse.model import presets
    from undiffuse.model.config import Config, replace_train
    from undiffuse.networks.registry import network_settings
    from undiffuse.training import initial_weights
    from undiffuse.training.diffusion_task import fit_diffusion

    device = resolve_device(device)
    conditional = conditional or bool(read.keywords.get("captions"))
    options = RecipeOptions(minutes, steps, epochs, batch, lr, seed, config, own=(preset,))
    network_class = register_network(network)
    run = open_run(out, data, stage_suffix(read.keywords) + ("" if autoencoder is None else "-latent"))
    dataset = read(data)
    print_notes(dataset)
    if extend:
        options = options.extended(
            run, dataset, device, Config, init, autoencoder, conditional=conditional, force=force
        )
    finished = run.finished

    # The recipe: that of the run, of the preset, or of the model to start from, with the given options
    loaded = None if autoencoder is None else load_autoencoder(autoencoder, dataset)
    name = preset or presets.choose(dataset.item_shape if loaded is None else loaded.latent_shape, device)

    def base() -> Config:
        chosen = presets.get(name) if loaded is None else presets.of_latents(presets.get(name))
        if network_class is not None:  # so that the file's [model.network] sets its settings
            own = network_settings(network_class, chosen.model.network)
            chosen = replace(chosen, model=replace(chosen.model, network=own))
        if init is None or preset is not None:
            return chosen
        return initial_weights.recipe_of(init, dataset, chosen.train, conditional, network_class, run)

    recipe, as_begun = options.recipe(run, dataset, Config, base, on_nonfinite=on_nonfinite)
    if init is not None and preset is None:
        name = str(init)
    if conditional:
        recipe = replace_train(recipe, conditional=True)

    # Train
    if not finished:
        words = "recipe that the run began with" if as_begun else f"recipe {name!r}"
        console.print(f"{words}, {format_length(recipe.train)}, into {run.folder}")
    if dataset.report.skipped:
        console.print(f"skipped files are listed in {run.folder}/skipped.json")
    with changes_as_table():
        fit_diffusion(
            recipe,
            dataset,
            run.folder,
            device,
            init=init,
            force=force,
            network=network_class,
            autoencoder=loaded,
            loggers=log or (),
        )
    if finished:
        report_finished(run)
        return
    report_done(run)
    condition = example_condition(dataset.condition_sizes if recipe.train.conditional else (), dataset)
    _print_next_commands(run, dataset, condition, network_option(network))


def stage_suffix(options: Mapping[str, Any]) -> str:
    """What is added to the name of a run for the stage of a cascade that the ``options`` of data name."""
    sides = (("", options.get("reduce_to")), ("-from", options.get("from_side")))
    return "".join(f"{word}-{side}" for word, side in sides if side is not None)


def _print_next_commands(run: Run, dataset: Dataset, condition: str, network: str) -> None:
    """Print the commands that sample and measure the model, with the options ``condition`` and ``network``."""
    from undiffuse.model import checkpoint
    from undiffuse.training.run_report import no_likelihood

    folder = as_argument(run.folder)
    if "image" in dataset.condition_sizes:
        console.print(f"to sample: undiffuse sample BASE --then {folder}, BASE a model of the small images")
    else:
        console.print(f"next: undiffuse sample {folder}{condition}{network}")
    config = run.require_record()["config"]
    if config["model"].get("autoencoder") and no_likelihood(checkpoint.load(run.folder)):  # others have one
        return
    has_test_part = config["train"]["held_out"] > 0 or dataset.test_from is not None
    console.print(f"next: undiffuse evaluate {folder}{'' if has_test_part else ' --part train'}{network}")
