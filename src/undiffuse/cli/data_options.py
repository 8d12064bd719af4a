"""The options of every command that reads data, made from the table of data sources."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.options import console, in_flags, require_utf8, run_folder
from undiffuse.data.sources.registry import OPTIONS, Option, load, option_words
from undiffuse.errors import CheckpointError, ConfigError, counted
from undiffuse.runtime.file_errors import BadFilesError

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset

OwnDataArgument = Annotated[
    str | None,
    typer.Argument(help="The data, as for train; by default those that the run was trained on.", metavar="[DATA]"),
]
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
    metavar = "LOW HIGH" if option.type == tuple[float, float] | None else None
    annotation = Annotated[option.type, typer.Option(*flags, help=option.help, metavar=metavar)]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)


def given_options(read: ReadData) -> str:
    """The options of data that were given, as on the command line, each after a space."""
    return "".join(f" {shlex.quote(word)}" for word in option_words(read.keywords))


def read_data(read: ReadData, data: str | None, run: Path) -> Dataset:
    """The data set that DATA names, or without DATA those that the ``run`` (folder or model file) was trained on.

    Raises `ConfigError` and `DataError`, also if options of data are given without DATA. An error that proposes a size
    proposes that of the run.
    """
    from undiffuse.training.run_folder import Run

    if data is not None:
        try:
            return read(data)
        except BadFilesError as error:
            if "size" in error.remedy and (side := _recorded_side(run)):
                error.remedy["size"] = side
            raise
    given = [OPTIONS[name].spelling for name, value in read.keywords.items() if value != OPTIONS[name].default]
    if given:
        cause = "it is an option of DATA; without DATA those of the run are read with the options of its training"
        raise ConfigError("USAGE", given[0], cause, "Leave it out, or name DATA")
    return Run(run_folder(run)).load_data()


def refuse_inside(out: Path | None, data: str | None, run: Path | None = None, flag: str = "--out") -> None:
    """Raise `ConfigError` if ``out`` lies inside the folder of DATA, or of the data of a ``run``.

    What a command writes there would be read as data by the next one. Raises what `require_utf8` raises too.
    """
    from undiffuse.data.sources.registry import path_of

    for where, path in ((f"{flag} {out}", out), (str(run), run)):
        if path is not None:
            require_utf8(where, path)
    source = path_of(data) if data is not None else recorded_source(run) if run is not None else None
    if out is not None and lies_inside(out, source):
        cause = f"it lies inside the data ({source}) and would be read as data"
        raise ConfigError("OUT", f"{flag} {out}", cause, "Give a place outside of them")


def lies_inside(path: Path, source: Path | None) -> bool:
    """Whether ``path`` lies inside the folder ``source``, or is it."""
    return source is not None and source.is_dir() and path.resolve().is_relative_to(source.resolve())


def recorded_source(run: Path) -> Path | None:
    """The path of the data that the ``run`` (folder or model file) was trained on, if it records one."""
    from undiffuse.data.sources.registry import path_of

    source = _recorded_data(run).get("source")
    return path_of(source) if source else None


def recorded_options(run: Path) -> dict[str, Any]:
    """The options of data that the ``run`` (folder or model file) was trained with; empty if none are recorded."""
    return dict(_recorded_data(run).get("options") or {})


def _recorded_data(run: Path) -> dict[str, Any]:
    """What ``run.json`` says of the data; empty without a record or if it is damaged, which does not harm the model."""
    from undiffuse.training.run_folder import Run

    with suppress(CheckpointError):
        return (Run(run_folder(run)).record or {}).get("data") or {}
    return {}


def _recorded_side(run: Path) -> int | None:
    """The side in pixels to which the images of a ``run`` were read; None if none is recorded."""
    recorded = _recorded_data(run)
    shape = recorded.get("item_shape") or ()
    side = shape[1] if len(shape) == 3 and shape[1] == shape[2] else None
    return (recorded.get("options") or {}).get("size", side)


def print_notes(dataset: Dataset) -> None:
    """Print what was noticed and changed when the data were read."""
    flags = {name: option.spelling for name, option in OPTIONS.items()}
    for note in dataset.notes:
        console.print(f"note: {in_flags(note, flags)}")


def record_skipped(dataset: Dataset, path: Path) -> None:
    """Write the skipped files with code and reason to ``path``, if there are any, and print where."""
    if dataset.report.skipped:
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.report.write(path)
        console.print(f"skipped: {counted(len(dataset.report.skipped), 'file')}, listed in {path}")
