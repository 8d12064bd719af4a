"""``undiffuse export``: a model in the format of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.options import NetworkFile, RunArgument, console, register_network, require_utf8
from undiffuse.cli.results import show, with_json

FORMATS = ("diffusers", "onnx", "torch")


@with_json
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="The new folder.", metavar="OUT")],
    kind: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")],
    network: NetworkFile = None,
) -> None:
    """Export the model of RUN to another format.

    Prints the distance of its outputs from the model's. If the format cannot express the model, the error names the
    first part that is not supported.
    """
    from undiffuse.interop import exporting

    require_utf8(out, out)
    register_network(network)
    checks = exporting.export(run, out, kind)
    title = f"{run} as {out}"
    show([check.row() for check in checks], title, out=out, checks=[check._asdict() for check in checks])
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    console.print(f"written into {out}: {', '.join(files)}")
