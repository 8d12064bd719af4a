"""``undiffuse studio``: a page on this machine for looking at models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.options import Device, NetworkFile, at_hand, console, register_network, resolve_device
from undiffuse.errors import ConfigError

RUNS = Path("runs")


def studio(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Run folders or model files; by default every run in the folder runs.",
            metavar="[RUN]...",
            callback=at_hand,
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="The port on 127.0.0.1; 0 takes a free one.", min=0, max=65535)] = 8421,
    browser: Annotated[bool, typer.Option("--browser", help="Open the page in the browser.")] = False,
    network: NetworkFile = None,
    device: Device = "auto",
) -> None:
    """Show models on a local web page.

    The page samples, measures, inpaints, interpolates, and watches runs.
    """
    import webbrowser
    from importlib.util import find_spec

    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        fix = "Install them: pip install 'undiffuse[studio]'"
        raise ConfigError("MISSING_PACKAGE", ", ".join(missing), "not installed", fix)
    from undiffuse.studio.runs import open_runs
    from undiffuse.studio.server import serve

    register_network(network)
    opened = open_runs(runs or _all_runs(), resolve_device(device))

    def announce(address: str) -> None:
        console.print(f"studio: {address}")
        console.print("only this machine can open it, with the token in this address; Ctrl-C stops it")
        if browser:
            webbrowser.open(address)

    try:
        serve(opened, port, announce)
    except KeyboardInterrupt:
        console.print("stopped")


def _all_runs() -> list[Path]:
    """The runs and imported models in the folder `RUNS`. Raises `ConfigError` if there are none."""
    names = ("run.json", "model.safetensors")
    found = sorted({path.parent for name in names for path in RUNS.glob(f"*/{name}")}) if RUNS.is_dir() else []
    if not found:
        fix = "Name one, or make one: undiffuse train digits --minutes 2"
        raise ConfigError("NO_RUNS", "studio", f"no run is named, and the folder {RUNS} holds none", fix)
    return found
