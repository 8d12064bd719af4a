"""``undiffuse inspect``: what a checkpoint contains."""

from __future__ import annotations

from undiffuse.cli.options import NetworkFile, RunArgument, register_network
from undiffuse.cli.results import show, with_json


@with_json
def inspect(run: RunArgument, network: NetworkFile = None) -> None:
    """Describe a diffusion model: network, process, data."""
    from undiffuse.model import checkpoint
    from undiffuse.report.model_facts import model_facts

    register_network(network)
    model = checkpoint.load(run)
    rows = [{"": key, "model": value} for key, value in model_facts(model).items()]
    show(rows, str(run), **checkpoint.describe(model))
