"""The commands. Each reads its flags, calls the library, prints what it did and where it put it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from undiffuse import checkpoint, presets
from undiffuse import config as configuration
from undiffuse.cli.advise import advise_command
from undiffuse.cli.check import check
from undiffuse.cli.classifier import train_classifier
from undiffuse.cli.crew import join
from undiffuse.cli.ema import ema
from undiffuse.cli.evaluate import evaluate_model
from undiffuse.cli.interpolate import interpolate
from undiffuse.cli.options import (
    DataArgument,
    Device,
    RunArgument,
    beside,
    console,
    device_of,
)
from undiffuse.cli.pack import pack
from undiffuse.cli.reading import Read, reads_data, record_skipped, say_notes
from undiffuse.cli.restore import restore
from undiffuse.cli.sample import sample
from undiffuse.cli.watch import watch
from undiffuse.diffusion import describe
from undiffuse.errors import ConfigError
from undiffuse.report import table
from undiffuse.train import ChangedError, Interrupted, Run, fit
from undiffuse.train.extend import extend as longer

app = typer.Typer(
    help="Diffusion models with a likelihood you can publish: train, sample, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
@reads_data
def train(
    data: DataArgument,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/DATA if not given.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Train for about so long; the decay is fitted to it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for so many optimiser steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; 0 if not given.")] = None,
    device: Device = "auto",
    preset: Annotated[str | None, typer.Option(help=f"A recipe: {', '.join(presets.PRESETS)}.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with tables [model] and [train], over the preset.")
    ] = None,
    init: Annotated[Path | None, typer.Option(help="Start from the weights of this run or checkpoint.")] = None,
    conditional: Annotated[
        bool, typer.Option("--conditional", help="Tell the network the labels (or vectors, or tokens) of the data.")
    ] = False,
    on_nonfinite: Annotated[
        str | None,
        typer.Option(help="stop or skip: what a step does whose loss or gradient is no number; stop if not given."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on with a run that was begun with other settings or data.")
    ] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Make the run in --out longer, by --minutes or --steps, as it was begun.")
    ] = False,
    *,
    read: Read,
) -> None:
    """Train a model on DATA; goes on where an unfinished run stopped."""
    device = device_of(device)
    if minutes is not None and steps is not None:
        raise ConfigError("USAGE", "--minutes, --steps", "both say when to stop", "Give one of them")
    dataset = read(data)
    say_notes(dataset)
    run = Run(out or Path("runs") / Path(data.rstrip("/")).name.split(".")[0])
    if extend:
        if (seed, preset, config, init) != (None,) * 4:
            cause = "a run is made longer with the recipe that it was begun with"
            raise ConfigError("USAGE", "--extend", cause, "Give it with --minutes or --steps alone")
        crew = join(device)
        if crew.rank == 0:
            _, step = longer(run.folder, dataset, steps, minutes, conditional, force)
            console.print(f"{run.folder} is to be longer, and goes on from step {step:,}", markup=False)
        crew.gather(None)
        minutes = steps = None
    if run.finished:
        console.print(f"{run.folder} is a finished run already; give --out another folder to train again", markup=False)
        return
    begun = run.record
    if begun is not None and (minutes, steps, seed, preset, config) == (None,) * 5:
        name, recipe = "as begun", configuration.from_dict(configuration.Config, begun["config"], "run.json")
    else:
        name = preset or presets.choose(dataset.item_shape, dataset.levels, device)
        recipe = presets.get(name) if config is None else configuration.read(config, presets.get(name))
        recipe = _with_end(configuration.replace_train(recipe, seed=seed or 0), minutes, steps)
    if conditional:
        recipe = configuration.replace_train(recipe, conditional=True)
    if on_nonfinite is not None:
        recipe = configuration.replace_train(recipe, on_nonfinite=on_nonfinite)
    chosen = recipe.train
    length = f"{chosen.minutes:g} minutes" if chosen.minutes else f"{chosen.steps:,} steps"
    console.print(f"recipe {name!r}, {length}, into {run.folder}", markup=False)
    if dataset.seen.skipped:
        console.print(f"skipped files are listed in {run.folder}/skipped.json", markup=False)
    try:
        fit(recipe, dataset, run.folder, device, init=init, force=force)
    except ChangedError as error:
        table.render([{"": what, "as begun": old, "now": new} for what, old, new in error.rows], str(run.folder))
        raise
    console.print(f"done: {run.folder}/model.safetensors, pictures in {run.pictures}", markup=False)
    tested = dataset.share_held_out(chosen.held_out)[0] > 0 or dataset.test_from is not None
    measured = data if tested else f"{data} --part train"
    console.print(f"next: undiffuse sample {run.folder}   undiffuse evaluate {run.folder} {measured}", markup=False)


app.command()(check)
app.command()(pack)
app.command()(sample)
app.command("advise")(advise_command)
app.command()(restore)
app.command()(interpolate)
app.command()(train_classifier)
app.command()(ema)
app.command()(watch)


@app.command()
@reads_data
def evaluate(
    run: RunArgument,
    data: DataArgument,
    part: Annotated[
        str | None,
        typer.Option(
            help="test, validation, train or all; the held-out test part of the model's own data, all of others."
        ),
    ] = None,
    estimate: Annotated[
        list[str] | None,
        typer.Option(help="discrete, continuous or ode; may be given several times; all three if not given."),
    ] = None,
    items: Annotated[int | None, typer.Option(help="At most so many items, spread over the part.", min=2)] = None,
    draws: Annotated[int | None, typer.Option(help="Steps or points of the bounds for each item.", min=1)] = None,
    untold: Annotated[
        bool, typer.Option("--untold", help="Tell a conditional model nothing of the items, even where the data do.")
    ] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Every step of the chain, as many points, every item.")
    ] = False,
    iw: Annotated[
        int, typer.Option(help="Importance-weighted draws an item of the flow, for data of levels.", min=1)
    ] = 1,
    compat: Annotated[str | None, typer.Option(help="openai: also as improved-diffusion's script has it.")] = None,
    minutes: Annotated[float, typer.Option(help="About how long, where not said by the options above.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Where to put the results; the run folder if not given.")] = None,
    device: Device = "auto",
    *,
    read: Read,
) -> None:
    """Measure a model on DATA in bits per dimension; goes on where an unfinished evaluation stopped."""
    crew = join(device_of(device))
    model = checkpoint.load(run, crew.device)
    dataset = read(data)
    place = out or beside(run)
    if crew.rank == 0:
        record_skipped(dataset, place / "evaluation-skipped.json")
    chosen: dict[str, Any] = {
        "estimates": estimate or (),
        "untold": untold,
        "items": items,
        "draws": draws,
        "exact": exact,
        "iw": iw,
        "minutes": minutes,
        "crew": crew,
    }
    try:
        evaluate_model(model, dataset, place, part, **chosen, seed=seed, compat=compat, console=console)
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None


@app.command()
def inspect(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole description as JSON.")] = False,
) -> None:
    """Say what a model is: network, process, data and training."""
    model = checkpoint.load(run)
    described = describe(model)
    if as_json:
        print(json.dumps(described, indent=1))
        return
    ends = [float(model.levels[0].log_snr), float(model.levels[-1].log_snr)]
    facts: dict[str, Any] = {
        "items": f"{'×'.join(map(str, model.item_shape))}, {model.info.get('levels') or 'continuous'} levels",
        "data": f"{model.info.get('name', 'unknown')} ({model.info.get('items', '?')} items)",
        "parameters": f"{sum(p.numel() for p in model.network.parameters()):,}",
        **{key: _settings(getattr(model.config, key)) for key in ("network", "schedule", "target", "weight", "times")},
        "preconditioning": _settings(model.config.preconditioning),
        "chain": f"{model.steps} steps, log-SNR {ends[0]:.2f} to {ends[1]:.2f}, variance {model.config.variance}",
        "trained": ", ".join(
            f"{k} {v}"
            for k, v in model.info.items()
            if k in ("steps", "seconds", "seed", "batch", "precision", "torch")
        ),
        "notes": "; ".join(model.info.get("notes", [])) or "none",
    }
    table.render([{"": key, "model": value} for key, value in facts.items()], str(run))


def _with_end(recipe: configuration.Config, minutes: float | None, steps: int | None) -> configuration.Config:
    """The recipe with the end that was asked for, else its own, else ten minutes."""
    if minutes is not None or steps is not None:
        return configuration.replace_train(recipe, minutes=minutes, steps=steps)
    has_end = recipe.train.minutes is not None or recipe.train.steps is not None
    return recipe if has_end else configuration.replace_train(recipe, minutes=10.0)


def _settings(settings: dict[str, Any]) -> str:
    named = dict(settings)
    kind = named.pop("name", None) or named.pop("kind", "")
    return f"{kind} {', '.join(f'{k}={v}' for k, v in named.items())}".strip()
