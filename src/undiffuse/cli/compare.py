"""``undiffuse compare``: samples beside the data, by metrics with intervals and floors, and a test for copies."""

from __future__ import annotations

import functools
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.cascade_options import full_resolution
from undiffuse.cli.data_options import (
    OwnDataArgument,
    ReadData,
    print_notes,
    read_data,
    refuse_inside,
    with_data_options,
)
from undiffuse.cli.options import console, run_folder
from undiffuse.cli.results import show, with_json
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation.features import EXTRACTORS
from undiffuse.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset

OPTIONS_OF_LABELS = ("captions", "text_encoder", "with_labels", "label_column", "split_folders")
"""Options of DATA that say nothing about samples, which need no labels, captions or parts."""


@with_json
@with_data_options
def compare(
    samples: Annotated[
        str, typer.Argument(help="A folder of 'sample', an array file, or any source of data.", metavar="SAMPLES")
    ],
    data: OwnDataArgument = None,
    run: Annotated[
        Path | None, typer.Option(help="The run of the samples; by default the one that their manifest names.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help=f"{', '.join(METRICS)}; repeatable; by default all.")] = None,
    features: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(EXTRACTORS)}; by default raw for small items, else pca. No Inception features."),
    ] = None,
    items: Annotated[
        int, typer.Option(help="Largest number of samples to compare, with as many items.", min=20)
    ] = 2000,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Fraction that was held out when the model was trained; by default that of its run, else 0.1."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples and items.", min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.json and an image of the nearest training items.")
    ] = None,
    *,
    read: ReadData,
) -> None:
    """Compare SAMPLES with the data of their run, or DATA.

    Prints metrics beside their floor, and a test for copies.
    """
    from undiffuse.evaluation import comparison
    from undiffuse.report import comparison_report
    from undiffuse.report.comparison_report import IMAGE, RECORD
    from undiffuse.report.sample_folder import sampler_in_words
    from undiffuse.runtime.output_folder import check_output_folder, listed_files
    from undiffuse.runtime.own_output import save_picture
    from undiffuse.runtime.side_files import read_record, write_record

    given = {"metric": metric or [], "features": features, "items": items, "held_out": held_out, "seed": seed}
    of_cascade = bool(_manifest(samples).get("then"))
    if run is not None and not run.exists():
        raise ConfigError("NOT_FOUND", f"--run {run}", "no such run", "Name a run folder or a model file")
    runs = [run] if run else _runs_of(samples)
    run = runs[-1] if runs else None
    if run is None and data is None:
        cause = "neither DATA nor a run of these samples is known"
        raise ConfigError("USAGE", "undiffuse compare", cause, "Name DATA after SAMPLES, or give --run")
    for source in (data, samples):
        refuse_inside(out, source, run)
    before = None
    if out is not None:
        before = listed_files(read_record(out / RECORD))
        check_output_folder(out, out / RECORD, before, [IMAGE])
    dataset = read_data(read, data, run or Path())
    held_out = _held_out(held_out, runs, dataset)
    dataset = full_resolution(dataset) if of_cascade else dataset
    print_notes(dataset)
    options = {name: value for name, value in read.keywords.items() if name not in OPTIONS_OF_LABELS}
    of_samples = functools.partial(read.func, **options)
    values = comparison.load_samples(samples, dataset, of_samples, read.keywords.get("layout"))
    result = comparison.compare(
        values, dataset, metrics=metric or (), extractor=features, items=items, held_out=held_out, seed=seed
    )
    manifest = _manifest(samples)
    drawn = {"weights": manifest.get("weights"), "sampler": sampler_in_words(manifest)}
    summary = {
        "samples": samples,
        **drawn,
        **result.summary(),
        "options": given,
        "nearest": comparison_report.nearest_rows(result, dataset),
    }
    summary["explanations"] = result.explanations()
    title = f"{samples} and {dataset.name}: n = {result.n:,}, features {result.extractor}, ± standard error"
    show(comparison_report.comparison_rows(summary), title, **summary)
    for line in result.explanations():
        console.print(line)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        picture = None
        try:
            picture = comparison_report.neighbours_image(summary["nearest"], values, dataset)
        except (ConfigError, DataError) as error:
            console.print(f"no image of nearest items: {error.cause}")
        if picture is None and IMAGE in (before or ()):
            (out / IMAGE).unlink(missing_ok=True)
        write_record(out / RECORD, {**summary, "files": [IMAGE] if picture else []})
        written = [str(out / RECORD)]
        if picture:
            save_picture(picture, out / IMAGE)
            written.append(str(out / IMAGE))
        console.print(f"written: {', '.join(written)}")


def _runs_of(samples: str) -> list[Path]:
    """The runs that the manifest of a sample folder names, of a cascade those of all stages, if they are there."""
    manifest = _manifest(samples)
    models = [manifest.get("model"), *manifest.get("then", ())]
    return [Path(model) for model in models] if all(model and Path(model).exists() for model in models) else []


def _manifest(samples: str) -> dict[str, Any]:
    """The manifest of a sample folder; empty if there is none."""
    from undiffuse.runtime.side_files import read_record

    with suppress(OSError):
        return read_record(Path(samples) / "manifest.json") or {}
    return {}


def _held_out(held_out: float | None, runs: list[Path], dataset: Dataset) -> float:
    """The smallest fraction that the ``runs`` held out of these data, if they were trained on them.

    Else ``held_out``, else 0.1. Raises `ConfigError` if ``held_out`` is given and differs from that of the runs.
    """
    known = {dataset.fingerprint, full_resolution(dataset).fingerprint}
    shares = [share for run in runs if (share := _share(run, known)) is not None]
    if not shares:
        return 0.1 if held_out is None else held_out
    if held_out not in (None, min(shares)):
        cause = f"{' and '.join(map(str, runs))} held out {min(shares):g} of these data"
        raise ConfigError("HELD_OUT", f"--held-out {held_out:g}", cause, "Leave it out")
    return min(shares)


def _share(run: Path, fingerprints: set[str]) -> float | None:
    """The fraction that a run or a model file held out of the data with one of the ``fingerprints``; None of others."""
    from undiffuse.model.checkpoint import read_info
    from undiffuse.training.run_folder import Run

    record = Run(run_folder(run)).record
    facts = read_info(run) if record is None else record["data"]
    if not fingerprints & {facts.get("fingerprint"), facts.get("stage", {}).get("fingerprint")}:
        return None
    return float(facts.get("held_out", 0.1) if record is None else record["config"]["train"]["held_out"])
