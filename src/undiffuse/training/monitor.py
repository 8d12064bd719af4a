"""What a run prints and records while it trains: a progress bar, evaluations on fixed noise, pictures.

Nothing here changes what is trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as ProgressBar

from undiffuse.data.dataset import Dataset, Split
from undiffuse.errors import ConfigError, NonFiniteError, ResourceError
from undiffuse.report import figures
from undiffuse.runtime.terminal import make_console
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import Run
from undiffuse.training.task import Task

STEPS_PER_RECORD = 50


class Monitor:
    """Records the steps of a run and evaluates ``ema_model``, the model with averaged weights.

    A context manager that shows the progress bar. In processes other than the first one (``main`` false) it writes and
    prints nothing.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        ema_model: Any,
        data: Dataset,
        split: Split,
        progress: Progress,
        quiet: bool = False,
        main: bool = True,
    ) -> None:
        self.run, self.task, self.ema_model = run, task, ema_model
        self.data, self.split, self.progress, self.main = data, split, progress, main
        self.settings = task.config.train
        self.records: list[dict[str, Any]] = run.read_metrics(progress.step)
        self.console = make_console(quiet=quiet or not main)
        name, status = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[status]}"))
        self.bar = ProgressBar(name, BarColumn(), status, console=self.console, transient=True, refresh_per_second=2)
        self.bar_row = self.bar.add_task("training", total=1.0, status="")
        self.losses: list[float] = []
        self.waited = 0.0
        self.since = time.perf_counter()
        self.previous_fraction = self.fraction = progress.fraction(self.settings)

    def __enter__(self) -> Monitor:
        if self.console.is_terminal:
            self.bar.start()
        verb = "training resumes" if self.progress.step else "training"
        shape = "×".join(map(str, self.data.item_shape))
        parameters = sum(p.numel() for p in self.ema_model.network.parameters())
        self.log(
            f"{verb} on {len(self.split.train):,} items of {self.data.name}, {shape}: "
            f"{parameters / 1e6:.2f} M parameters, {self.settings.precision}, batch {self.settings.batch}"
        )
        if self.main and self.progress.step:
            self.write_records()  # without records of steps after the checkpoint
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.stop()

    def log(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, soft_wrap=True, markup=False)

    def record_step(self, loss: float | None, norm: float, lr: float, waited: float) -> None:
        """Note a step, or a skipped one if ``loss`` is None; write a record every fifty steps and at the end.

        ``norm`` of the gradient; ``waited``: seconds that training has waited for data so far.
        """
        self.previous_fraction, self.fraction = self.fraction, self.progress.fraction(self.settings)
        if loss is None:
            self.records.append({"step": self.progress.step, "skipped": 1})
            return
        self.losses.append(loss)
        if len(self.losses) < STEPS_PER_RECORD and self.progress.step != self.progress.last_step:
            return
        now = time.perf_counter()
        record = {
            "step": self.progress.step,
            "seconds": round(self.progress.seconds, 2),
            "loss": sum(self.losses) / len(self.losses),
            "gradient_norm": norm,
            "lr": lr,
            "items_per_second": round(len(self.losses) * self.settings.batch / (now - self.since), 1),
            "data_share": round((waited - self.waited) / (now - self.since), 4),
        }
        self.losses, self.since, self.waited = [], now, waited
        self._show(record)
        self.records.append(record)
        if self.main:
            with self._tolerate_write_errors():
                self.run.append_metrics(record)

    def crossed_part(self, parts: int) -> bool:
        """Whether the last step crossed the end of one of so many equal parts of the run."""
        return int(self.fraction * parts) > int(self.previous_fraction * parts)

    def evaluation_due(self) -> bool:
        """Whether to evaluate now: ``previews`` times a run, where the last time, at the end, is that of `finish`."""
        return self.crossed_part(self.settings.previews) and self.fraction < 1

    @torch.no_grad()
    def evaluate_now(self, final: bool = False) -> None:
        """Evaluate the model, save it, draw it, and print a line."""
        self.ema_model.info.update(self._training_info())
        numbers, summary, details = self.task.evaluate(self.ema_model, self.data, self.split, final)
        self.task.save(self.ema_model, self.run.model)
        if numbers:
            where = {"step": self.progress.step, "seconds": round(self.progress.seconds, 2)}
            self.records.append(where | numbers)
        self._draw(self.progress.step)
        self.write_records()
        columns = [
            f"{_clock(self.progress.seconds):>8}  step {self.progress.step:>7,}",
            *self._latest("loss", "loss {:.4f}"),
            summary,
            *self._latest("items_per_second", "{:,.0f} items/s"),
        ]
        self.log("  ".join(columns))
        for line in details:
            self.log(f"{'':8}  {line}")
        self.since = time.perf_counter()

    def finish(self) -> None:
        """Evaluate and draw the finished model, draw the training curve, and mark the run as finished."""
        self.evaluate_now(True)
        self._draw(None)
        try:
            with self._tolerate_write_errors():
                figures.training_curve(self.records).savefig(self.run.pictures / "training.png", dpi=150)
        except ConfigError:
            self.log("no training curve: matplotlib is not installed (pip install 'undiffuse[report]')")
        self.run.finish()

    def write_records(self) -> None:
        """Write all records."""
        with self._tolerate_write_errors():
            self.run.write_metrics(self.records)

    def _show(self, record: dict[str, Any]) -> None:
        left = _clock(self.progress.seconds * (1 / max(self.fraction, 1e-9) - 1))
        rate = f"{record['items_per_second']:,.0f} items/s"
        status = f"step {record['step']:,} · loss {record['loss']:.4f} · {rate} · {left} left"
        self.bar.update(self.bar_row, completed=self.fraction, status=status)

    @torch.no_grad()
    def _draw(self, step: int | None) -> None:
        try:
            with self._tolerate_write_errors():
                self.task.draw(self.ema_model, self.data, self.split, self.run.pictures, step)
        except (ConfigError, NonFiniteError) as error:
            self.log(f"no picture of the model: {error.cause}")

    @contextmanager
    def _tolerate_write_errors(self) -> Iterator[None]:
        """Print a failure to write a file that the run can do without, and continue."""
        try:
            yield
        except (OSError, ResourceError) as error:
            self.log(f"not written: {error}")

    def _training_info(self) -> dict[str, object]:
        """Facts about the training, for the model's file."""
        return {
            "steps": self.progress.step,
            "seconds": round(self.progress.seconds, 1),
            "seed": self.settings.seed,
            "batch": self.settings.batch,
            "precision": self.settings.precision,
            "torch": torch.__version__,
        }

    def _latest(self, key: str, form: str) -> list[str]:
        """The latest recorded number of that name, formatted; empty if there is none."""
        return [form.format(r[key]) for r in self.records if key in r][-1:]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
