"""``undiffuse watch``: curves of a run from the files that it writes; the run itself is not touched."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from undiffuse.cli.options import console
from undiffuse.cli.results import add, with_json
from undiffuse.errors import ConfigError
from undiffuse.report.progress_bar import format_clock

if TYPE_CHECKING:
    from undiffuse.training.run_folder import Run

Record = Mapping[str, Any]
CURVES = {
    "loss": "training loss",
    "bits_per_dim": "held out, bits/dim",
    "gap": "held out − training, bits/dim",
    "accuracy": "held-out accuracy",
    "items_per_second": "items per second",
    "lr": "learning rate",
    "gradient_norm": "gradient norm",
}
"""Names of records, in the order shown, and what they are called."""
MAX_WAIT = 86_400
"""Seconds between two updates at most."""


@with_json
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not.", metavar="RUN")],
    once: Annotated[bool, typer.Option("--once", help="Show the run once and exit.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two updates.", min=0.1)] = 1.0,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Also write the run's records into this folder, for TensorBoard.")
    ] = None,
) -> None:
    """Show the curves of a run while it trains.

    Also shows the time left. Ctrl-C ends the display, not the run.
    """
    from undiffuse.training.run_folder import Run

    if not every <= MAX_WAIT:
        raise ConfigError(
            "USAGE", f"--every {every:g}", f"not a number up to {MAX_WAIT:,} seconds", "Give such a number"
        )
    watched = Run(run)
    shown = summary(watched)
    board = None
    if tensorboard is not None:
        from undiffuse.training import loggers

        try:
            tensorboard.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            cause = f"is not a folder that can be written ({error.strerror})"
            raise ConfigError("OUT", f"--tensorboard {tensorboard}", cause, "Give another folder") from None
        board = loggers.board(tensorboard)
    try:
        with Live(shown, console=console, refresh_per_second=4, transient=False) as live:
            while True:
                if board is not None:
                    board.add(watched.read_metrics())
                if once or watched.finished:
                    break
                time.sleep(every)
                live.update(summary(watched))
            live.update(summary(watched))
    except KeyboardInterrupt:
        pass
    if not console.is_terminal:
        console.print()  # Live ends its last line on terminals only
    if board is not None:
        console.print(f"for TensorBoard: {tensorboard}")
    add(**state(watched))


def summary(run: Run) -> Group:
    """The run as lines of text: its data and state, steps and time, and each number with its curve.

    Raises `CheckpointError` if there is no run in the folder, or not any more.
    """
    from undiffuse.report.table import spark
    from undiffuse.training.run_folder import checkpoint_folders, step_of

    record, records = run.require_record(), run.read_metrics()
    step, seconds = (max((r[key] for r in records if key in r), default=0) for key in ("step", "seconds"))
    now = seconds + _since_record(run)
    saved = [step_of(folder) for folder in checkpoint_folders(run.checkpoints)]
    checkpoint = f"last checkpoint at step {saved[-1]:,}" if saved else "no checkpoint yet"
    lines = [
        f"{record['data']['name']}, {_state(run, record)}: {run.folder}",
        f"step {step:,} after {format_clock(now)}{_time_left(record, step, seconds, now)} · {checkpoint}",
    ]
    for key, name in CURVES.items():
        if values := [r[key] for r in records if key in r]:
            lines.append(f"{name:>30} {values[-1]:>11.5g}  {spark(values)}")
    if bounds := [(r["bits_per_dim"], r["step"]) for r in records if "bits_per_dim" in r]:
        best, at = min(bounds)
        lines.append(f"{'best held out':>30} {best:>11.5g}  at step {at:,}")
    for r in [r for r in records if "final_bits_per_dim" in r][-1:]:
        stderr = f"± {r['final_stderr']:.2g}  " if "final_stderr" in r else ""
        lines.append(
            f"{'final, more noise levels':>30} {r['final_bits_per_dim']:>11.5g}  {stderr}at step {r['step']:,}"
        )
    if any([r["overfit"] for r in records if "overfit" in r][-1:]):
        lines.append("overfitting: the gap between held-out and training items is significant")
    return Group(*(Text(line, no_wrap=True) for line in lines))


def state(run: Run) -> dict[str, Any]:
    """The run as plain data: whether it is finished, the process that trains it, and its records."""
    pid = run.training_pid
    facts = {"run": run.folder, "data": run.require_record()["data"]["name"], "finished": run.finished}
    return facts | {"process": pid, "records": run.read_metrics()}


def _state(run: Run, record: Record) -> str:
    """Finished, training (in the process that holds the lock), or stopped."""
    if record["finished"]:
        return "finished"
    pid = run.training_pid
    return f"training, process {pid}" if pid else "stopped; the command that began it resumes it"


def _since_record(run: Run) -> float:
    """The seconds since the latest record of a run that trains, or since it began; 0 if it does not train."""
    if run.training_pid is None:
        return 0.0
    latest = run.metrics if run.metrics.is_file() else run.folder / "run.json"
    return max(time.time() - latest.stat().st_mtime, 0.0)


def _time_left(record: Record, step: int, seconds: float, now: float) -> str:
    """The time left ``now``, from the length of the run and the speed at its latest record; nothing if finished."""
    settings = record["config"]["train"]
    if record["finished"] or not step:
        return ""
    length = seconds * settings["max_steps"] / step if settings["max_steps"] else 60 * settings["minutes"]
    left = length - now
    return f", about {format_clock(max(left, 0))} left"
