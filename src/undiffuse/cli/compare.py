"""``undiffuse compare``: samples beside the data, by metrics with intervals and floors, and a test for copies."""

from __future__ import annotations

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
from undiffuse.errors import ConfigError
from undiffuse.evaluation.features import EXTRACTORS
from undiffuse.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset

RECORD, IMAGE = "compare.json", "nearest.png"
"""All numbers, which is also the record of what is written, and the image of the nearest training items."""


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
    """Compare SAMPLES with the data of their run, or DATA: metrics beside their floor, and a test for copies."""
    from undiffuse.errors import DataError
    from undiffuse.evaluation import comparison
    from undiffuse.report import comparison_report
    from undiffuse.report.sample_folder import sampler_in_words
    from undiffuse.runtime.output_folder import check_output_folder, listed_files
    from undiffuse.runtime.own_output import save_picture
    from undiffuse.runtime.side_files import read_record, write_record

    of_cascade = bool(_manifest(samples).get("then"))
    if run is not None and not run.exists():
        raise ConfigError("NOT_FOUND", f"--run {run}", "no such run", "Name a run folder or a model file")
    run = run or _run_of(samples)
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
    held_out = _held_out(held_out, run, dataset)
    dataset = full_resolution(dataset) if of_cascade else dataset
    print_notes(dataset)
    values = comparison.load_samples(samples, dataset, read)
    result = comparison.compare(
        values, dataset, metrics=metric or (), extractor=features, items=items, held_out=held_out, seed=seed
    )
    manifest = _manifest(samples)
    drawn = {"weights": manifest.get("weights"), "sampler": sampler_in_words(manifest)}
    summary = {
        "samples": samples,
        **drawn,
        **result.summary(),
        "nearest": comparison_report.nearest_rows(result, dataset),
    }
    summary["explanations"] = result.explanations()
    title = f"{samples} and {dataset.name}: n = {result.n:,}, features {result.extractor}, ± standard error"
    show(comparison_report.comparison_rows(result), title, **summary)
    for line in result.explanations():
        console.print(line)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        picture = None
        try:
            picture = comparison_report.neighbours_image(result, values, dataset)
        except DataError as error:
            console.print(f"no image of nearest items: {error.cause}")
        if picture is None and IMAGE in (before or ()):
            (out / IMAGE).unlink(missing_ok=True)
        write_record(out / RECORD, {**summary, "files": [IMAGE] if picture else []})
        written = [str(out / RECORD)]
        if picture:
            save_picture(picture, out / IMAGE)
            written.append(str(out / IMAGE))
        console.print(f"written: {', '.join(written)}")


def _run_of(samples: str) -> Path | None:
    """The run that the manifest of a sample folder names, of a cascade the last one, if it is there."""
    manifest = _manifest(samples)
    model = [manifest.get("model"), *manifest.get("then", ())][-1]
    return Path(model) if model and Path(model).exists() else None


def _manifest(samples: str) -> dict[str, Any]:
    """The manifest of a sample folder; empty if there is none."""
    from undiffuse.runtime.side_files import read_record

    with suppress(OSError):
        return read_record(Path(samples) / "manifest.json") or {}
    return {}


def _held_out(held_out: float | None, run: Path | None, dataset: Dataset) -> float:
    """The fraction that the ``run`` held out of these data if it was trained on them, else ``held_out``, else 0.1.

    Raises `ConfigError` if ``held_out`` is given and differs from that of the run.
    """
    from undiffuse.training.run_folder import Run

    record = None if run is None else Run(run_folder(run)).record
    if record is None or record["data"]["fingerprint"] != dataset.fingerprint:
        return 0.1 if held_out is None else held_out
    share = float(record["config"]["train"]["held_out"])
    if held_out not in (None, share):
        cause = f"{run} held out {share:g} of these data"
        raise ConfigError("HELD_OUT", f"--held-out {held_out:g}", cause, "Leave it out")
    return share
