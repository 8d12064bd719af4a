"""The options of every command that reads data, made from the table of data sources."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.options import console
from undiffuse.data.sources.registry import OPTIONS, Option, load

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset

ReadData = functools.partial["Dataset"]
"""read(data) is the data set that the argument DATA names, read with the options given on the command line."""


def with_data_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the options of all data sources after its own; it gets a `ReadData` as its keyword ``read``."""
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "read"]

    @functools.wraps(command)
    def wrapped(**arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in OPTIONS}
        command(**arguments, read=functools.partial(load, **options))

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    parameters += map(_parameter, OPTIONS.values())
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapped


def _parameter(option: Option) -> inspect.Parameter:
    flags = [option.flag] if option.flag else []
    annotation = Annotated[option.type, typer.Option(*flags, help=option.help)]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)


def given_options(read: ReadData) -> str:
    """The options of ``read`` as on the command line, each after a space; empty if none was given."""
    text = ""
    for name, value in read.keywords.items():
        if value != OPTIONS[name].default:
            values = [] if value is True else value if isinstance(value, tuple) else [value]
            text += " " + shlex.join([OPTIONS[name].flag or f"--{name.replace('_', '-')}", *map(str, values)])
    return text


def print_notes(dataset: Dataset) -> None:
    """Print what was noticed and changed when the data were read."""
    for note in dataset.notes:
        console.print(f"note: {note}", markup=False)


def record_skipped(dataset: Dataset, path: Path) -> None:
    """Write the skipped files with code and reason to ``path``, if there are any, and print where."""
    if dataset.report.skipped:
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.report.write(path)
        console.print(f"{len(dataset.report.skipped)} files were skipped: {path}", markup=False)
