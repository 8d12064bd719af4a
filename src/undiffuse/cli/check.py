"""``undiffuse check``: what the software sees in data, before anything is trained on them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from undiffuse.cli.options import DataArgument, console
from undiffuse.cli.reading import Read, reads_data
from undiffuse.data import Dataset
from undiffuse.data.image import FORMATS
from undiffuse.data.seen import plain
from undiffuse.errors import ConfigError
from undiffuse.report import pictures, table

SHOWN = 12
"""Classes and sizes that are named one by one."""
TILES = 64


@reads_data
def check(
    data: DataArgument,
    out: Annotated[Path | None, typer.Option(help="Write a contact sheet to this picture, such as sheet.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    *,
    read: Read,
) -> None:
    """Show what the software sees in DATA: items, sizes, levels, labels, duplicates, the held-out split."""
    if out is not None and out.suffix.lower() not in " ".join(FORMATS.values()).split():
        raise ConfigError("OPTION", "--out", f"{out.name!r} is no name of a picture", "Give one that ends in .png")
    dataset = read(data)
    facts = found(dataset)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        table.render([{"": name, "data": said} for name, said in in_words(facts).items()], data)
        for note in dataset.notes:
            console.print(f"note: {note}", markup=False)
        for problem in facts["skipped"]:
            console.print(f"skipped: [{problem['code']}] {problem['path']}: {problem['reason']}", markup=False)
    if out is not None:
        chosen = np.linspace(0, len(dataset) - 1, min(TILES, len(dataset))).astype(np.int64)
        pictures.grid(dataset.values[chosen], dataset.levels, names=dataset.columns).save(out)
        if not as_json:
            console.print(f"contact sheet of {len(chosen)} items, spread over all: {out}", markup=False)


def found(dataset: Dataset) -> dict[str, Any]:
    """What there is to know of ``dataset``, plain."""
    split = dataset.split() if dataset.share_held_out(0.1)[0] else None
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes)) if dataset.labels is not None else ()
    cond = dataset.cond
    return {
        "name": dataset.name,
        "items": len(dataset),
        "item_shape": list(dataset.item_shape),
        "levels": dataset.levels,
        "bytes": dataset.values.nbytes,
        "formats": dict(dataset.seen.formats),
        "sizes": dict(dataset.seen.sizes),
        "classes": dict(zip(dataset.classes, map(int, counts), strict=True)) if dataset.labels is not None else {},
        "told_beside": None if cond is None else {"shape": list(cond.shape[1:]), "tokens": dataset.mask is not None},
        "duplicates": len(dataset) - len(np.unique(dataset.digests)),
        "ignored": dataset.seen.ignored,
        "hidden": dataset.seen.hidden,
        "skipped": plain(dataset.seen.skipped),
        "split": split and {name: len(getattr(split, name)) for name in ("train", "validation", "test")},
        "notes": list(dataset.notes),
        "fingerprint": dataset.fingerprint,
    }


def in_words(facts: Mapping[str, Any]) -> dict[str, str]:
    """The same for people, without the notes."""
    channels, *size = facts["item_shape"]
    depth = "continuous" if facts["levels"] is None else f"{facts['levels']:,} levels"
    if facts["levels"] and math.log2(facts["levels"]).is_integer():
        depth += f", {round(math.log2(facts['levels']))} bits"
    aside = {"ignored": facts["ignored"], "hidden": facts["hidden"], "skipped": len(facts["skipped"])}
    words = {
        "items": f"{facts['items']:,} of {'×'.join(map(str, facts['item_shape']))}",
        "values": f"{depth}; {facts['bytes']:,} bytes as packed",
        "channels": f"{channels:,}" if size else "",
        "files": _counted(facts["formats"]),
        "sizes in files": _counted(facts["sizes"]),
        "labels": _counted(facts["classes"]) or "none",
        "told beside": _told_beside(facts["told_beside"]),
        "duplicates": f"{facts['duplicates']:,} items repeat another one" if facts["duplicates"] else "none",
        "left aside": ", ".join(f"{n:,} {name} files" for name, n in aside.items() if n),
        "split": ", ".join(f"{n:,} {part}" for part, n in facts["split"].items()) if facts["split"] else "none",
        "fingerprint": facts["fingerprint"][:16],
    }
    return {name: said for name, said in words.items() if said}


def _counted(counts: Mapping[str, int]) -> str:
    """Names with how many there are of each, the most frequent first where there are too many to show."""
    shown = list(counts.items())
    if len(shown) > SHOWN:
        shown = sorted(shown, key=lambda item: -item[1])[:SHOWN]
    more = f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
    return ", ".join(f"{name} ({n:,})" for name, n in shown) + more


def _told_beside(cond: Mapping[str, Any] | None) -> str:
    if cond is None:
        return "nothing"
    length = f"up to {cond['shape'][0]} tokens" if cond["tokens"] else "a vector"
    return f"{length} of {cond['shape'][-1]} numbers"
