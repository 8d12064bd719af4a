"""``undiffuse export``: a model in the format of another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.options import NetworkFile, RunArgument, console, register_network

FORMATS = ("diffusers", "onnx", "torch")


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(help="The new folder.", metavar="OUT")],
    kind: Annotated[str, typer.Option("--format", help=f"{', '.join(FORMATS)}.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    network: NetworkFile = None,
) -> None:
    """Export the model of RUN to another format and print how far its outputs are from the model's.

    If the format cannot express the model, the error names the first part that is not supported.
    """
    import json

    from undiffuse.interop import exporting
    from undiffuse.report import table

    register_network(network)
    checks = exporting.export(run, out, kind)
    if as_json:
        print(json.dumps({"out": str(out), "checks": [check._asdict() for check in checks]}, indent=1))
        return
    table.render([check.row() for check in checks], f"{run} as {out}")
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    console.print(f"written into {out}: {', '.join(files)}")
