"""``undiffuse watch``: how a run goes, from what it writes; it touches nothing of the run itself."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from undiffuse.cli.options import console
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.report.spark import spark
from undiffuse.train import Run

Record = Mapping[str, Any]
CURVES = {
    "loss": "training loss",
    "bits_per_dim": "held out, bits/dim",
    "gap": "held out − training, bits/dim",
    "items_per_second": "items a second",
    "lr": "learning rate",
    "gradient_norm": "norm of the gradient",
}


def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not.", metavar="RUN")],
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1)] = 2.0,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Also write the run's records into this folder, for TensorBoard.")
    ] = None,
) -> None:
    """Show how a run goes, as it goes: curves, rates, what is left. Ctrl-C ends it, and not the run."""
    watched = Run(run)
    if watched.record is None:
        raise CheckpointError("NOT_FOUND", run, "there is no run in this folder", "Name the folder of a run")
    board = None if tensorboard is None else Board(tensorboard)
    try:
        with Live(picture(watched), console=console, refresh_per_second=4, transient=False) as live:
            while True:
                if board is not None:
                    board.add(watched.read_metrics())
                if once or watched.finished:
                    break
                time.sleep(every)
                live.update(picture(watched))
            live.update(picture(watched))
    except KeyboardInterrupt:
        pass
    if not console.is_terminal:
        console.print()  # Live ends its last line on terminals only
    if board is not None:
        console.print(f"for TensorBoard: {tensorboard}", markup=False)


class Board:
    """Writes records as TensorBoard's scalars, each of them once. Raises `ConfigError` if the package is missing."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            fix = "Install it: pip install 'undiffuse[tensorboard]'"
            raise ConfigError("MISSING_PACKAGE", "tensorboard", "is not installed", fix) from None
        self.writer, self.done = SummaryWriter(str(folder)), set()

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            for name, value in record.items():
                if name != "step" and (record["step"], name) not in self.done:
                    self.done.add((record["step"], name))
                    self.writer.add_scalar(name, float(value), record["step"])
        self.writer.flush()


def picture(run: Run) -> Group:
    """The run as lines of text: what it is, how far it has come, and each number with its curve."""
    record, records = run.record, run.read_metrics()
    assert record is not None
    lines = [f"{record['data']['name']}, {_state(run, record)}: {run.folder}"]
    step, seconds = (max((r[key] for r in records if key in r), default=0) for key in ("step", "seconds"))
    kept = sorted(int(f.name[-8:]) for f in run.checkpoints.glob("step-*"))
    lines.append(
        f"step {step:,} after {_time(seconds)}{_left(record, step, seconds)}"
        + (f" · last checkpoint at step {kept[-1]:,}" if kept else " · no checkpoint yet")
    )
    for key, name in CURVES.items():
        values = [r[key] for r in records if key in r]
        if values:
            lines.append(f"{name:>30} {values[-1]:>11.5g}  {spark(values)}")
    bounds = [(r["bits_per_dim"], r["step"]) for r in records if "bits_per_dim" in r]
    if bounds:
        lines.append(f"{'best held out':>30} {min(bounds)[0]:>11.5g}  at step {min(bounds)[1]:,}")
    for r in [r for r in records if "final_bits_per_dim" in r][-1:]:
        error = f"± {r['final_stderr']:.2g}  " if "final_stderr" in r else ""
        lines.append(
            f"{'at the end, of more draws':>30} {r['final_bits_per_dim']:>11.5g}  {error}at step {r['step']:,}"
        )
    if any([r["overfit"] for r in records if "overfit" in r][-1:]):
        lines.append("it begins to remember its training items: the gap to held-out ones is no accident")
    return Group(*(Text(line, no_wrap=True) for line in lines))


def _state(run: Run, record: Record) -> str:
    """Finished, or training by the process that holds the lock, or stopped."""
    if record["finished"]:
        return "finished"
    trainer = run.trainer
    return f"training, process {trainer}" if trainer else "stopped; the command that began it goes on with it"


def _left(record: Record, step: int, seconds: float) -> str:
    """How much of the run is to come, as its recipe says and the time so far suggests."""
    settings = record["config"]["train"]
    if record["finished"] or not step:
        return ""
    left = seconds * (settings["steps"] / step - 1) if settings["steps"] else 60 * settings["minutes"] - seconds
    return f", about {_time(max(left, 0))} left"


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
