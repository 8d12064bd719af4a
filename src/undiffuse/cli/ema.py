"""``undiffuse ema``: the model of a run with its weights averaged over another length, or over the best length."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli.data_options import (
    OwnDataArgument,
    ReadData,
    given_options,
    read_data,
    refuse_inside,
    with_data_options,
)
from undiffuse.cli.options import MAX_COUNT, Device, NetworkFile, console, register_network, resolve_device
from undiffuse.cli.results import add, show, with_json
from undiffuse.errors import ConfigError
from undiffuse.runtime.own_output import is_own_tensor_file
from undiffuse.runtime.side_files import set_aside
from undiffuse.runtime.terminal import flags

if TYPE_CHECKING:
    from undiffuse.training.posthoc_ema import EMAScore


@with_json
@with_data_options
def ema(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    data: OwnDataArgument = None,
    length: Annotated[
        list[float] | None,
        typer.Option(help="Length as a fraction of the run, such as 0.08; repeatable with --best."),
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="Choose the length with the lowest held-out bound.")] = False,
    items: Annotated[
        int | None, typer.Option(help="With --best: largest number of held-out items to measure; default 256.", min=2)
    ] = None,
    mc_samples: Annotated[
        int | None,
        typer.Option(
            help="With --best: steps of the chain in the bound of each item; default 16.", min=1, max=MAX_COUNT
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; by default model-ema-LENGTH.safetensors in RUN.")
    ] = None,
    network: NetworkFile = None,
    device: Device = "auto",
    *,
    read: ReadData,
) -> None:
    """Average the weights of a run over another length.

    The run is finished, and is not trained again. Give one --length, or --best to compare lengths on held-out data."""
    from undiffuse.model import checkpoint
    from undiffuse.training.posthoc_ema import MAX_PROFILE_ERROR, compare_lengths, with_ema_length
    from undiffuse.training.run_folder import Run

    if not best and len(length or ()) != 1:
        cause = "it needs one --length, or --best"
        raise ConfigError("USAGE", "undiffuse ema", cause, "See 'undiffuse ema --help'")
    own = {"items": items, "mc_samples": mc_samples}
    of_data = given_options(read) + "".join(f" {word}" for word in flags(own, {}))
    if not best and (data is not None or of_data):
        cause = "with --length nothing is measured on data"
        raise ConfigError("USAGE", data or of_data.strip(), cause, "Leave it out, or give --best")
    refuse_inside(out, data, run)
    if out is not None and os.path.lexists(out):
        raise ConfigError("OUT", f"--out {out}", "exists already", "Give another name, or delete it")
    register_network(network)
    source, device = Run(run), resolve_device(device)
    chosen = (length or [0.0])[0]
    if best:
        dataset = read_data(read, data, run)
        scores = compare_lengths(source, dataset, length, items or 256, mc_samples or 16, device)
        lowest = min(scores, key=lambda score: score.bits)
        rows, title = [_row(score) for score in scores], f"{dataset.name}, held out for validation"
        show(rows, title, scores=[_plain(score) for score in scores])
        ties = [
            f"{score.length:g}" for score in scores if score is not lowest and score.regret < 2 * score.regret_stderr
        ]
        tied = f"; within two standard errors of it: {', '.join(ties)}" if ties else ""
        console.print(f"best: {lowest.length:g}{tied}")
        chosen = lowest.length
    model, error = with_ema_length(source, chosen)
    path = out or run / f"model-ema-{chosen:g}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and not is_own_tensor_file(path):
        console.print(f"note: {path} was not a model of undiffuse; renamed to {set_aside(path, 'earlier').name}")
    checkpoint.save(model, path)
    add(out=path, length=chosen, profile_error=error)
    console.print(f"average of length {chosen:g}, {error:.2%} error of its profile: {path}")
    if error > MAX_PROFILE_ERROR:
        console.print("note: more snapshots (in [train] of --config) reduce the error of lengths far from 0.05 and 0.1")


def _plain(score: EMAScore) -> dict[str, float]:
    regret = {"regret_bits_per_dim": score.regret, "regret_stderr": score.regret_stderr}
    bits = {"bits_per_dim": score.bits, "stderr": score.stderr}
    return {"length": score.length, "profile_error": score.error, **bits, **regret}


def _row(score: EMAScore) -> dict[str, str]:
    return {
        "length": f"{score.length:g}",
        "profile error": f"{score.error:.2%}",
        "bits/dim": f"{score.bits:.4f} ± {score.stderr:.4f}",
        "above the best": f"{score.regret:.4f} ± {score.regret_stderr:.4f}",
    }
