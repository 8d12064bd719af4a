"""``undiffuse inspect``: what a checkpoint contains."""

from __future__ import annotations

from typing import Annotated

import typer

from undiffuse.cli.options import NetworkFile, RunArgument, register_network


def inspect(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the complete description as JSON.")] = False,
    network: NetworkFile = None,
) -> None:
    """Describe a model: network, noise process, data and training."""
    import json

    from undiffuse.model import checkpoint
    from undiffuse.report import table
    from undiffuse.report.model_facts import model_facts

    register_network(network)
    model = checkpoint.load(run)
    if as_json:
        print(json.dumps(checkpoint.describe(model), indent=1))
        return
    table.render([{"": key, "model": value} for key, value in model_facts(model).items()], str(run))
