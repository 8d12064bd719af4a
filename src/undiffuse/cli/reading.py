"""The options that say how DATA are read, in one place, and what a command then has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from undiffuse import data as datasets
from undiffuse.cli.options import Channels, Crop, Folder, Layout, Levels, Size, ValueRange, console

Background = Annotated[str | None, typer.Option(help="The colour under transparent pixels; white if not given.")]
Frames = Annotated[str | None, typer.Option(help="first or all, of image files that hold several.")]
Upscale = Annotated[bool, typer.Option("--allow-upscale", help="Enlarge images to more than four times their side.")]
OnBad = Annotated[str | None, typer.Option(help="stop at files that cannot be taken (and say all), or skip them.")]

OPTIONS: dict[str, tuple[Any, Any]] = {
    "folder": (Folder, None),
    "size": (Size, None),
    "crop": (Crop, False),
    "channels": (Channels, None),
    "background": (Background, None),
    "frames": (Frames, None),
    "upscale": (Upscale, False),
    "on_bad": (OnBad, None),
    "layout": (Layout, None),
    "levels": (Levels, None),
    "value_range": (ValueRange, None),
}

Read = Callable[..., datasets.Dataset]
"""The data set of that name, by the options that were given."""


def reads_data(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with `OPTIONS` behind its own; it gets a `Read` as its keyword ``read``."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "read"]
    kind = inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(n, kind, default=default, annotation=a) for n, (a, default) in OPTIONS.items()]

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        options = {name: given.pop(name) for name in OPTIONS}
        command(**given, read=functools.partial(datasets.load, **options))

    parameters = [parameter.replace(kind=kind) for parameter in (*own, *more)]
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def say_notes(dataset: datasets.Dataset) -> None:
    """Prints what was seen and done when the data were read."""
    for note in dataset.notes:
        console.print(f"note: {note}", markup=False)


def record_skipped(dataset: datasets.Dataset, path: Path) -> None:
    """Writes the files that were left out to ``path``, each with code and reason, and says so; nothing if none were."""
    if dataset.seen.skipped:
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.seen.write(path)
        console.print(f"{len(dataset.seen.skipped)} files were skipped: {path}", markup=False)
