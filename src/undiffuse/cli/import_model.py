"""``undiffuse import``: a model of another library becomes one of undiffuse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.data_options import lies_inside
from undiffuse.cli.options import as_argument, console, require_utf8
from undiffuse.cli.prompt_options import example_condition
from undiffuse.cli.results import show, with_json
from undiffuse.cli.sampler_options import parse_setting
from undiffuse.errors import ConfigError

FORMATS = ("diffusers", "denoising-diffusion-pytorch", "edm", "openai")


@with_json
def import_model(
    source: Annotated[str, typer.Argument(help="A folder or file that another library wrote.", metavar="SOURCE")],
    out: Annotated[Path, typer.Argument(help="The new folder, a RUN for other commands.", metavar="OUT")],
    kind: Annotated[
        str | None, typer.Option("--format", help=f"{', '.join(FORMATS)}; by default recognized from SOURCE.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Height and width of the images, if SOURCE does not contain them.", min=1)
    ] = None,
    values: Annotated[
        int | None, typer.Option(help="Number of integer values of the images, from 0 on; by default 256.", min=2)
    ] = None,
    chain: Annotated[
        Path | None,
        typer.Option("--scheduler", help="scheduler_config.json or its folder, if SOURCE does not contain it."),
    ] = None,
    unpickle: Annotated[
        bool,
        typer.Option("--unpickle", help="Read weights in a pickle (.bin, .pt): weights only, in a child process."),
    ] = False,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A flag that the model was trained with, such as num_heads=4 or objective=pred_v; repeatable."
        ),
    ] = None,
) -> None:
    """Import a model of another library.

    Prints the distance of its outputs from the original's. Nothing is downloaded, and no code of SOURCE is run. Nothing
    is written if the outputs differ.
    """
    from undiffuse.interop import importing

    require_utf8(out, out)
    if lies_inside(out, Path(source)):
        raise ConfigError("OUT", out, f"it lies inside SOURCE, '{source}'", "Give a folder outside of it")
    imported = importing.import_model(
        source,
        kind,
        size=size,
        values=values,
        chain=chain,
        unpickle=unpickle or None,
        setting=dict(map(parse_setting, setting)) if setting else None,
    )
    importing.write(imported, source, out)
    checks = [check._asdict() for check in imported.checks]
    rows, title = [check.row() for check in imported.checks], f"{source} as {out}"
    show(rows, title, out=out, checks=checks, notes=imported.notes)
    for note in imported.notes:
        console.print(f"note: {note}")
    condition = example_condition(imported.model.trained_condition_sizes)
    console.print(f"next: undiffuse sample {as_argument(out)} {imported.sampling}{condition}")
