"""``undiffuse ema``: the model of a run with its weights averaged over another length, or over the best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undiffuse import checkpoint
from undiffuse.cli.options import Device, console, device_of
from undiffuse.cli.reading import Read, reads_data
from undiffuse.errors import ConfigError
from undiffuse.report import table
from undiffuse.train import Run
from undiffuse.train.lengths import NEAR, Measured, compare, model_of


@reads_data
def ema(
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    data: Annotated[str | None, typer.Argument(help="The data of the run, for --best.", metavar="DATA")] = None,
    length: Annotated[
        list[float] | None, typer.Option(help="A share of the run, such as 0.08; several to compare with --best.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="Measure held-out items and take the best length.")] = False,
    items: Annotated[int, typer.Option(help="Held-out items that are measured, at most.", min=2)] = 256,
    draws: Annotated[int, typer.Option(help="Steps of the chain for each of them.", min=1)] = 16,
    out: Annotated[Path | None, typer.Option(help="The file to write; model-ema-LENGTH in RUN if not given.")] = None,
    device: Device = "auto",
    *,
    read: Read,
) -> None:
    """Average the weights of a finished run over another length, without training again."""
    if best != (data is not None) or (not best and len(length or ()) != 1):
        cause = "say one --length, or --best with the data of the run"
        raise ConfigError("USAGE", "undiffuse ema", cause, "See 'undiffuse ema --help'")
    wanted, device = Run(run), device_of(device)
    chosen = (length or [0.0])[0]
    if data is not None:
        dataset = read(data)
        found = compare(wanted, dataset, length, items, draws, device)
        first = min(found, key=lambda one: one.bits)
        table.render([_row(one) for one in found], f"{dataset.name}, held out for validation")
        ties = [f"{one.length:g}" for one in found if one is not first and one.behind < 2 * one.behind_stderr]
        console.print(
            f"best: {first.length:g}" + (f"; no worse by two standard errors: {', '.join(ties)}" * bool(ties))
        )
        chosen = first.length
    model, error = model_of(wanted, chosen)
    path = out or run / f"model-ema-{chosen:g}.safetensors"
    checkpoint.save(model, path)
    console.print(f"averaged over a length of {chosen:g}, {error:.2%} of its profile missed: {path}", markup=False)
    if error > NEAR:
        console.print("note: more snapshots (in [train] of --config) come nearer to lengths so far from 0.05 and 0.1")


def _row(one: Measured) -> dict[str, str]:
    return {
        "length": f"{one.length:g}",
        "profile missed": f"{one.error:.2%}",
        "bits/dim": f"{one.bits:.4f} ± {one.stderr:.4f}",
        "behind the best": f"{one.behind:.4f} ± {one.behind_stderr:.4f}",
    }
