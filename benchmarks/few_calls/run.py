"""Few calls against their teacher: ``python benchmarks/few_calls/run.py OUT --data fashion-mnist``.

Trains a teacher for so many steps, distills it for ``--share`` of the teacher's training time by each of ``--methods``,
draws ``--n`` samples by each sampler, and writes and prints a table: Fréchet and kernel distance to as many held-out
items, with 95 % intervals, their excess over the floor (real training items), and that excess over the teacher's by 50
calls of Heun's method. OUT/samples.png has a row of samples of each. "teacher, default" is its default sampler, which
adds noise. ``--chain`` adds the teacher's 1,000 steps, ``--also NAME=FILE.npy`` samples of another model. All parts
resume: the runs, the samples (in parts), and the measurement. On digits a try takes minutes:
``--data digits --teacher-steps 60 --distill-steps 15 --n 300``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from undiffuse import load_data
from undiffuse.cli import main as undiffuse
from undiffuse.evaluation.comparison import compare
from undiffuse.evaluation.metrics import METRICS as TABLE
from undiffuse.evaluation.metrics import Value
from undiffuse.model import checkpoint
from undiffuse.model.consistency import few_call_sampler
from undiffuse.model.diffusion import Diffusion
from undiffuse.report.figures import image_grid
from undiffuse.report.table import render
from undiffuse.sampling.sampler import Sampler

METRICS = ("frechet", "kernel", "precision", "recall")
PART = 250
SAMPLE_SEED = 1
TEACHER = Sampler("heun", 25)
"""50 calls of a second-order solver."""
CALLS = (1, 2, 4)
SHOWN = 16
"""Samples in a row of the picture."""


def command(*arguments: object) -> None:
    """Run ``undiffuse`` with these arguments; a finished run is left as it is."""
    code = undiffuse([str(a) for a in arguments])
    if code:
        raise SystemExit(code)


def train(out: Path, data: str, steps: int, share: float, distill_steps: int | None, methods: list[str]) -> list[Path]:
    """The run folders of the teacher and of each method, trained as far as they are not yet."""
    runs = [out / "teacher", *(out / method for method in methods)]
    command("train", data, "--steps", steps, "--out", runs[0])
    minutes = share * checkpoint.load(runs[0]).info["seconds"] / 60
    length = ("--minutes", f"{minutes:.2f}") if distill_steps is None else ("--steps", distill_steps)
    for method, run in zip(methods, runs[1:], strict=True):
        command("distill", runs[0], "--method", method, "--out", run, *length)
    return runs


def draw(folder: Path, model: Diffusion, sampler: Sampler, n: int) -> tuple[np.ndarray, float]:
    """n samples, of which parts are kept in ``folder``, and images per second of the parts that were drawn now or then.

    Item i has the same noise for every model and sampler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values, seconds = [], 0.0
    for first in range(0, n, PART):
        count = min(PART, n - first)
        path = folder / f"{first:06d}-{count}.npz"
        if not path.exists():
            began = time.perf_counter()
            drawn = model.sample(count, SAMPLE_SEED, sampler, first=first, batch=PART).numpy()
            with (partial := path.with_suffix(".partial")).open("wb") as stream:
                np.savez(stream, values=drawn, seconds=time.perf_counter() - began)
            partial.replace(path)
        with np.load(path) as part:
            values.append(part["values"])
            seconds += float(part["seconds"])
    return np.concatenate(values), n / seconds


def samplers(runs: list[Path], chain: bool) -> Iterator[tuple[str, Path, Sampler, int]]:
    """(name, run, sampler, network calls) of every row; the teacher's reference first."""
    teacher = checkpoint.load(runs[0])
    yield "teacher, heun", runs[0], TEACHER, 50
    yield "teacher, default", runs[0], teacher.default_sampler, 25
    if chain:
        yield "teacher, ancestral", runs[0], Sampler("ancestral", teacher.chain_length), teacher.chain_length
    yield "teacher, ddim", runs[0], Sampler("ddim", 2), 2
    for run in runs[1:]:
        solver = checkpoint.load(run).config.few_call_solver
        for calls in CALLS:
            yield run.name, run, few_call_sampler(teacher.schedule, calls, solver), calls


def excess(value: Value, floor: Value) -> Value:
    """value − floor, with the error of both as if they were independent."""
    return Value(value.value - floor.value, math.hypot(value.stderr, floor.stderr))


def ratio(one: Value, other: Value) -> Value:
    """one/other with the error to first order, which is an interval only where ``other`` is far from 0."""
    share = one.value / other.value
    return Value(share, abs(share) * math.hypot(one.stderr / one.value, other.stderr / other.value))


def measure(samples: np.ndarray, dataset: Any, n: int, features: str | None) -> dict[str, Any]:
    """Each metric and floor as [value, standard error], the excess of the distances, and what they were made with."""
    result = compare(samples, dataset, metrics=METRICS, extractor=features, items=n)
    row: dict[str, Any] = {"n": result.n, "features": result.extractor}
    for name in METRICS:
        row[name], row[f"{name} floor"] = list(result.values[name]), list(result.floors[name])
    for name in METRICS[:2]:
        row[f"{name} excess"] = list(excess(result.values[name], result.floors[name]))
    return row


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows for people, each distance with its interval and its excess over that of the first row."""
    shown = []
    for row in rows:
        line: dict[str, Any] = {"sampler": row["sampler"], "calls": row["calls"]}
        for name in METRICS:
            low, high = TABLE[name].interval(Value(*row[name]))
            line[name] = f"{row[name][0]:.4g} [{low:.4g}, {high:.4g}]"
        for name in METRICS[:2]:
            share = ratio(Value(*row[f"{name} excess"]), Value(*rows[0][f"{name} excess"]))
            line[f"{name} excess / teacher's"] = "1" if row is rows[0] else f"{share.value:.2f} ± {share.stderr:.2f}"
        line["images/s"] = row["images per second"]
        shown.append(line)
    return shown


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--teacher-steps", type=int, default=8000)
    parser.add_argument(
        "--share", type=float, default=0.25, help="of the teacher's training time for each distillation"
    )
    parser.add_argument("--distill-steps", type=int, help="in place of the share, for a try")
    parser.add_argument("--methods", default="consistency,lagrangian,meanflow")
    parser.add_argument("--n", type=int, default=5000)
    parser.add_argument("--features", help="an extractor of undiffuse compare; by default its own choice")
    parser.add_argument("--chain", action="store_true", help="also 1,000 steps of the teacher")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FILE.npy")
    given = parser.parse_args(arguments)
    methods = given.methods.split(",")
    runs = train(given.out, given.data, given.teacher_steps, given.share, given.distill_steps, methods)
    dataset = load_data(given.data)
    rows, shown = [], []
    for name, run, sampler, calls in samplers(runs, given.chain):
        model = checkpoint.load(run)
        folder = given.out / "samples" / f"{name.replace(', ', '-')}-{calls}-{checkpoint.fingerprint(model)[:8]}"
        values, rate = draw(folder, model, sampler, given.n)
        rows.append({"sampler": name, "calls": calls, "images per second": round(rate, 1)})
        rows[-1] |= measure(values, dataset, given.n, given.features)
        shown.append(values[:SHOWN])
    for other in given.also:
        name, _, path = other.partition("=")
        rows.append({"sampler": name, "calls": 1, "images per second": ""})
        values = np.load(path)[: given.n]
        rows[-1] |= measure(values, dataset, given.n, given.features)
        shown.append(values[:SHOWN])
    image_grid(np.concatenate(shown), dataset.num_values, SHOWN, 2).save(given.out / "samples.png")
    seconds = {run.name: checkpoint.load(run).info["seconds"] for run in runs}
    (given.out / "few-calls.json").write_text(json.dumps({"seconds": seconds, "rows": rows}, indent=1) + "\n")
    floor = ", ".join(f"{name} {rows[0][f'{name} floor'][0]:.4g}" for name in METRICS)
    render(table(rows), f"{given.data}: n = {rows[0]['n']:,}, features {rows[0]['features']}; floor {floor}")
    print("training:", ", ".join(f"{name} {s / 60:.1f} min" for name, s in seconds.items()))
    return rows


if __name__ == "__main__":
    main()
