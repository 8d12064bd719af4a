"""``undiffuse pack``: data larger than memory as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undiffuse.cli.options import DataArgument, console
from undiffuse.cli.reading import Read, reads_data, record_skipped, say_notes
from undiffuse.data.pack import packing, told


@reads_data
def pack(
    data: DataArgument,
    out: Annotated[Path, typer.Argument(help="The .npy file to write.", metavar="OUT.npy")],
    *,
    read: Read,
) -> None:
    """Write DATA to one file that all commands take and none reads into memory: for more than memory holds."""
    with packing(out) as packed:
        dataset = read(data, place=packed.place)
        packed.write(dataset, out)
    say_notes(dataset)
    record_skipped(dataset, out.with_name(out.stem + ".skipped.json"))
    size = f"{out.stat().st_size / 1e9:,.2f} GB"
    console.print(f"packed: {len(dataset):,} items, {size}, {out} and beside it {told(out).name}", markup=False)
    console.print(f"next: undiffuse train {out}", markup=False)
