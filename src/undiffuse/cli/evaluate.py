"""``undiffuse evaluate``: −log p of held-out items in bits per dimension, by two bounds and the probability flow."""

from __future__ import annotations

import functools
import signal
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undiffuse.cli.data_options import (
    OwnDataArgument,
    ReadData,
    read_data,
    record_skipped,
    refuse_inside,
    with_data_options,
)
from undiffuse.cli.options import (
    MAX_COUNT,
    Device,
    NetworkFile,
    RunArgument,
    console,
    register_network,
    resolve_device,
    run_folder,
)

if TYPE_CHECKING:
    from undiffuse.evaluation.run_evaluation import Progress


@with_data_options
def evaluate(
    run: RunArgument,
    data: OwnDataArgument = None,
    part: Annotated[
        str | None,
        typer.Option(help="test, validation, train or all; by default test for the model's own data, all for others."),
    ] = None,
    estimate: Annotated[
        list[str] | None, typer.Option(help="discrete, continuous or ode; repeatable; by default all three.")
    ] = None,
    items: Annotated[
        int | None, typer.Option(help="Largest number of items to measure, spread evenly over the part.", min=2)
    ] = None,
    mc_samples: Annotated[
        int | None,
        typer.Option(help="Monte Carlo samples of the bounds for each item: steps or points.", min=1, max=MAX_COUNT),
    ] = None,
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Give a conditional model no condition, even if the data have one.")
    ] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Measure every item with every step of the chain, and as many points of the continuous bound.",
        ),
    ] = False,
    iw_samples: Annotated[
        int, typer.Option(help="Importance samples of the flow for each item, for integer data.", min=1, max=MAX_COUNT)
    ] = 1,
    compat: Annotated[
        str | None, typer.Option(help="openai: also the bound as improved-diffusion's script computes it.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Approximate minutes; sets the numbers of items and samples that are not given.")
    ] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; by default the run folder.")] = None,
    network: NetworkFile = None,
    device: Device = "auto",
    *,
    read: ReadData,
) -> None:
    """Measure a model in bits per dimension, on its own held-out data or on DATA; an interrupted evaluation resumes."""
    from undiffuse.evaluation import resumable
    from undiffuse.evaluation.run_evaluation import evaluate as evaluate_model
    from undiffuse.model import checkpoint
    from undiffuse.report import evaluation_report, table
    from undiffuse.runtime.distributed_group import init_process_group
    from undiffuse.runtime.signals import Interrupted

    refuse_inside(out, data, run)
    register_network(network)
    group = init_process_group(resolve_device(device))
    model = checkpoint.load(run, group.device)
    dataset = read_data(read, data, run)
    folder = out or run_folder(run)
    batches = folder / evaluation_report.BATCHES
    try:
        if group.rank == 0:
            evaluation_report.check_folder(folder, own=out is None)
        with (
            resumable.locked(batches) if group.rank == 0 else nullcontext(),
            _ProgressBar(group.rank == 0) as bar,
        ):
            result = evaluate_model(
                model,
                dataset,
                part=part,
                estimates=estimate or (),
                items=items,
                mc_samples=mc_samples,
                exact=exact,
                iw_samples=iw_samples,
                seed=seed,
                compat=compat,
                minutes=minutes,
                unconditional=unconditional,
                folder=batches,
                group=group,
                on_message=bar.print,
                on_progress=bar.update,
            )
            bar.hide()
            if group.rank:
                return
            table.render(evaluation_report.evaluation_rows(result), evaluation_report.table_title(result))
            differences = evaluation_report.describe_differences(result.summary()["minus_discrete"])
            skipped = functools.partial(record_skipped, dataset) if dataset.report.skipped else None
            written = evaluation_report.write_evaluation(result, folder, skipped)
            for line in [*result.explanations(), *differences, *written]:
                console.print(line, markup=False)
            resumable.remove(batches)
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT) from None


class _ProgressBar:
    """A bar on the terminal that an evaluation updates; shown by the ``first`` process alone."""

    def __init__(self, first: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        name, left = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[left]}"))
        hidden = not (first and console.is_terminal)
        self.bar = Progress(name, BarColumn(), left, console=console, transient=True, disable=hidden)
        self.task = self.bar.add_task("", total=None, left="")

    def __enter__(self) -> _ProgressBar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def hide(self) -> None:
        """Removes the bar, before results are printed."""
        self.bar.stop()

    def print(self, message: str) -> None:
        """Prints a line above the bar."""
        self.bar.console.print(message, markup=False)

    def update(self, progress: Progress) -> None:
        """Shows how far the evaluation is."""
        left = timedelta(seconds=round(progress.left))
        self.bar.update(
            self.task,
            description=progress.estimate,
            completed=progress.spent,
            total=progress.total,
            left=f"{left} left",
        )
