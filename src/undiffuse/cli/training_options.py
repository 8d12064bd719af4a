"""Options of the commands that train, and what these print at their end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli.data_options import lies_inside, refuse_inside
from undiffuse.cli.options import console
from undiffuse.cli.results import add, show
from undiffuse.errors import ConfigError

if TYPE_CHECKING:
    from undiffuse.training.run_folder import Run

Minutes = Annotated[
    float | None,
    typer.Option(help="Train for about this many minutes, including the decay of the learning rate."),
]
Steps = Annotated[int | None, typer.Option(help="Train for this many optimizer steps.")]
Epochs = Annotated[float | None, typer.Option(help="Train for this many passes over the training items.")]
Batch = Annotated[int | None, typer.Option(help="Items per optimizer step; by default that of the recipe.")]
LearningRate = Annotated[float | None, typer.Option(help="Peak learning rate; by default that of the recipe.")]
OnNonfinite = Annotated[
    str | None,
    typer.Option(
        help="At a step whose loss or gradient is NaN or infinite: stop (default) ends the run, skip omits the step."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Resume a run although settings, data or torch have changed.")]


def _check_loggers(names: list[str] | None) -> list[str] | None:
    """The callback of ``--log``: an error at once, not after the data are read."""
    if names:
        from undiffuse.training.loggers import check_loggers

        check_loggers(names)
    return names


Log = Annotated[
    list[str] | None,
    typer.Option("--log", help="Log the records also to tensorboard or wandb; repeatable.", callback=_check_loggers),
]
Extend = Annotated[
    bool, typer.Option("--extend", help="Train the run in --out for further --minutes or --steps, with its own recipe.")
]


def open_run(out: Path | None, data: str, suffix: str = "") -> Run:
    """The run in ``out``, by default runs/DATA with a ``suffix``, next to DATA if that is inside them; none is created.

    Raises `ConfigError` if ``out`` is inside the data.
    """
    from undiffuse.data.sources.registry import path_of
    from undiffuse.training.run_folder import Run

    source = path_of(data)
    if out is None:
        path = Path(data) if source is None else source.resolve()
        out = Path("runs") / f"{path.name.lstrip('.').split('.')[0] or 'data'}{suffix}"
        if lies_inside(out, source):
            out = Path(os.path.relpath(path.parent)) / out
    refuse_inside(out, data)
    return Run(out)


def report_finished(run: Run, extendable: bool = True) -> None:
    """Print that the run is finished, which `undiffuse.training.fit.fit` has compared with the command."""
    _add_run(run)
    longer = "--extend trains it longer, " * extendable
    console.print(f"{run.folder} is a finished run already; {longer}another --out trains again")


def report_done(run: Run) -> None:
    """Print where the model is, and the report, if one could be written."""
    from undiffuse.training import run_report

    page, shown = run.folder / run_report.NAME, ""
    _add_run(run)
    if page.is_file():
        with suppress(ConfigError):
            run_report.check_page(page)
            shown = f"; report: {page}"
    console.print(f"done: {run.model}{shown}")


def _add_run(run: Run) -> None:
    add(run=run.folder, model=run.model, records=run.read_metrics())


@contextmanager
def changes_as_table() -> Iterator[None]:
    """Print a table of what has changed since the run began, if that is the error."""
    from undiffuse.training.run_folder import ChangedError

    try:
        yield
    except ChangedError as error:
        rows = [{"": what, "at the beginning": old, "now": new} for what, old, new in error.rows]
        changed = [{"setting": what, "as_begun": old, "now": new} for what, old, new in error.rows]
        show(rows, error.where, changed=changed)
        raise
