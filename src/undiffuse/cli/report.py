"""``undiffuse report``: one page of HTML about a run, with what is measured and what is not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.data_options import (
    OwnDataArgument,
    ReadData,
    given_options,
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
from undiffuse.cli.results import add, with_json
from undiffuse.errors import ConfigError, DataError, UndiffuseError

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.model.diffusion import Diffusion
    from undiffuse.training.run_folder import Run

MINUTES = 5.0
SHARES = {"pictures": 0.15, "evaluation": 0.5, "samples": 0.25}
"""Fractions of the time for pictures, likelihood and samples; the time of the comparison is not limited."""
SAMPLE_COUNTS = (1000, 500, 200, 100, 50, 20)
"""Numbers of samples that are compared with the data: the largest that fits."""


@with_json
@with_data_options
def report(
    run: RunArgument,
    data: OwnDataArgument = None,
    minutes: Annotated[
        float,
        typer.Option(help="Approximate minutes for the missing measurements; 0 measures and draws nothing."),
    ] = MINUTES,
    out: Annotated[
        Path | None, typer.Option(help="The file, new or a report; by default report.html in the run folder.")
    ] = None,
    network: NetworkFile = None,
    device: Device = "auto",
    *,
    read: ReadData,
) -> None:
    """Write a page about RUN: samples, curves, measurements.

    It has the likelihood, distances from the data, copies and settings. It runs 'evaluate', 'sample' and 'compare' if
    their results are missing in the run. A model file must be the model.safetensors of its folder.
    """
    from undiffuse.model.diffusion import Diffusion
    from undiffuse.training import run_report
    from undiffuse.training.run_drawings import sampling_speed
    from undiffuse.training.run_folder import Run

    folder = run_folder(run)
    page = out or folder / run_report.NAME
    refuse_inside(out, data, run)
    if not 0 <= minutes < math.inf:
        raise ConfigError("MINUTES", f"--minutes {minutes:g}", "not a duration", "Give 0 or a number above it")
    run_report.check_page(page)
    register_network(network)
    own, of = network_option(network), Run(folder)
    model = _model(run, of, resolve_device(device))
    if run.is_file() and run.name != of.model.name:  # results and commands are those of the folder's model
        cause = f"a report is of a folder, and this is not its {of.model.name}"
        fix = f"Copy it to {of.model.name} in a new folder, and give that folder and DATA with its options"
        raise ConfigError("RUN", run, cause, fix)
    dataset, notes = _data(read, data, run, of, model)
    split = None if dataset is None else dataset.split(dataset.held_out_fraction(_held_out(of, model))[0])
    measuring = _Measuring(of, run, data, read, {"network": network, "device": device})
    minutes_per_call = 0.0
    if minutes and isinstance(model, Diffusion):
        rate = sampling_speed(model, dataset, split)
        minutes_per_call = 1 / (60 * SHARES["pictures"] * rate) if rate else 0.0
        measuring.measure(model, dataset, minutes, rate)
    calls = minutes / minutes_per_call if minutes_per_call else 0.0
    reasons = measuring.why, notes, measuring.words, minutes_per_call
    content = run_report.collect(of, model, dataset, split, calls, own, *reasons)
    run_report.write_page(page, content)
    for drawing in content.drawings.values():
        if minutes and drawing.reason and drawing.command:
            console.print(f"{drawing.caption}: {drawing.reason}; {drawing.command} adds it")
    measured = {"evaluation": content.evaluation, "comparison": content.comparison}
    add(report=page, **measured, reasons=content.why)
    console.print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB)")


def _model(path: Path, run: Run, device: str) -> Any:
    """The model; None for a run that has none yet. Raises `CheckpointError`."""
    from undiffuse.training.run_report import load_model

    if path.is_dir() and not run.model.is_file() and run.record is not None:
        return None
    return load_model(path, device)


def _data(read: ReadData, data: str | None, path: Path, run: Run, model: Any) -> tuple[Dataset | None, list[str]]:
    """The data of the run, and a note if they are not there. Raises `DataError` if DATA names others."""
    from undiffuse.evaluation.plan import check_data
    from undiffuse.model.diffusion import Diffusion

    try:
        dataset = read_data(read, data, path)
    except UndiffuseError as error:
        if data is not None or error.code == "USAGE":
            raise
        line = f"Without the data of the run: {error.cause}. Parts that need them are left out."
        console.print(line)
        return None, [line]
    facts = (run.record or {}).get("data") or getattr(model, "info", {})
    if facts.get("fingerprint") not in (None, dataset.fingerprint):
        cause = "these are not the data that the run was trained on"
        raise DataError("CHANGED", data or dataset.name, cause, "Name those, or leave DATA out")
    notes = []
    if isinstance(model, Diffusion):
        check_data(model, dataset)
    if not facts.get("fingerprint"):
        notes.append(f"The model does not record its training data: no item of {dataset.name} is known to be held out.")
    return dataset, notes


def _held_out(run: Run, model: Any) -> float:
    """The fraction of the data that the run held out."""
    config = (run.record or {}).get("config")
    return float(config["train"]["held_out"] if config else getattr(model, "info", {}).get("held_out", 0.1))


def _labels_in_turn(model: Diffusion, dataset: Dataset) -> bool:
    """Whether samples with each label in turn have the class frequencies of the data, within a quarter.

    Samples without a label have the class frequencies that the model learnt.
    """
    import numpy as np

    if model.trained_condition_sizes.keys() != {"classes"}:
        return False
    if dataset.labels is None:
        return True
    counts = np.bincount(dataset.labels, minlength=model.condition_sizes["classes"])
    return bool(counts.max() <= 1.25 * counts.min())


class _Measuring:
    """Runs the commands whose results the page lacks. ``why`` gets the reason where one fails."""

    def __init__(self, run: Run, path: Path, data: str | None, read: ReadData, shared: dict[str, Any]) -> None:
        from undiffuse.data.sources.registry import as_source, path_of
        from undiffuse.training.run_report import shown_path

        self.run, self.path, self.shared, self.why = run, path, shared, dict[str, str]()
        self.of_data = {"data": data, **read.keywords}
        self.words = ""
        if data is not None:
            name = data if path_of(data) is None else as_source(shown_path(Path(data)))
            self.words = f" {as_argument(name)}{given_options(read)}"

    def measure(self, model: Diffusion, dataset: Dataset | None, minutes: float, rate: float) -> None:
        """Measure within about ``minutes``; ``rate`` is in network calls a second."""
        from undiffuse.training import run_report

        if dataset is None:
            self.why |= dict.fromkeys(("evaluation", "comparison"), "it needs the data of the run")
            return
        missing, reasons = run_report.missing_parts(self.run, model)
        self.why |= reasons
        for part, reason in reasons.items():
            console.print(f"not measured: {part}, because {reason}")
        if "evaluation" in missing:
            self._evaluate(model, dataset, SHARES["evaluation"] * minutes)
        if "comparison" in missing:
            self._compare(model, dataset, minutes, rate)

    def _evaluate(self, model: Diffusion, dataset: Dataset, minutes: float) -> None:
        from undiffuse.cli.evaluate import evaluate
        from undiffuse.training.run_report import measuring_commands

        command = measuring_commands(self.run, model, dataset, of_data=self.words)["evaluation"]
        command += f" --minutes {minutes:g}"
        part = "train" if "--part train" in command else None
        self._call("evaluation", command, evaluate, run=self.path, part=part, minutes=minutes, **self.of_data)

    def _compare(self, model: Diffusion, dataset: Dataset, minutes: float, rate: float) -> None:
        from undiffuse.cli.compare import compare
        from undiffuse.cli.sample import sample
        from undiffuse.training import run_report

        labels = ["all"] if _labels_in_turn(model, dataset) else None
        folder = self.run.folder / run_report.SAMPLES
        per_minute = 60 * SHARES["samples"] * rate
        calls = minutes * per_minute
        n = run_report.number_of_samples(folder, model, [n for n in SAMPLE_COUNTS if n * _steps(model) <= calls])
        if n is None:
            reason = f"{SAMPLE_COUNTS[-1]} samples do not fit into the time"
            if per_minute:  # with half as much again, because the speed varies
                reason += f": give --minutes {math.ceil(1.5 * SAMPLE_COUNTS[-1] * _steps(model) / per_minute)}"
            self.why["comparison"] = reason
            console.print(f"not measured: distances and copies, because {reason}")
            return
        command = run_report.sample_command(self.run, n, labels)
        if self._call("comparison", command, sample, run=self.path, n=n, label=labels, out=folder):
            out = self.run.folder / run_report.COMPARISON
            command = f"undiffuse compare {as_argument(folder)}{self.words} --out {as_argument(out)}"
            samples = {"samples": str(folder), "run": self.run.folder, "out": out}
            self._call("comparison", command, compare, **samples, **self.of_data)

    def _call(self, part: str, printed: str, command: Callable[..., None], /, **arguments: Any) -> bool:
        """Whether ``command`` with these ``arguments`` of its signature succeeded; prints it as ``printed``."""
        console.print(f"$ {printed}")
        parameters = inspect.signature(command).parameters
        given = {name: value for name, value in (self.shared | arguments).items() if name in parameters}
        try:
            command(**{name: p.default for name, p in parameters.items()} | given)
        except UndiffuseError as error:
            self.why[part] = error.cause
            console.print(f"not measured: {error}")
            return False
        return True


def _steps(model: Diffusion) -> int:
    """The network calls of a sample of 'sample' without options."""
    from undiffuse.cli.sampler_options import DEFAULT_QUALITY, QUALITIES

    return model.config.calls or min(QUALITIES[DEFAULT_QUALITY].num_steps or model.chain_length, model.chain_length)
