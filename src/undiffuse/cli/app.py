"""Registration of the commands, one file each. These files import nothing heavy, so that ``--help`` starts at once."""

from __future__ import annotations

from typing import Annotated

import typer

from undiffuse import __version__
from undiffuse.cli.advise import advise_command
from undiffuse.cli.check import check
from undiffuse.cli.compare import compare
from undiffuse.cli.distill import distill
from undiffuse.cli.doctor import doctor
from undiffuse.cli.ema import ema
from undiffuse.cli.evaluate import evaluate
from undiffuse.cli.export import export
from undiffuse.cli.import_model import import_model
from undiffuse.cli.inspect import inspect
from undiffuse.cli.interpolate import interpolate
from undiffuse.cli.pack import pack
from undiffuse.cli.report import report
from undiffuse.cli.restore import restore
from undiffuse.cli.sample import sample
from undiffuse.cli.share import share
from undiffuse.cli.studio import studio
from undiffuse.cli.train import train
from undiffuse.cli.train_autoencoder import train_autoencoder
from undiffuse.cli.train_classifier import train_classifier
from undiffuse.cli.watch import watch

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"undiffuse {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False,
) -> None:
    """Train diffusion models, sample from them, and measure them in bits per dimension."""


for command, name in (
    (check, "check"),
    (train, "train"),
    (sample, "sample"),
    (evaluate, "evaluate"),
    (compare, "compare"),
    (report, "report"),
    (advise_command, "advise"),
    (restore, "restore"),
    (interpolate, "interpolate"),
    (train_classifier, "train-classifier"),
    (train_autoencoder, "train-autoencoder"),
    (distill, "distill"),
    (ema, "ema"),
    (watch, "watch"),
    (studio, "studio"),
    (inspect, "inspect"),
    (import_model, "import"),
    (export, "export"),
    (share, "share"),
    (pack, "pack"),
    (doctor, "doctor"),
):
    app.command(name)(command)
