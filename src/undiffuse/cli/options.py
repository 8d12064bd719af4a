"""What several commands share: their arguments and options, the console, the device and the folder of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from undiffuse.errors import ConfigError

console = Console(highlight=False, soft_wrap=True)

DataArgument = Annotated[
    str,
    typer.Argument(help="A folder of images, an array file, a table, or a built-in set (digits, ...).", metavar="DATA"),
]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, or its model.safetensors.", metavar="RUN")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Folder = Annotated[Path | None, typer.Option(help="Where the files of fashion-mnist lie.")]
Size = Annotated[int | None, typer.Option(help="Resize images to this many pixels a side.")]
Crop = Annotated[bool, typer.Option("--crop", help="Crop images to a square in their middle first.")]
Channels = Annotated[int | None, typer.Option(help="Convert images to 1 (grey), 3 (RGB) or 4 (RGBA) channels.")]
Layout = Annotated[str | None, typer.Option(help="The order of an array's dimensions, such as NHWC.")]
Levels = Annotated[int | None, typer.Option(help="How many levels the whole numbers of an array have.")]
ValueRange = Annotated[
    tuple[float, float] | None, typer.Option(help="The least and the greatest value that floats of an array may have.")
]


def device_of(name: str) -> str:
    """The device called ``name``; ``auto`` is a GPU where there is one. Raises `ConfigError`."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError("DEVICE", f"--device {name}", "unknown", "Use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("DEVICE", "--device cuda", "this machine has no GPU that torch can use", "Use --device cpu")
    return name


def at_most(steps: int, chain: int, say: Callable[[str], None] | None = None) -> int:
    """``steps``, or as many as the ``chain`` has, with a line to ``say`` (the console) where more are asked for."""
    if steps > chain:
        (say or console.print)(
            f"{steps:,} steps are more than the chain of this model has: all its {chain:,} are walked"
        )
    return min(steps, chain)


def beside(run: Path) -> Path:
    """The folder of a run, or of a model's file."""
    return run if run.is_dir() else run.parent
