"""``undiffuse train-autoencoder``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli.data_options import ReadData, given_options, print_notes, with_data_options
from undiffuse.cli.options import DataArgument, Device, as_argument, console, resolve_device
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
from undiffuse.errors import ConfigError

if TYPE_CHECKING:
    from undiffuse.training.autoencoder_task import AutoencoderRecipe

WIDTHS, GPU_WIDTHS = (16, 32, 64), (64, 128, 256)
"""Channels of the first stages of the default network on a CPU and on a GPU; later stages have the last one."""


@with_json
@with_data_options
def train_autoencoder(
    data: DataArgument,
    out: Annotated[
        Path | None, typer.Option(help="The run folder, outside of DATA; runs/DATA-autoencoder if not given.")
    ] = None,
    factor: Annotated[
        int | None, typer.Option(help="Downsampling factor of each side, a power of two; default 4.")
    ] = None,
    latent_channels: Annotated[int | None, typer.Option(help="Channels of the latents; 4 if not given.", min=1)] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of the KL. Default: 0.02 with --reconstruction l1 (pictures), 1 with nll (likelihood)."
        ),
    ] = None,
    reconstruction: Annotated[
        str | None, typer.Option(help="The other term of the loss: l1 (default) or nll, -log p(x given z) in nats.")
    ] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch: Batch = None,
    lr: LearningRate = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers; default that of --config or 0.")] = None,
    device: Device = "auto",
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with tables [model] and [train], which override the recipe.")
    ] = None,
    on_nonfinite: OnNonfinite = None,
    log: Log = None,
    force: Force = False,
    extend: Extend = False,
    *,
    read: ReadData,
) -> None:
    """Train an autoencoder on DATA for models of latents.

    `train DATA --autoencoder RUN` trains such a model. An unfinished run is resumed. Training takes 10 minutes if no
    length is given.
    """
    from undiffuse.training.autoencoder_task import AutoencoderRecipe, fit_autoencoder

    device = resolve_device(device)
    own = (factor, latent_channels, kl_weight, reconstruction)
    options = RecipeOptions(minutes, steps, epochs, batch, lr, seed, config, own)
    run = open_run(out, data, "-autoencoder")
    dataset = read(data)
    print_notes(dataset)
    if extend:
        options = options.extended(run, dataset, device, AutoencoderRecipe, force=force)
    finished = run.finished
    recipe, _ = options.recipe(
        run, dataset, AutoencoderRecipe, lambda: recipe_for(device, *own), on_nonfinite=on_nonfinite
    )
    if not finished:
        console.print(f"an autoencoder, {format_length(recipe.train)}, into {run.folder}")
    with changes_as_table():
        fit_autoencoder(recipe, dataset, run.folder, device, force=force, loggers=log or ())
    if finished:
        report_finished(run)
        return
    report_done(run)
    options, folder = given_options(read), as_argument(run.folder)
    if out is not None:  # so that the latents of another autoencoder of the same data go elsewhere
        options += f" --out {as_argument(run.folder.parent / f'{run.folder.resolve().name}-latent')}"
    console.print(f"next: undiffuse train {as_argument(data)} --autoencoder {folder}{options}")


def recipe_for(
    device: str,
    factor: int | None = None,
    latent_channels: int | None = None,
    kl_weight: float | None = None,
    reconstruction: str | None = None,
) -> AutoencoderRecipe:
    """The recipe of these options. Raises `ConfigError`.

    There are no snapshots, because `undiffuse ema` is for diffusion models.
    """
    from undiffuse.model.autoencoder import AutoencoderConfig
    from undiffuse.model.config import TrainConfig
    from undiffuse.training.autoencoder_task import AutoencoderRecipe

    factor, widths = 4 if factor is None else factor, WIDTHS if device == "cpu" else GPU_WIDTHS
    if factor < 1 or factor & (factor - 1) or factor > 64:
        raise ConfigError("OPTION", f"--factor {factor}", "it is not a power of two up to 64", "Give 2, 4 or 8")
    stages = factor.bit_length()
    network = {
        "kind": "kl",
        "latent_channels": latent_channels or 4,
        "widths": [widths[min(i, len(widths) - 1)] for i in range(stages)],
        "blocks": 1,
    }
    if kl_weight is None:
        kl_weight = 1.0 if reconstruction == "nll" else AutoencoderConfig.kl_weight
    model = AutoencoderConfig(network, reconstruction=reconstruction or "l1", kl_weight=kl_weight)
    return AutoencoderRecipe(model, TrainConfig(batch=16, lr=1e-3, snapshots=0))
