"""An evaluation for people: rows of a table, sentences, a figure of bits over log-SNR, and the files of results."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from undiffuse.errors import ConfigError
from undiffuse.evaluation import resumable, summary
from undiffuse.evaluation.plan import PARTS
from undiffuse.evaluation.run_evaluation import EvaluationResult
from undiffuse.likelihood.nll import NLL
from undiffuse.model.diffusion import Diffusion
from undiffuse.report.figures import bits_per_step
from undiffuse.report.run_sections import likelihood_rows
from undiffuse.report.table import cell
from undiffuse.runtime.atomic_file import write_atomic, write_csv
from undiffuse.runtime.output_folder import check_output_folder, listed_files
from undiffuse.runtime.own_output import PICTURE_MARK
from undiffuse.runtime.precision import PRECISIONS, resolve_precision
from undiffuse.runtime.side_files import free_name, read_record, set_aside, write_record
from undiffuse.runtime.terminal import flags

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = ("continuous", "ode")
"""Estimates that are compared with the bound of the chain."""
RECORD, BATCHES = "evaluation.json", "evaluation.partial"
"""In the folder of results: all numbers, with the names of the other files, and the folder of finished batches."""
MEASURED = ("digest", "fingerprint", "part", "condition")
"""The facts that define the weights, items and conditions of an evaluation."""
DEFAULTS = {"estimate": [], "unconditional": False, "exact": False, "iw_samples": 1, "minutes": 5.0}
"""The options of `evaluate` that are not None by default."""
FILES = {RECORD, "evaluation-items.csv", "bits-per-step.png", "evaluation-skipped.json"}


def evaluation_rows(evaluation: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """A table row for each estimate of an evaluation as plain data, with the time that it took, and the title."""
    rows, title = likelihood_rows(evaluation)
    seconds = (numbers["seconds"] for numbers in evaluation["estimates"].values())
    return [{**row, "time": f"{took:,.0f} s"} for row, took in zip(rows, seconds, strict=True)], title


def options_in_words(evaluation: Mapping[str, Any], model: Diffusion) -> str:
    """The options of an ``evaluation`` of ``model``, where they are not the defaults (part of other data: all)."""
    described, seed = str(evaluation["part"]), evaluation.get("seed", 0)
    part = next((part for part, words in PARTS.items() if words == described), described.split()[0].strip(","))
    words = ["--part", part] * (part != "test" or "of other data" in described) + ["--seed", str(seed)] * bool(seed)
    words += flags(evaluation.get("options") or {}, DEFAULTS)
    precision, default = evaluation.get("precision"), resolve_precision("auto", model.device, len(model.x_shape) - 1)
    words += ["--precision", str(precision)] * (precision in PRECISIONS and precision != default)
    return "".join(f" {word}" for word in words)


def describe_differences(differences: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """`summary.differences` as sentences."""
    compared = {summary.NAMES[name]: parts["total"] for name, parts in differences.items() if name in COMPARED}
    texts = [f"{name} {cell(tuple(total))}" for name, total in compared.items()]
    lines = [f"difference to the bound of the chain, paired by item: {', '.join(texts)}"] if texts else []
    if "openai" in differences:
        total, decoder = (cell(tuple(differences["openai"][part])) for part in ("total", "decoder"))
        lines.append(
            f"improved-diffusion's script is off by {total} bits/dim over the same steps and noise, of which {decoder} "
            "is in the decoder: it takes the mass of a value's bin also where the chain stays finite, approximates the "
            "normal distribution function by tanh, clamps it at 1e-12, computes in float32, and clips x̂ to [−1, 1]"
        )
    return lines


def bits_figure(model: Diffusion, nll: Mapping[str, NLL]) -> Figure:
    """A figure of the bits that each interval of log-SNR adds to the bounds among ``nll``.

    Raises `ConfigError` for a chain without an interval, and without matplotlib.
    """
    curves, totals = {}, []
    for name, curve in summary.bits_by_log_snr(model, nll).items():
        bits = {part: summary.mean_bits(model, nats)[0] for part, nats in summary.parts(nll[name]).items()}
        total, prior = bits.pop("total"), bits.pop("prior")
        terms = [f"prior {prior:.2g}", *(f"{part} {number:.3f}" for part, number in bits.items())]
        label = f"{'chain' if name == 'discrete' else name}: {total:.3f} = {' + '.join(terms)}"
        curves[label] = curve
        totals.append(total)
    if not curves:
        raise ConfigError(
            "FIGURE", "the chain", "it has no step between two finite noise levels", "Give a longer chain"
        )
    return bits_per_step(curves, f"at most {totals[0]:.3f} bits per dimension")


def check_folder(folder: Path, own: bool) -> None:
    """Raise `ConfigError` if `write_evaluation` would mix its files with those of the user in ``folder``.

    The files of an earlier evaluation, which its evaluation.json lists, and what an interrupted one left are ours.
    ``own``: the folder is that of the model, where only files of our names are in the way.
    """
    record, begun = folder / RECORD, folder / BATCHES / resumable.PLAN
    ours = listed_files(read_record(record))
    if ours is None and read_record(begun) is not None:
        ours = FILES
    elif ours is None and (own or (folder / "run.json").is_file()):
        ours = set()
    check_output_folder(folder, record, ours, FILES, left=[BATCHES])


def _covers(summary: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether ``summary`` has the facts of ``before``, and each of its estimates with 0.9 of its items or more."""
    now = {name: numbers["items"] for name, numbers in summary["estimates"].items()}
    enough = all(now.get(name, 0) >= 0.9 * numbers["items"] for name, numbers in before.get("estimates", {}).items())
    return enough and all(before.get(fact) == summary[fact] for fact in MEASURED)


def save_bits_figure(model: Diffusion, nll: Mapping[str, NLL], path: Path) -> None:
    """Save `bits_figure` as a PNG file with `PICTURE_MARK`, durably."""
    bits_figure(model, nll).savefig(picture := io.BytesIO(), dpi=150, metadata={"Software": PICTURE_MARK})
    write_atomic(path, picture.getvalue())


def write_evaluation(
    result: EvaluationResult, folder: Path, skipped: Callable[[Path], None] | None = None
) -> list[str]:
    """Write evaluation.json, evaluation-items.csv and, with matplotlib, bits-per-step.png; lines that name them.

    evaluation.json is also the record of these files; those of an earlier evaluation that this one lacks are removed.
    The numbers of one that has other facts, more estimates or more items are copied to other names. ``skipped`` writes
    one more file with the path that it gets.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before, summary = read_record(folder / RECORD), result.summary()
    earlier = FILES.intersection(listed_files(before) or ())
    files, lines = ["evaluation-items.csv"], []
    if before is None and (folder / RECORD).exists():
        lines.append(f"damaged, edited or not ours: {folder / RECORD}, renamed to {set_aside(folder / RECORD).name}")
    if before and not _covers(summary, before):
        weights = "" if before.get("digest") == summary["digest"] else "other weights on "
        own = [path for name in (RECORD, files[0]) if (path := folder / name).is_file()]
        kept = " and ".join(shutil.copyfile(path, free_name(path, "earlier")).name for path in own)
        lines.append(f"kept: the earlier evaluation of {weights}{before.get('data')}, {before.get('part')}, as {kept}")
    write_items(folder / files[0], result)
    # a cascade has no noise levels in common
    if isinstance(result.model, Diffusion) and ("discrete" in result.nll or "continuous" in result.nll):
        try:
            save_bits_figure(result.model, result.nll, folder / "bits-per-step.png")
            files.append("bits-per-step.png")
            lines.append(f"figure: {folder / 'bits-per-step.png'}")
        except ConfigError as error:
            lines.append(f"no figure: {error}")
    if skipped is not None:
        skipped(folder / "evaluation-skipped.json")
        files.append("evaluation-skipped.json")
    for name in earlier.difference(files):
        (folder / name).unlink(missing_ok=True)
    meanings = [*result.explanations(), *describe_differences(summary["minus_discrete"])]
    write_record(folder / RECORD, {**summary, "explanations": meanings, "files": files})
    lines.append(f"all numbers: {folder / RECORD}, of each item: {folder / files[0]}")
    return lines


def write_items(path: Path, result: EvaluationResult) -> None:
    """Writes a CSV file: an item's index in the data set, and its bits per dimension by each estimate, or a blank."""
    columns = {name: nll.bits_per_dim(result.model.dims).tolist() for name, nll in result.nll.items()}
    most = max(map(len, columns.values()))
    rows = (
        [int(result.items[i]), *(bits[i] if i < len(bits) else "" for bits in columns.values())]
        for i in np.argsort(result.items[:most])
    )
    write_csv(path, itertools.chain([["index", *columns]], rows))
