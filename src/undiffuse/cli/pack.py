"""``undiffuse pack``: write data that are larger than memory to one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.data_options import ReadData, print_notes, record_skipped, refuse_inside, with_data_options
from undiffuse.cli.options import DataArgument, as_argument, console
from undiffuse.errors import ConfigError, counted


@with_data_options
def pack(
    data: DataArgument,
    out: Annotated[Path, typer.Argument(help="The .npy file to write.", metavar="OUT.npy")],
    *,
    read: ReadData,
) -> None:
    """Write DATA to one file. Commands read it from disk in parts, so that it may be larger than memory."""
    from undiffuse.data.sources.packed_array import pack_writer, sidecar_path

    refuse_inside(out, data, flag="OUT.npy")
    for name, flag in (("from_side", "--from"), ("reduce_to", "--reduce")):
        if read.keywords.get(name) is not None:
            cause = "one array does not hold a stage of a cascade"
            raise ConfigError("PACK", flag, cause, "Pack the images without it, and give it to train")
    skipped = out.with_name(f"{out.stem}.skipped.json")
    if read.keywords.get("on_bad") == "skip" and os.path.lexists(skipped):
        raise ConfigError("OPTION", skipped, "exists already", "Give OUT.npy another name, or move this file away")
    with pack_writer(out) as writer:
        dataset = read(data, allocate=writer.allocate)
        writer.write(dataset, out)
    print_notes(dataset)
    record_skipped(dataset, skipped)
    megabytes = out.stat().st_size / 1e6
    size = f"{megabytes:,.2f} MB" if megabytes < 100 else f"{megabytes / 1e3:,.2f} GB"
    console.print(f"packed: {counted(len(dataset), 'item')}, {size}, in {out} and {sidecar_path(out).name}")
    console.print(f"next: undiffuse train {as_argument(out)}{' --captions' if dataset.captions else ''}")
