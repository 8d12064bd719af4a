"""``undiffuse distill``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.data_options import (
    OwnDataArgument,
    ReadData,
    print_notes,
    read_data,
    refuse_inside,
    with_data_options,
)
from undiffuse.cli.options import (
    Device,
    NetworkFile,
    RunArgument,
    as_argument,
    console,
    network_option,
    register_network,
    resolve_device,
    run_folder,
)
from undiffuse.cli.prompt_options import example_condition
from undiffuse.cli.recipe_options import check_length, format_length
from undiffuse.cli.results import with_json
from undiffuse.cli.training_options import (
    Force,
    Log,
    Minutes,
    OnNonfinite,
    Steps,
    changes_as_table,
    report_done,
    report_finished,
)
from undiffuse.model.config import MAX_CALLS

if TYPE_CHECKING:
    from undiffuse.model.config import TrainConfig

LR_FACTOR = 0.25
"""The learning rate relative to that of the teacher's training, since the weights are good already."""


@with_json
@with_data_options
def distill(
    run: RunArgument,
    data: OwnDataArgument = None,
    calls: Annotated[int, typer.Option(help="Network calls of a sample, such as 1, 2 or 4.", min=1, max=MAX_CALLS)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="The run folder; by default RUN with the calls, such as runs/digits-1-call.")
    ] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    guidance: Annotated[
        float, typer.Option(help="Scale of the model's classifier-free guidance, which becomes part of the result.")
    ] = 1.0,
    method: Annotated[
        str,
        typer.Option(help="consistency (noise to data), or a flow map between any two levels: lagrangian, meanflow."),
    ] = "consistency",
    both_ways: Annotated[
        bool,
        typer.Option(
            "--both-ways", help="Lagrangian only: also learn data to noise, for evaluate --estimate flow_map."
        ),
    ] = False,
    pairs: Annotated[
        str,
        typer.Option(help="Source of the points or velocities to learn from: teacher (RUN) or data."),
    ] = "teacher",
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.", min=0)] = 0,
    device: Device = "auto",
    network: NetworkFile = None,
    on_nonfinite: OnNonfinite = None,
    log: Log = None,
    force: Force = False,
    *,
    read: ReadData,
) -> None:
    """Distill RUN into a model that samples in few calls.

    It trains on the data of RUN, from the weights of RUN, for 10 minutes if no length is given. An unfinished run is
    resumed. A flow map has a likelihood, a consistency model has none.
    """
    from undiffuse.model import checkpoint
    from undiffuse.training.distillation_task import distillation_task
    from undiffuse.training.fit import fit
    from undiffuse.training.run_folder import Run

    refuse_inside(out, None, run)
    device = resolve_device(device)
    check_length(minutes, steps)
    register_network(network)
    teacher = checkpoint.load(run)
    dataset = read_data(read, data, run)
    print_notes(dataset)
    folder = run_folder(run)
    name = f"{folder.resolve().name}-{calls}-call{'s' * (calls > 1)}"
    name += f"-{method}" if method != "consistency" else ""
    student = Run(out or folder.parent / name, log or ())
    finished = student.finished
    length = {"minutes": 10.0 if (minutes, steps) == (None, None) else minutes, "max_steps": steps}
    given = {} if on_nonfinite is None else {"on_nonfinite": on_nonfinite}
    settings = _settings_of(run, seed=seed, **length, **given)
    task = distillation_task(teacher, settings, calls, pairs, guidance, method, both_ways)
    if not finished:
        console.print(f"{calls}-call model of {run}, {format_length(settings)}, into {student.folder}")
    with changes_as_table():
        fit(task, dataset, student, device, force=force)
    if finished:
        report_finished(student, extendable=False)
        return
    report_done(student)
    options = example_condition(teacher.trained_condition_sizes, dataset) + network_option(network)
    console.print(f"next: undiffuse sample {as_argument(student.folder)}{options}")


def _settings_of(run: Path, **settings: Any) -> TrainConfig:
    """Training settings of the ``run``, with ``settings``, a smaller learning rate, a short warmup, no snapshots.

    The precision is chosen for this machine; the record has the one for the machine of the run.
    """
    from undiffuse.model.config import TrainConfig, from_dict
    from undiffuse.training.run_folder import Run

    record = Run(run_folder(run)).record
    own = from_dict(TrainConfig, record["config"]["train"], "run.json: train") if record else TrainConfig()
    warmup = min(own.warmup, TrainConfig().warmup)  # a distillation is short
    settings = {"precision": TrainConfig().precision} | settings
    return replace(own, lr=LR_FACTOR * own.lr, warmup=warmup, snapshots=0, **settings)
