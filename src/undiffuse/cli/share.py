"""``undiffuse share``: a model with its card, in a folder or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.options import NetworkFile, RunArgument, as_argument, console, network_option, register_network
from undiffuse.errors import ConfigError


def share(
    run: RunArgument,
    to: Annotated[str, typer.Argument(help="A new folder, or hf:OWNER/NAME on the hub.", metavar="OUT")],
    license: Annotated[
        str | None, typer.Option(help="The license in the card, by its name on the hub, such as mit; none by default.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
    card: Annotated[
        str | None, typer.Option(help="keep or replace a card on the hub that was edited; by default it is an error.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="The message of the commit on the hub.")] = None,
    network: NetworkFile = None,
) -> None:
    """Write the model of RUN and a card to a folder or hub.

    The hub is that of Hugging Face. The card has the likelihood that `undiffuse evaluate` measured. Log in to the hub
    before: hf auth login.
    """
    from undiffuse.model.diffusion import Diffusion
    from undiffuse.runtime import hub

    on_hub = hub.is_hub_name(to)
    flags = {"--private": private, "--card": card is not None, "--message": message is not None}
    if not on_hub and (given := [flag for flag, is_given in flags.items() if is_given]):
        raise ConfigError(
            "USAGE", given[0], "it is for a repository of the hub", f"Leave it out, or name {hub.PREFIX}OWNER/NAME"
        )
    if on_hub:
        hub.parse_name(to)
    register_network(network)
    model = Diffusion.from_pretrained(run)
    if on_hub:
        options = {"private": private or None, "license": license, "card": card, "message": message}
        console.print(f"shared: {model.push_to_hub(to, **options)}")
    else:
        folder = model.save_pretrained(Path(to), license)
        console.print(f"written: {', '.join(str(folder / name) for name in (hub.MODEL_FILE, 'README.md'))}")
    console.print(f"next: undiffuse inspect {as_argument(to)}{network_option(network)}")
