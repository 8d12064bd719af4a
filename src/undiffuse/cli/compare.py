"""``undiffuse compare``: samples beside the data, by metrics with intervals and floors, and a test for copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.data_options import ReadData, print_notes, with_data_options
from undiffuse.cli.options import DataArgument, console
from undiffuse.evaluation.features import EXTRACTORS
from undiffuse.evaluation.metrics import METRICS


@with_data_options
def compare(
    samples: Annotated[
        str, typer.Argument(help="A folder of 'sample', an array file, or any source of data.", metavar="SAMPLES")
    ],
    data: DataArgument,
    metric: Annotated[list[str] | None, typer.Option(help=f"{', '.join(METRICS)}; repeatable; by default all.")] = None,
    features: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(EXTRACTORS)}; by default raw for small items, else pca. No Inception features."),
    ] = None,
    items: Annotated[
        int, typer.Option(help="Largest number of samples to compare, with as many items.", min=20)
    ] = 2000,
    held_out: Annotated[float, typer.Option(help="Fraction that was held out when the model was trained.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples and items.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for compare.json and an image of the nearest training items.")
    ] = None,
    *,
    read: ReadData,
) -> None:
    """Compare SAMPLES with DATA: metrics beside their floor, and a test whether training items are copied."""
    from undiffuse.errors import DataError
    from undiffuse.evaluation import comparison
    from undiffuse.report import comparison_report, table
    from undiffuse.runtime.own_output import save_picture

    dataset = read(data)
    if not as_json:
        print_notes(dataset)
    values = comparison.load_samples(samples, dataset, read)
    result = comparison.compare(
        values, dataset, metrics=metric or (), extractor=features, items=items, held_out=held_out, seed=seed
    )
    summary = {"samples": samples, **result.summary()}
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        title = f"{samples} and {dataset.name}: n = {result.n:,}, features {result.extractor}, ± standard error"
        table.render(comparison_report.comparison_rows(result), title)
        for line in result.explanations():
            console.print(line, markup=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.json").write_text(json.dumps(summary, indent=1))
        written = [str(out / "compare.json")]
        try:
            save_picture(comparison_report.neighbours_image(result, values, dataset), out / "nearest.png")
            written.append(str(out / "nearest.png"))
        except DataError as error:
            if not as_json:
                console.print(f"no image of nearest items: {error.cause}", markup=False)
        if not as_json:
            console.print(f"written: {', '.join(written)}", markup=False)
