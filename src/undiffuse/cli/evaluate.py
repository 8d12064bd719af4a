"""``undiffuse evaluate``: −log p of held-out items in bits per dimension, by two bounds and the probability flow."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.cascade_options import Then, full_resolution, load_model, refuse_with_then, stage_words
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
    Precision,
    RunArgument,
    console,
    log_of,
    register_network,
    resolve_device,
    run_folder,
)
from undiffuse.cli.results import show, with_json
from undiffuse.errors import ConfigError


@with_json
@with_data_options
def evaluate(
    run: RunArgument,
    data: OwnDataArgument = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="test, validation, train or all; by default test of the data of training, all of other data."
        ),
    ] = None,
    estimate: Annotated[
        list[str] | None,
        typer.Option(
            help="discrete (bound of the chain), continuous (bound in continuous time), ode (probability flow), "
            "flow_map (only distill --both-ways); repeatable; by default all."
        ),
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
            help="Measure every item, or --items of them, with every step of the chain and as many points of the "
            "continuous bound.",
        ),
    ] = False,
    iw_samples: Annotated[
        int,
        typer.Option(
            help="Importance samples of the flow for each item, for integer data and latents.", min=1, max=MAX_COUNT
        ),
    ] = 1,
    compat: Annotated[
        str | None, typer.Option(help="openai: also the bound as improved-diffusion's script computes it.")
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="Approximate minutes; sets the numbers of items and samples that are not given.")
    ] = 5.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; by default the run folder.")] = None,
    then: Then = None,
    network: NetworkFile = None,
    device: Device = "auto",
    precision: Precision = "auto",
    *,
    read: ReadData,
) -> None:
    """Measure a model in bits per dimension.

    The items are its own held-out data, or those of DATA. An interrupted evaluation is resumed.
    """
    from undiffuse.evaluation import resumable
    from undiffuse.evaluation.run_evaluation import evaluate as evaluate_model
    from undiffuse.evaluation.summary import NAMES
    from undiffuse.report import evaluation_report
    from undiffuse.report.progress_bar import ProgressBar
    from undiffuse.runtime.distributed_group import init_process_group
    from undiffuse.runtime.signals import interruptible

    refuse_inside(out, data, run)
    refuse_with_then(then, compat=compat)
    if exact and mc_samples is not None:
        cause = "--exact takes every step of the chain, and as many points"
        raise ConfigError("USAGE", f"--mc-samples {mc_samples}", cause, "Give one of the two")
    register_network(network)
    group = init_process_group(resolve_device(device))
    model = load_model(run, then, group.device, log_of(group), precision)
    dataset = read_data(read, data, then[-1] if then else run)
    dataset = full_resolution(dataset) if then else dataset
    folder = out or run_folder(run).joinpath(*([f"cascade-{'-'.join(stage_words(then, None))}"] if then else []))
    batches = folder / evaluation_report.BATCHES
    first = group.rank == 0
    if first:
        evaluation_report.check_folder(folder, own=out is None)
    with interruptible(), resumable.locked(batches) if first else nullcontext():
        with ProgressBar(console) if first else nullcontext() as bar:
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
                on_message=lambda message: console.print(message),
                on_progress=lambda p: bar and bar.update(p.spent / max(p.total, 1e-9), "", p.left, NAMES[p.estimate]),
            )
        if not first:
            return
        numbers = result.summary()
        rows, title = evaluation_report.evaluation_rows(numbers)
        show(rows, title, **numbers, explanations=result.explanations())
        differences = evaluation_report.describe_differences(numbers["minus_discrete"])
        skipped = functools.partial(record_skipped, dataset) if dataset.report.skipped else None
        written = evaluation_report.write_evaluation(result, folder, skipped)
        for line in [*result.explanations(), *differences, *written]:
            console.print(line)
        resumable.remove(batches)
