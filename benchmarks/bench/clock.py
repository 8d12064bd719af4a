"""The same minutes for every package on Fashion-MNIST: distances of samples, and likelihoods of the networks.

Jobs (package, minutes, seed) run one after the other, the packages in alternation and in another order with each seed.
A job has four stages: train and sample, each in a process of the package's own, then `compare` and the likelihood by
ours. Each stage leaves a JSON file in the job's folder, written last and atomically: a stopped command goes on with the
first stage that has none.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bench import record
from bench.clock_packages import HELD_OUT, PACKAGES, SETTINGS, TRIED, Job, data_options, undiffuse
from bench.record import Result, Table
from undiffuse.runtime.atomic_file import write_atomic

EXTRACTOR = "pca"
METRICS = ("frechet", "kernel", "precision", "recall")
LIKELIHOOD = {"items": 128, "mc-samples": 16}
"""Test images and points in time of each, for the bound of the chain and the one in continuous time."""
ESTIMATES = ("discrete", "continuous")
LIBGOMP_SPINCOUNT = "300000"
"""What it is where neither GOMP_SPINCOUNT nor OMP_WAIT_POLICY is set."""
Stage = Callable[[Job, int], Mapping[str, Any]]


def installed_packages() -> list[str]:
    """Those of `PACKAGES` that this Python has."""
    return [name for name, package in PACKAGES.items() if find_spec(package.module) is not None]


def jobs(options: argparse.Namespace, installed: Collection[str] = tuple(PACKAGES)) -> list[Job]:
    """All jobs in their order. Raises `SystemExit` for a package or a setting that does not exist, or is missing."""
    names = options.packages or list(PACKAGES)
    for name in names:
        if name not in PACKAGES:
            raise SystemExit(f"No such package: {name}. Use {', '.join(PACKAGES)}")
        if name not in installed:
            raise SystemExit(
                f"{name} is not installed. Run: scripts/venv report,data,peers; or leave it out by --packages"
            )
    settings, data = overridden(options.set), str(options.data.resolve()) if options.data else ""
    found = []
    for number, seed in enumerate(options.seeds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for minutes in options.minutes:
            found += [Job(name, minutes, seed, settings[name], data, str(options.out.resolve())) for name in order]
    return found


def overridden(changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`SETTINGS` with ``changes`` such as ``diffusers.lr=1e-3``; the value is JSON, or else text."""
    settings = {name: dict(values) for name, values in SETTINGS.items()}
    for change in changes:
        key, found, text = change.partition("=")
        name, _, setting = key.partition(".")
        if not found or setting not in settings.get(name, {}):
            known = ", ".join(f"{name}.{key}" for name, values in SETTINGS.items() for key in values)
            raise SystemExit(f"No such setting: {change}. Use {known}")
        try:
            settings[name][setting] = json.loads(text)
        except json.JSONDecodeError:
            settings[name][setting] = text
    return settings


def read_stage(path: Path) -> dict[str, Any] | None:
    """The content of a finished stage, None if there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def stage_files(job: Job, n: int) -> dict[str, str]:
    """The file of each stage, in their order."""
    return {
        "train": "train.json",
        "sample": f"sample-{job.drawn(n)}.json",
        "compare": f"compare-{job.drawn(n)}.json",
        "likelihood": "likelihood.json",
    }


def run_job(
    job: Job, n: int, stages: Mapping[str, Stage], say: Callable[[str], None], where: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The content of all stages of ``job``; those that are done are not repeated. ``where`` is kept with a training."""
    job.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, file in stage_files(job, n).items():
        path = job.folder / file
        found = read_stage(path)
        if found is None:
            say(f"{job.folder.name}: {name}")
            content = {**stages[name](job, n), **({"where": where} if where and name == "train" else {})}
            write_atomic(path, json.dumps(content, indent=1).encode())
            found = read_stage(path)
        results[name] = found
    return results


def in_own_process(stage: str, threads: int | None) -> Stage:
    """A stage of `clock_packages` in a process of its own. Raises `SystemExit` where it fails."""

    def work(job: Job, n: int) -> Mapping[str, Any]:
        place = job.folder / "job.json"
        write_atomic(place, json.dumps(asdict(job)).encode())
        program = Path(__file__).with_name("clock_packages.py")
        command = [sys.executable, str(program), stage, str(place), *([str(n)] if stage == "sample" else [])]
        done = subprocess.run(command, env=environment_of(job.package, threads), stdout=subprocess.DEVNULL)
        content = read_stage(job.folder / stage_files(job, n)[stage])
        if done.returncode or content is None:
            cause = f"{job.folder}: {stage} ended with {done.returncode}"
            raise SystemExit(f"{cause}. What is done is kept: run the same command again.")
        return content

    return work


def environment_of(package: str, threads: int | None) -> dict[str, str]:
    """The environment of a process of ``package``: libgomp's own spin for others, as `import undiffuse` changes it."""
    waiting = {} if package == "undiffuse" else {"GOMP_SPINCOUNT": LIBGOMP_SPINCOUNT}
    return {**os.environ, **waiting, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}


def compare_stage(job: Job, n: int) -> Mapping[str, Any]:
    """Metrics of the samples by `undiffuse.evaluation.comparison`, each [value, standard error, low, high]."""
    from undiffuse import load_data
    from undiffuse.evaluation.comparison import compare

    data = load_data("fashion-mnist", **({"folder": job.data} if job.data else {}))
    samples = np.load(job.folder / f"samples-{job.drawn(n)}.npy")
    return compare(samples, data, metrics=METRICS, extractor=EXTRACTOR, items=n, held_out=HELD_OUT).summary()


def likelihood_stage(job: Job, n: int) -> Mapping[str, Any]:
    """Bits per dimension of test images [mean, standard error] by estimate, of the network imported by ours."""
    package, model = PACKAGES[job.package], job.folder / "run"
    if package.model is not None:
        name, options = package.model
        model = job.folder / "imported"
        undiffuse("import", job.folder / name, model, *options)
    numbers = [part for name, value in LIKELIHOOD.items() for part in (f"--{name}", value)]
    estimates = [part for name in ESTIMATES for part in ("--estimate", name)]
    undiffuse("evaluate", model, "fashion-mnist", *data_options(job), "--part", "test", *numbers, *estimates)
    content = json.loads((model / "evaluation.json").read_bytes())["estimates"]
    return {name: content[name]["bits_per_dim"]["total"] for name in ESTIMATES}


def summarize(values: Sequence[float], digits: int) -> str:
    """The median with the least and the greatest value of the seeds; one value as it is."""
    middle = f"{statistics.median(values):,.{digits}f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):,.{digits}f}, {max(values):,.{digits}f}]"


def _bound(values: Sequence[Sequence[float]]) -> str:
    """Bounds [mean, standard error] of the seeds, with the median of the standard errors."""
    stderr = statistics.median(stderr for _, stderr in values)
    return f"≤ {summarize([mean for mean, _ in values], 3)}, ± {stderr:.2f} each"


def rows(found: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[dict[str, str]]:
    """A row for each package and length of training; numbers are medians over seeds with their range."""
    lines = []
    for minutes in dict.fromkeys(job.minutes for job, _ in found):
        for name in PACKAGES:
            some = [(job, stages) for job, stages in found if (job.package, job.minutes) == (name, minutes)]
            if not some:
                continue
            metrics = {m: [stages["compare"]["metrics"][m]["value"][0] for _, stages in some] for m in METRICS}
            floor = [stages["compare"]["metrics"]["frechet"]["floor"][0] for _, stages in some]
            stderr = statistics.median(stages["compare"]["metrics"]["frechet"]["value"][1] for _, stages in some)
            images = [stages["train"]["images"] / stages["train"]["seconds"] for _, stages in some]
            lines.append(
                {
                    "package": name,
                    "minutes": f"{minutes:g}",
                    "images/s": summarize(images, 0),
                    "sampler": "{sampler}, {calls} calls".format(**some[0][0].settings),
                    "seconds for samples": summarize([stages["sample"]["seconds"] for _, stages in some], 0),
                    "Fréchet": f"{summarize(metrics['frechet'], 1)}, ± {stderr:.1f} each",
                    "its floor": summarize(floor, 1),
                    "kernel": summarize(metrics["kernel"], 3),
                    "precision": summarize(metrics["precision"], 2),
                    "recall": summarize(metrics["recall"], 2),
                    **{
                        f"bits/dim, {estimate}": _bound([s["likelihood"][estimate] for _, s in some])
                        for estimate in ESTIMATES
                    },
                }
            )
    return lines


def excess(found: Sequence[tuple[Job, Mapping[str, Any]]]) -> list[str]:
    """Our Fréchet distance above the floor as a fraction of the best other package's, by minutes and seed."""
    lines = []
    for minutes in dict.fromkeys(job.minutes for job, _ in found):
        fractions = []
        for seed in dict.fromkeys(job.seed for job, _ in found):
            above = {}
            for job, stages in found:
                if (job.minutes, job.seed) == (minutes, seed):
                    metric = stages["compare"]["metrics"]["frechet"]
                    above[job.package] = metric["value"][0] - metric["floor"][0]
            others = [value for name, value in above.items() if name != "undiffuse"]
            if "undiffuse" in above and others:
                fractions.append(above["undiffuse"] / min(others))
        if fractions:
            text = f"After {minutes:g} minutes our Fréchet distance above the floor is {summarize(fractions, 2)} of the"
            lines.append(f"{text} best other package's (median and range over {len(fractions)} seeds).")
    return lines


def curves(found: Sequence[tuple[Job, Mapping[str, Any]]]) -> bytes:
    """A PNG of Fréchet distance and bits per dimension over the minutes: a dot a seed, a line through the medians."""
    from undiffuse.report.axes import COLOURS, new_figure, style_axes

    figure = new_figure(9, 3.6)
    panels: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "Fréchet distance": lambda stages: stages["compare"]["metrics"]["frechet"]["value"][0],
        "bits per dimension, at most": lambda stages: stages["likelihood"]["continuous"][0],
    }
    for number, (title, number_of) in enumerate(panels.items()):
        axes = style_axes(figure.add_subplot(1, 2, number + 1), "minutes of training", title)
        for colour, name in zip(COLOURS, PACKAGES, strict=False):
            points = [(job.minutes, number_of(stages)) for job, stages in found if job.package == name]
            if not points:
                continue
            x = sorted({minutes for minutes, _ in points})
            middle = [statistics.median(y for minutes, y in points if minutes == at) for at in x]
            axes.plot(x, middle, color=colour, label=name)
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=4)
        if number == 0:
            floors = [stages["compare"]["metrics"]["frechet"]["floor"][0] for _, stages in found]
            axes.axhline(statistics.median(floors), color="0.5", linestyle="--", label="floor")
            axes.set_yscale("log")
            axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def grid(samples: np.ndarray, columns: int = 8) -> bytes:
    """A PNG of the first samples (N, 1, H, W), three rows."""
    from PIL import Image

    some = samples[: 3 * columns, 0]
    some = some[: len(some) // columns * columns]
    image = np.concatenate([np.concatenate(list(row), 1) for row in some.reshape(-1, columns, *some.shape[1:])])
    buffer = io.BytesIO()
    Image.fromarray(image).resize((image.shape[1] * 2, image.shape[0] * 2), Image.Resampling.NEAREST).save(
        buffer, "png"
    )
    return buffer.getvalue()


def run(options: argparse.Namespace) -> Result:
    stages: dict[str, Stage] = {
        "train": in_own_process("train", options.threads),
        "sample": in_own_process("sample", options.threads),
        "compare": compare_stage,
        "likelihood": likelihood_stage,
    }
    todo, n = jobs(options, installed_packages()), options.n
    machine = record.machine() | {"threads": str(options.threads or "as torch chooses")}
    here = {"commit": record.commit(), "machine": machine}

    def say(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    found = [(job, run_job(job, n, stages, say, here)) for job in todo]
    longest = max(options.minutes)
    files = {"curves.png": curves(found)} if len({job.minutes for job, _ in found}) > 1 else {}
    for job, _ in found:
        if job.minutes == longest and job.seed == options.seeds[0]:
            samples = np.load(job.folder / f"samples-{job.drawn(n)}.npy")
            if len(samples) >= 8:
                files[f"samples-{job.package}.png"] = grid(samples)
    title = (
        f"Fashion-MNIST, {n:,} samples and as many held-out images, features {EXTRACTOR} (64 principal components, not "
        f"Inception), medians with the range over seeds; bits per dimension of {LIKELIHOOD['items']} test images"
    )
    settings = overridden(options.set)
    used = dict.fromkeys(job.package for job in todo)
    notes = [*excess(found), *(f"{name}: {json.dumps(settings[name])}" for name in used), *TRIED]
    raw = {"jobs": [{"folder": job.folder.name, **asdict(job), **stages} for job, stages in found]}
    trained = [stages["train"].get("where", here) for _, stages in found]
    commits = dict.fromkeys(where["commit"] for where in trained)
    where = {"commit": " and ".join(commits), "machine": trained[0]["machine"]}
    tables = [Table(title, rows(found))]
    return Result("The same minutes on Fashion-MNIST", tables, raw, options.seeds, notes, files, where)
