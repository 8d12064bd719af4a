"""Looking at a run as it goes: a bar, measurements on fixed noise, pictures. It changes nothing that is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from undiffuse.checkpoint import save
from undiffuse.conditioning import Condition
from undiffuse.config import TrainConfig
from undiffuse.data import Dataset, Split
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError, NonFiniteError, ResourceError
from undiffuse.report import pictures
from undiffuse.train import state
from undiffuse.train.alarm import gap, pairs
from undiffuse.train.run import Run

HELD_OUT_ITEMS, HELD_OUT_DRAWS = 64, 8
SHOWN, SHOWN_STEPS = 36, 12
LAST_DRAWS, LAST_SHOWN, LAST_STEPS = 32, 64, 100


@dataclass
class Watch:
    """``smooth`` is the model with the averaged weights, the only one that is looked at."""

    run: Run
    smooth: Diffusion
    data: Dataset
    split: Split
    settings: TrainConfig
    progress: state.Progress
    quiet: bool = False
    first: bool = True
    records: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records = self.run.read_metrics(self.progress.step)
        self.console = Console(quiet=self.quiet, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"))
        self.bar = Progress(*columns, console=self.console, transient=True, refresh_per_second=2)
        self.losses: list[float] = []
        self.waited = 0.0
        self.since = time.perf_counter()
        self.before = self.share = self._share()
        self.held_out, self.trained_on = pairs(self.split, HELD_OUT_ITEMS)

    def __enter__(self) -> Watch:
        if self.console.is_terminal:
            self.bar.start()
        began = "training goes on" if self.progress.step else "training"
        parameters = sum(p.numel() for p in self.smooth.network.parameters())
        shape = "×".join(map(str, self.data.item_shape))
        self.say(
            f"{began} on {len(self.split.train):,} items of {self.data.name}, {shape}: "
            f"{parameters / 1e6:.2f} M parameters, {self.settings.precision}, batch {self.settings.batch}"
        )
        self.task = self.bar.add_task("training", total=1.0, status="")
        if self.first and self.progress.step:
            self.write_records()  # those of steps that are lost go
        return self

    def __exit__(self, *failure: object) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self.console.print(line, soft_wrap=True, markup=False)

    def step(self, loss: float | None, norm: float, lr: float, waited: float) -> None:
        """Takes note of a step, with no loss where it was left out; writes a record each fifty, and one at the end.

        ``waited``: seconds that this process's steps have waited for data so far.
        """
        self.before, self.share = self.share, self._share()
        if loss is None:
            self.records.append({"step": self.progress.step, "left_out": 1})
            return
        self.losses.append(loss)
        if len(self.losses) < 50 and self.progress.step != self.progress.last_step:
            return
        now = time.perf_counter()
        images = len(self.losses) * self.settings.batch / (now - self.since)
        mean = sum(self.losses) / len(self.losses)
        left = self.progress.seconds * (1 / max(self.share, 1e-9) - 1)
        self.records.append(
            {
                "step": self.progress.step,
                "seconds": round(self.progress.seconds, 2),
                "loss": mean,
                "gradient_norm": norm,
                "lr": lr,
                "items_per_second": round(images, 1),
                "data_share": round((waited - self.waited) / (now - self.since), 4),
            }
        )
        status = f"step {self.progress.step:,} · loss {mean:.4f} · {images:,.0f} items/s · {_clock(left)} left"
        self.bar.update(self.task, completed=self.share, status=status)
        self.losses, self.since, self.waited = [], now, waited
        if self.first:
            with self._spared():
                self.run.append_metrics(self.records[-1])

    def _share(self) -> float:
        """How much of the run is done, in [0, 1]."""
        if self.progress.last_step:
            by_steps = self.progress.step / self.progress.last_step
            return by_steps if self.settings.minutes is None else min(1.0, max(by_steps, self._by_clock()))
        return self._by_clock()

    def _by_clock(self) -> float:
        return min(1.0, self.progress.seconds / (60 * self.settings.minutes)) if self.settings.minutes else 0.0

    def passed(self, times: int) -> bool:
        """Whether the last step went past one of so many equal parts of the run."""
        return int(self.share * times) > int(self.before * times)

    def due(self) -> bool:
        """Whether it is time to look: ``previews`` times a run, the last at its end, which `finish` does."""
        return self.passed(self.settings.previews) and self.share < 1

    def look(self, last: bool = False) -> None:
        """The held-out bound on fixed noise, a grid of samples, and the model so far.

        Every look has the same noise, so that they make a curve; the ``last`` says also, apart, what more draws find.
        """
        self.smooth.info.update(self._trained())
        save(self.smooth, self.run.model)
        found = self._measure(last)
        if found:
            now = {"step": self.progress.step, "seconds": round(self.progress.seconds, 2)}
            self.records.append({**now, **found})
        self._draw(f"samples-{self.progress.step:08d}.png")
        self.write_records()
        known = [
            f"{_clock(self.progress.seconds):>8}  step {self.progress.step:>7,}",
            *self._last("loss", "loss {:.4f}"),
            f"held out {_bound(found) if found else 'nothing'}",
            *self._last("items_per_second", "{:,.0f} items/s"),
        ]
        self.say("  ".join(known))
        if "final_bits_per_dim" in found:
            self.say(f"{'':8}  at the end, of {LAST_DRAWS} draws and not {HELD_OUT_DRAWS}: {_bound(found, 'final_')}")
        if found.get("overfit"):
            self.say(
                f"{'':8}  it begins to remember its training items: they take {found['gap']:.3f} ± "
                f"{found['gap_stderr']:.3f} bits/dim less than held-out ones, on the same noise and times"
            )
        self.since = time.perf_counter()

    def finish(self) -> None:
        """The last look, the pictures of the finished model, and the mark that it is one."""
        self.look(True)
        self._draw("samples.png", LAST_SHOWN, LAST_STEPS)
        try:
            with self._spared():
                pictures.training_curve(self.records).savefig(self.run.pictures / "training.png", dpi=150)
        except ConfigError:
            self.say("no training curve: matplotlib is not installed (pip install 'undiffuse[report]')")
        self.run.finish()

    def write_records(self) -> None:
        """The records so far."""
        with self._spared():
            self.run.write_metrics(self.records)

    @contextmanager
    def _spared(self) -> Iterator[None]:
        """For what a run can do without: what cannot be written is said, and training goes on."""
        try:
            yield
        except (OSError, ResourceError) as error:
            self.say(f"not written: {error}")

    def _measure(self, last: bool) -> dict[str, float]:
        """The held-out bound ± its standard error, and how far it is from the training items' on the same noise.

        Nothing where nothing is held out, and no error of a single item.
        """
        if len(self.held_out) == 0:
            return {}
        parts = (self.held_out, self.trained_on)
        (bits, stderr), (trained_on, _) = (self._bound_of(items, HELD_OUT_DRAWS) for items in parts)
        apart = gap(bits, trained_on, self.settings.previews + 1)
        said = {"bits_per_dim": float(bits.mean()), "stderr": stderr}
        said |= {"gap": apart.mean, "gap_stderr": apart.stderr, "overfit": apart.significant}
        if last:
            bits, stderr = self._bound_of(self.held_out, LAST_DRAWS)
            said |= {"final_bits_per_dim": float(bits.mean()), "final_stderr": stderr}
        return {key: x for key, x in said.items() if not (key.endswith("stderr") and math.isnan(x))}

    def _bound_of(self, items: np.ndarray, draws: int) -> tuple[Tensor, float]:
        values = torch.from_numpy(self.data.values[items])
        result = self.smooth.nll(values, seed=0, draws=draws, batch=HELD_OUT_ITEMS, cond=self._told(items))
        return result.bits_per_dim(self.smooth.dims), float(result.stderr) / (self.smooth.dims * math.log(2))

    def _draw(self, name: str, n: int = SHOWN, steps: int = SHOWN_STEPS) -> None:
        try:
            samples = self.smooth.sample(n, seed=0, steps=steps, cond=self._shown(n))
            picture = pictures.grid(samples.numpy(), self.data.levels, names=self.data.columns)
            with self._spared():
                picture.save(self.run.pictures / name)
        except (ConfigError, NonFiniteError) as error:
            self.say(f"no picture of the samples: {error.cause}")

    def _told(self, items: np.ndarray) -> Condition | None:
        return self.data.condition(items) if self.settings.conditional else None

    def _shown(self, n: int) -> Condition | None:
        """For the pictures: each label in turn, or where more is known of items what is known of those held out."""
        if self.settings.conditional and self.data.cond is None:
            return Condition(label=torch.arange(n) % len(self.data.classes))
        return self._told(np.resize(self.split.validation if len(self.split.validation) else self.split.train, n))

    def _trained(self) -> dict[str, object]:
        return {
            "steps": self.progress.step,
            "seconds": round(self.progress.seconds, 1),
            "seed": self.settings.seed,
            "batch": self.settings.batch,
            "precision": self.settings.precision,
            "torch": torch.__version__,
        }

    def _last(self, key: str, form: str) -> list[str]:
        """The last number of that name, as it is said; none where none is known yet."""
        return [form.format(r[key]) for r in self.records if key in r][-1:]


def _bound(found: dict[str, float], part: str = "") -> str:
    error = f" ± {found[part + 'stderr']:.3f}" if part + "stderr" in found else ""
    return f"≤ {found[part + 'bits_per_dim']:.3f}{error} bits/dim"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
