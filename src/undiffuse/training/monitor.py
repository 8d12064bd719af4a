"""What a run prints and records while it trains: a progress bar, evaluations on fixed noise, pictures.

Nothing here changes what is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from undiffuse.data.dataset import Dataset, Split
from undiffuse.errors import ConfigError, DataError, NonFiniteError, ResourceError, counted
from undiffuse.evaluation.plan import describe_shape
from undiffuse.evaluation.time_limit import Pace, TimeLimit
from undiffuse.model.config import to_dict
from undiffuse.report.progress_bar import ProgressBar, format_clock
from undiffuse.runtime.terminal import make_console
from undiffuse.training.loggers import Logger, open_loggers
from undiffuse.training.progress import Progress, measuring_allowance
from undiffuse.training.run_folder import Run
from undiffuse.training.run_report import NAME as REPORT
from undiffuse.training.run_report import collect, write_page
from undiffuse.training.task import Task

STEPS_PER_RECORD = 50
FORWARD_PASSES = 3
"""Network calls that take as long as a training step: backward passes cost twice as much as forward ones."""
LEAST_CALLS = 24
"""Network calls of the smallest evaluation that is made: two noise levels of six held-out and six training items."""
BOUND_SHARE, FIGURES_SHARE = 0.6, 0.3
"""Fractions of a limited evaluation for its numbers, and of the last one for what is not measured: files, the curve,
and half of it for the pictures of the report."""
REPORT_FRACTION = 0.02
"""The report's pictures take at most this fraction of the network calls of training."""


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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.run, self.task, self.ema_model = run, task, ema_model
        self.data, self.split, self.progress, self.main = data, split, progress, main
        self.settings = task.config.train
        self.console = make_console(quiet=quiet or not main)
        self.records: list[dict[str, Any]] = run.read_metrics(progress.step, self.log)
        self.clock, self.pace, self.allowance = clock, Pace(), measuring_allowance(self.settings)
        self.pace.follow(progress.step_seconds / (self.settings.batch * FORWARD_PASSES))
        self.bar = ProgressBar(self.console, "training", clock=clock)
        self.losses: list[float | Tensor] = []
        self.mean_loss: float | None = None
        self.norm: float | Tensor = 0.0
        self.steps, self.step_seconds, self.waited = 0, 0.0, 0.0  # since the last record, but for ``waited``
        self.step_end, self.save_seconds = progress.seconds, 0.0
        self.previous_fraction = self.fraction = progress.fraction(self.settings)
        self.loggers: list[Logger] = []

    def __enter__(self) -> Monitor:
        self.bar.start()
        verb = "training resumes" if self.progress.step else "training"
        shape = describe_shape(self.data.item_shape)
        parameters = sum(p.numel() for p in self.ema_model.network.parameters())
        self.log(
            f"{verb} on {counted(len(self.split.train), 'item')} of {self.data.name}, {shape}: "
            f"{parameters / 1e6:.2f} M parameters, {self.settings.precision}, batch {self.settings.batch}"
        )
        if self.main and self.run.metrics.exists():
            self.write_records()  # without records of steps after the checkpoint, or of an attempt without one
        if self.main:
            config = to_dict(self.task.config)
            self.loggers = open_loggers(self.run.loggers, self.run.folder, self.records, config)
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.stop()
        self._to_loggers(lambda logger: logger.close())

    def log(self, line: str) -> None:
        """Print a line above the bar; a closed terminal only loses the line."""
        with suppress(OSError):
            self.console.print(line, soft_wrap=True)

    @property
    def record_due(self) -> bool:
        """Whether `record_step` writes a record of the step that is done, if there are losses since the last one."""
        return len(self.losses) + 1 >= STEPS_PER_RECORD or self.progress.step == self.progress.last_step

    def record_step(
        self, loss: float | Tensor | None, norm: float | Tensor, lr: float, waited: float, seconds: float
    ) -> None:
        """Note a step, or a skipped one if ``loss`` is None; write a record every fifty steps and at the end.

        ``norm`` of the gradient; ``waited``: seconds that training has waited for data so far; ``seconds`` of the step.
        Tensors are read when a record is written.
        """
        due = self.record_due
        self.previous_fraction, self.fraction = self.fraction, self.progress.fraction(self.settings)
        self.step_end = self.progress.seconds
        self.steps, self.step_seconds = self.steps + 1, self.step_seconds + seconds
        self.pace.follow(self.step_seconds / (self.steps * self.settings.batch * FORWARD_PASSES))
        if loss is None:
            self.records.append({"step": self.progress.step, "skipped": 1})
        else:
            self.losses.append(loss)
            self.norm = norm
        due = due and bool(self.losses)
        if due or isinstance(loss, float):
            self.mean_loss = _mean(self.losses)
        self._show()
        if not due:
            return
        duration = max(self.step_seconds, 1e-9)
        record = {
            "step": self.progress.step,
            "seconds": round(self.progress.seconds, 2),
            "loss": self.mean_loss,
            "gradient_norm": float(self.norm),
            "lr": lr,
            "items_per_second": round(self.steps * self.settings.batch / duration, 1),
            "data_share": round((waited - self.waited) / duration, 4),
        }
        self.losses, self.steps, self.step_seconds, self.waited = [], 0, 0.0, waited
        self.records.append(record)
        if self.main:
            with self._tolerate_write_errors():
                self.run.append_metrics(record)
            self._to_loggers(lambda logger: logger.add([record]))

    def crossed_part(self, parts: int) -> bool:
        """Whether the last step crossed the end of one of so many equal parts of the run."""
        return int(self.fraction * parts) > int(self.previous_fraction * parts)

    def evaluation_due(self) -> bool:
        """Whether to evaluate now: at most ``previews`` times a run, of which the last time is that of `finish`.

        A run by the clock omits an evaluation for which its share of the allowance is too short.
        """
        if not self.crossed_part(self.settings.previews) or self.fraction >= 1:
            return False
        return self._share() > self.save_seconds + LEAST_CALLS / BOUND_SHARE * self.pace.seconds

    def evaluate_missing(self) -> None:
        """Evaluate now if the run was stopped between the checkpoint that it resumes from and its evaluation."""
        if self.progress.evaluation_missing and not any(map(self._is_evaluation_of_step, self.records)):
            self.evaluate_now()

    def _is_evaluation_of_step(self, record: dict[str, Any]) -> bool:
        return record["step"] == self.progress.step and _is_evaluation(record)

    def evaluate_now(self) -> None:
        """Evaluate the model, save it, draw it, and print a line."""
        self.save_seconds = self.progress.seconds - self.step_end
        self._evaluate(TimeLimit(self._share() - self.save_seconds, self.pace, self.clock), final=False)
        self.progress.measuring_seconds += self.save_seconds
        self.progress.evaluation_missing = False

    def finish(self) -> None:
        """Evaluate and draw the finished model, write the report of the run, and mark the run as finished.

        A run that is stopped before the end of this repeats it when it is resumed. In a run by the clock this ends
        with its ``minutes``.
        """
        settings, left = self.settings, self.allowance - self.progress.measuring_seconds
        if math.isfinite(left):
            left = min(max(60 * (settings.minutes or 0) - self.progress.seconds, self.allowance / 4), left)
        self._evaluate(TimeLimit((1 - FIGURES_SHARE) * left, self.pace, self.clock), final=True)
        for line in self._hardly_trained():
            self.log(line)
        self._write_report(TimeLimit(FIGURES_SHARE / 2 * left, self.pace, self.clock).calls_left)
        self.run.finish()

    def _write_report(self, max_calls: float) -> None:
        """Write the page of the finished run, whose pictures take at most ``max_calls`` network calls."""
        calls = REPORT_FRACTION * FORWARD_PASSES * self.progress.step * self.settings.batch
        began = self.clock()
        try:
            with self._tolerate_write_errors(), torch.no_grad():
                content = collect(self.run, self.ema_model, self.data, self.split, min(calls, max_calls))
                # `finish` marks the run as finished only after this page is written
                write_page(self.run.folder / REPORT, replace(content, record={**content.record, "finished": True}))
        except (ConfigError, DataError, NonFiniteError) as error:
            self.log(f"no report: {error.cause}")
        except torch.OutOfMemoryError:
            self.log("no report: the GPU has too little memory for its pictures")
        self.progress.seconds += self.clock() - began

    @torch.no_grad()
    def _evaluate(self, limit: TimeLimit, final: bool) -> None:
        began, limited = self.clock(), math.isfinite(limit.left)
        self.ema_model.info.update(self._training_info())
        part = limit.share(BOUND_SHARE) if limited else limit
        numbers, summary, details = self.task.evaluate(self.ema_model, self.data, self.split, final, part)
        self.task.save(self.ema_model, self.run.model)
        if numbers:
            where = {"step": self.progress.step, "seconds": round(self.progress.seconds, 2)}
            self.records = [record for record in self.records if not self._is_evaluation_of_step(record)]
            self.records.append(where | numbers)
        if not (final and limited):
            self._draw(self.progress.step, limit)
        self.write_records()
        columns = [
            f"{format_clock(self.progress.seconds):>8}  step {self.progress.step:>7,}",
            *self._measured("loss", "loss {:.4f}"),
            summary,
            *self._measured("items_per_second", "{:,.0f} items/s"),
        ]
        self.log("  ".join(columns))
        for line in details:
            self.log(f"{'':8}  {line}")
        if final:
            self._draw(None, limit)
        seconds = self.clock() - began
        self.progress.seconds += seconds
        self.progress.measuring_seconds += seconds

    def write_records(self) -> None:
        """Write all records."""
        with self._tolerate_write_errors():
            self.run.write_metrics(self.records)
        self._to_loggers(lambda logger: logger.add(self.records))

    def _to_loggers(self, send: Callable[[Logger], None]) -> None:
        """``send`` something to each logger; a logger that fails is removed, with a line in the log."""
        for logger in [*self.loggers]:
            try:
                send(logger)
            except Exception as error:  # of another package
                self.loggers.remove(logger)
                self.log(f"{type(logger.tracker).__name__} fails and gets no more records: {error}")

    def _share(self) -> float:
        """The seconds for an evaluation now: what is left for those before the end, divided by their number."""
        remaining = self.settings.previews - int(self.fraction * self.settings.previews)
        return (self.allowance / 2 - self.progress.measuring_seconds) / max(remaining, 1)

    def _show(self) -> None:
        rate = self.steps * self.settings.batch / max(self.step_seconds, 1e-9)
        loss = f"loss {self.mean_loss:.4f} · " if self.mean_loss is not None else ""
        left = self.progress.seconds * (1 / max(self.fraction, 1e-9) - 1)
        self.bar.update(self.fraction, f"step {self.progress.step:,} · {loss}{rate:,.0f} items/s", left)

    def _hardly_trained(self) -> list[str]:
        """A line for a run by the clock that has seen less than one epoch."""
        seen, items = self.progress.step * self.settings.batch, len(self.split.train)
        if self.settings.max_steps is not None or seen >= items:
            return []
        steps, of = counted(self.progress.step, "step"), counted(items, "training item")
        return [f"hardly trained: {steps} saw {seen:,} of {of}. {self.task.train_longer}"]

    @torch.no_grad()
    def _draw(self, step: int | None, limit: TimeLimit) -> None:
        try:
            with self._tolerate_write_errors():
                self.task.draw(self.ema_model, self.data, self.split, self.run.pictures, step, limit)
        except (ConfigError, DataError, NonFiniteError, ArithmeticError, ValueError) as error:
            self.log(f"no picture of the model: {getattr(error, 'cause', error)}")

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

    def _measured(self, key: str, form: str) -> list[str]:
        """The latest number of that name, formatted; empty if none was recorded since the evaluation before."""
        steps = (r["step"] for r in self.records if _is_evaluation(r) and r["step"] < self.progress.step)
        before = max(steps, default=-1)
        return [form.format(r[key]) for r in self.records if key in r and r["step"] > before][-1:]


def _is_evaluation(record: dict[str, Any]) -> bool:
    return not {"loss", "skipped"} & record.keys()


def _mean(losses: Sequence[float | Tensor]) -> float:
    """Of numbers, or of tensors, which are read in one copy."""
    tensors = [loss for loss in losses if isinstance(loss, Tensor)]
    numbers = torch.stack(tensors).tolist() if tensors else [float(loss) for loss in losses]
    return sum(numbers) / len(numbers)
