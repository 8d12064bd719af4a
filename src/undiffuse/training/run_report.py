"""The report of a run, ``report.html``: collected from the files of its folder, from its model and from its data."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from undiffuse.data.dataset import Dataset, Split
from undiffuse.data.sources.registry import as_source
from undiffuse.errors import CheckpointError, ConfigError, counted
from undiffuse.evaluation.plan import describe_shape
from undiffuse.model import checkpoint
from undiffuse.model.autoencoder import Autoencoder
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.noisy_classifier import NoisyClassifier
from undiffuse.report import comparison_report, evaluation_report, run_report, run_sections
from undiffuse.report.html import MARK, minus
from undiffuse.report.model_facts import model_facts
from undiffuse.report.run_report import Drawing, RunContent
from undiffuse.report.sample_folder import sampler_in_words
from undiffuse.runtime.atomic_file import write_atomic
from undiffuse.runtime.side_files import read_record
from undiffuse.runtime.tensor_file import model_path, read_metadata
from undiffuse.runtime.terminal import as_argument, flags
from undiffuse.training.repeat_command import repeat
from undiffuse.training.run_drawings import (
    ModelPictures,
    data_picture,
    nearest_picture,
    sample_folder_picture,
    stored_picture,
)
from undiffuse.training.run_folder import Run, describe

NAME = "report.html"
"""The file in the folder of a run."""
SAMPLES, COMPARISON = "samples/report", "comparison"
"""Folders in that of a run: the samples that are compared with the data, and the comparison."""
KINDS = {Diffusion: "diffusion model", NoisyClassifier: "classifier", Autoencoder: "autoencoder"}


def check_page(path: Path) -> None:
    """Raise `ConfigError` if there is a file at ``path`` that is not a page of ours."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MARK) + 64)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError("OUT", path, f"cannot be written ({error.strerror})", "Give --out another file") from None
    if MARK.encode() not in start:
        raise ConfigError("OUT", path, "this file is not a report", "Give --out a new file, or move this one away")


def write_page(path: Path, content: RunContent) -> None:
    """Write the page of ``content`` to ``path``. Raises `ConfigError` for a file of the user, and `ResourceError`."""
    check_page(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, run_report.page(content).encode())


def collect(
    run: Run,
    model: Any,
    data: Dataset | None = None,
    split: Split | None = None,
    max_calls: float = math.inf,
    own: str = "",
    why: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    of_data: str = "",
    minutes_per_call: float = 0.0,
) -> RunContent:
    """All that the page of ``run`` shows. Pictures of the ``model`` take at most ``max_calls`` network calls.

    ``minutes_per_call``: minutes of ``undiffuse report --minutes`` for one call; 0 if that is not known.

    ``model`` is None where there is none yet. ``data`` and ``split`` are those that it was trained on, if they are
    there. ``own`` are words that each command about the run needs, after a space, and ``of_data`` those that name
    DATA, of commands that take it. ``why`` has reasons why a part was not measured.
    Results of `evaluate` and `compare` are those in the folder, if they are of the weights of ``model``.
    """
    content, own_data = _collect_records(run, model, data, split, why, notes)
    if data is None or not own_data.get("source"):
        of_data = of_data or " DATA"
    commands = measuring_commands(run, model, data, own, of_data, content.evaluation)
    drawings: dict[str, Drawing] = {}
    if data is not None and split is not None:
        drawings["data"] = data_picture(data, split)
    if content.kind == "autoencoder":
        names = ["reconstructions.png", *_previews(run, "reconstructions")]
        caption = "Items of the data, and what the autoencoder makes of them"
        drawings["reconstructions"] = stored_picture([run.pictures / name for name in names], caption) or Drawing(
            caption="No reconstructions are drawn yet"
        )
    if isinstance(model, Diffusion):
        if content.comparison is not None:
            commands |= _commands_of(run, content.comparison, own, of_data)
            samples = Path(str(content.comparison.get("samples", ""))) / "samples.npz"
            drawings["neighbours"] = nearest_picture(content.comparison.get("nearest") or (), samples, data)
        command = f"undiffuse report {content.run}{of_data}{own}"
        pictures = ModelPictures(model, data, split, max_calls, command, minutes_per_call)
        drawings["samples"] = _samples(run, model, checkpoint.fingerprint(model))
        drawings |= {"forward": pictures.forward(), "reverse": pictures.reverse(), "solvers": pictures.solvers()}
    elif content.kind == "diffusion model":
        drawings["samples"] = _samples(run, None, "")
    content.commands, content.drawings = commands, drawings
    return content


def collect_records(run: Run, model: Any) -> RunContent:
    """What `collect` finds in the files of ``run`` and in ``model`` alone: no drawings and no commands."""
    return _collect_records(run, model)[0]


def _collect_records(
    run: Run,
    model: Any,
    data: Dataset | None = None,
    split: Split | None = None,
    why: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> tuple[RunContent, Mapping[str, Any]]:
    """The page without drawings and commands, and the facts about the data."""
    record, reasons = run.record or {}, dict(why or {})
    info = dict(model.info) if model is not None else {}
    facts = record.get("data") or info
    known = bool(facts.get("fingerprint"))  # an imported model does not know its data
    if not known:
        facts = {"item_shape": getattr(model, "item_shape", ()), **facts} if data is None else describe(data)
    if model is None:
        kind = "classifier" if (record.get("config") or {}).get("model", {}).get("kind") == "classifier" else ""
        kind = kind or (
            "diffusion model" if "schedule" in (record.get("config") or {}).get("model", {}) else "autoencoder"
        )
    else:
        kind = next((words for cls, words in KINDS.items() if isinstance(model, cls)), "diffusion model")
    content = RunContent(
        run=as_argument(shown_path(run.folder)),
        name=str((record.get("data") or info).get("name") or run.folder.name),
        kind=kind,
        record=record,
        records=run.read_metrics(),
        info=info,
        model=_model_facts(model, record),
        data=data_facts(facts, data, split if known else None, info),
        notes=notes,
        why=reasons,
    )
    if isinstance(model, Diffusion):
        content.evaluation, content.comparison = _measured(run, model, reasons).values()
        _add_reasons(model, reasons)
    content.repeat, content.recipe = repeat(record, kind)
    return content, facts


def load_model(path: Path, device: str = "cpu") -> Any:
    """The diffusion model, classifier or autoencoder of a run or a file, on ``device``. Raises `CheckpointError`."""
    from undiffuse.model import autoencoder, noisy_classifier

    try:
        return checkpoint.load(path, device)
    except CheckpointError as error:
        if error.code != "KIND":
            raise
        kinds = read_metadata(model_path(path))
        return (autoencoder if "autoencoder" in kinds else noisy_classifier).load(path, device)


def shown_path(path: Path) -> str:
    """``path`` as it is written in commands: relative to the working directory if it lies inside of it."""
    here = Path(os.path.abspath(path))
    return os.path.relpath(here) if path.is_absolute() and here.is_relative_to(Path.cwd()) else str(path)


def measuring_commands(
    run: Run, model: Any, data: Dataset | None, own: str = "", of_data: str = "", made: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The commands that measure the model of ``run``, by the part of the page; of the evaluation ``made`` if given."""
    place = as_argument(shown_path(run.folder))
    report = f"undiffuse report {place}{of_data}{own}"
    if not isinstance(model, Diffusion):
        return {"report": report}
    nothing_held_out = model.info.get("held_out") == 0 and (data is None or data.test_from is None)
    options = evaluation_report.options_in_words(made, model) if made else " --part train" * nothing_held_out
    return {
        "evaluation": f"undiffuse evaluate {place}{of_data}{options}{own}",
        "comparison": report,
        "report": report,
    }


def missing_parts(run: Run, model: Diffusion) -> tuple[set[str], dict[str, str]]:
    """The measured parts that the page lacks and that can be measured, and reasons why others cannot."""
    why: dict[str, str] = {}
    _add_reasons(model, why)
    return {part for part, record in _measured(run, model, {}).items() if record is None and part not in why}, why


def number_of_samples(folder: Path, model: Diffusion, fitting: Sequence[int]) -> int | None:
    """The number of samples in ``folder`` if they are of ``model``, else the first that is ``fitting``; None: none."""
    manifest = _read(folder / "manifest.json") or {}
    if manifest.get("weights") == checkpoint.fingerprint(model) and "n" in manifest:
        return int(manifest["n"])
    return fitting[0] if fitting else None


def no_likelihood(model: Diffusion) -> str | None:
    """Why the model has no likelihood; None if it has."""
    if model.config.few_call_solver == "consistency":
        return "a consistency model has none, because every bound needs the mean of the data, and it predicts samples"
    if getattr(getattr(model.transform, "autoencoder", None), "is_deterministic", False):
        return "the encoder of this latent model is deterministic, so that there is no bound"
    return None


def _add_reasons(model: Diffusion, why: dict[str, str]) -> None:
    if (reason := no_likelihood(model)) is not None:
        why["evaluation"] = reason
    if "image" in model.condition_sizes:
        why["comparison"] = (
            "it enlarges images of another model, and the samples of both together are compared: "
            "undiffuse sample BASE --then RUN, then undiffuse compare"
        )


def _measured(run: Run, model: Diffusion, why: dict[str, str]) -> dict[str, dict[str, Any] | None]:
    """The evaluation and the comparison of the weights of ``model`` in ``run``; else None, and in ``why`` a reason."""
    records = {
        "evaluation": (run.folder / evaluation_report.RECORD, "digest"),
        "comparison": (run.folder / COMPARISON / comparison_report.RECORD, "weights"),
    }
    weights = checkpoint.fingerprint(model)
    return {part: _current(_read(path), key, weights, part, why) for part, (path, key) in records.items()}


def _read(path: Path) -> dict[str, Any] | None:
    """The record at ``path``; a record without its content for one that is damaged or cannot be read; None."""
    try:
        record = read_record(path)
        return {} if record is None and path.exists() else record
    except OSError:
        return {}


def _current(
    record: dict[str, Any] | None, key: str, weights: str, part: str, why: dict[str, str]
) -> dict[str, Any] | None:
    """``record`` if it is whole and of these ``weights``; otherwise None, with the reason in ``why``."""
    if record is None:
        return None
    if not record:
        why.setdefault(part, "its record in the run is damaged or was edited")
    elif record.get(key) != weights:
        why.setdefault(part, "the stored one is of other weights")
    else:
        return record
    return None


def _commands_of(run: Run, comparison: Mapping[str, Any], own: str, of_data: str) -> dict[str, str]:
    """The commands that made the ``comparison``."""
    samples, out = Path(str(comparison.get("samples", ""))), as_argument(shown_path(run.folder / COMPARISON))
    words = [as_argument(as_source(shown_path(samples))) + of_data]
    words += flags(comparison.get("options") or {}, comparison_report.DEFAULTS)
    made = {"comparison": f"undiffuse compare {' '.join(words)} --out {out}"}
    manifest = _read(samples / "manifest.json") or {}
    if samples == run.folder / SAMPLES and "n" in manifest:
        made["samples"] = sample_command(run, int(manifest["n"]), manifest.get("label"), own)
    return made


def sample_command(run: Run, n: int, labels: Sequence[str] | None, own: str = "") -> str:
    """The command that draws ``n`` samples to compare with the data."""
    place, out = (as_argument(shown_path(path)) for path in (run.folder, run.folder / SAMPLES))
    label = "".join(f" --label {shlex.quote(str(name))}" for name in labels or ())
    return f"undiffuse sample {place} --n {n}{label} --out {out}{own}"


def _previews(run: Run, word: str) -> list[str]:
    """The names of the pictures that evaluations during training drew, the last one first."""
    return sorted((path.name for path in run.pictures.glob(f"{word}-*.png")), reverse=True)


def _samples(run: Run, model: Diffusion | None, weights: str) -> Drawing:
    """Samples of ``weights`` in the run: those compared with the data, else the newest, else those of training."""
    chosen, manifests = run.folder / SAMPLES, (run.folder / SAMPLES).parent.glob("*/manifest.json")
    for path in sorted(manifests, key=lambda path: (path.parent == chosen, path.stat().st_mtime_ns), reverse=True):
        manifest = _read(path) or {}
        if model is not None and manifest.get("finished") and manifest.get("weights") == weights:
            words = f"{sampler_in_words(manifest) or 'drawn by undiffuse sample'}, from samples/{path.parent.name}"
            if (drawn := sample_folder_picture(path.with_name("samples.npz"), model, words)) is not None:
                return drawn
    names = ["samples.png", *_previews(run, "samples")]
    plot = len((run.record or {}).get("data", {}).get("item_shape", (1, 1, 1))) <= 2
    caption = "Samples that were drawn in training, from fixed noise"
    drawn = stored_picture([run.pictures / name for name in names], caption, plot)
    return drawn or Drawing(caption="No samples are drawn yet", command=f"undiffuse sample {as_argument(run.folder)}")


def _model_facts(model: Any, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The model in words, as rows of a table."""
    if isinstance(model, Diffusion):
        facts = model_facts(model)
        facts = {name: facts[name] for name in facts if name not in ("data", "notes", "items")}
        facts = {"kind": str(model.config.network.get("kind", "")), **facts, "weights": checkpoint.fingerprint(model)}
        return [(name, minus(value)) for name, value in facts.items()]
    settings = (record.get("config") or {}).get("model") or {}
    shown = [(key.replace("_", " "), run_sections.setting(value)) for key, value in settings.items()]
    if model is not None:
        shown.append(("parameters", f"{sum(p.numel() for p in model.network.parameters()):,}"))
    return [(name, value) for name, value in shown if value]


def data_facts(
    facts: Mapping[str, Any], data: Dataset | None, split: Split | None, info: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """The data in words, from what the run records and, if they are there, from the data themselves."""
    num_values, shape = facts.get("num_values"), facts.get("item_shape") or ()
    rows = {"name": str(facts.get("name", "unknown"))}
    rows["items"] = counted(int(facts["items"]), "item") if "items" in facts else "unknown"
    rows["item"] = describe_shape(shape) + (f", {num_values} values" if num_values else ", continuous values")
    if data is not None and split is not None:
        parts = (("training", split.train), ("validation", split.validation), ("test", split.test))
        rows["parts"] = ", ".join(f"{len(part):,} {name}" for name, part in parts)
        if data.num_values is None and data.values.ndim == 2:
            mean, std = data.moments(split.train)
            columns = data.columns or tuple(map(str, range(len(mean))))
            moments = [f"{name} {m:.3g} ± {s:.3g}" for name, m, s in zip(columns, mean, std, strict=True)]
            rows["mean ± standard deviation"] = run_sections.setting(moments).strip("[]")
    elif "held_out" in info:
        rows["held out"] = f"{info['held_out']:g} for testing and as much for validation"
    if classes := list(facts.get("classes") or ()):
        counts = None if data is None or data.labels is None else np.bincount(data.labels, minlength=len(classes))
        named = classes if counts is None else [f"{name} ({n:,})" for name, n in zip(classes, counts, strict=False)]
        rows["classes"] = f"{len(classes):,}: {run_sections.setting(named).strip('[]')}"
    if columns := list(facts.get("columns") or ()):
        rows["columns"] = f"{len(columns):,}: {run_sections.setting(columns).strip('[]')}"
    if encoder := facts.get("text_encoder"):
        rows["captions"] = f"by the text encoder {encoder.get('name', 'unknown')}"
    rows["fingerprint"] = str(facts.get("fingerprint", "unknown"))
    return list(rows.items())
