"""``undiffuse check``: what the software finds in data, before a model is trained on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.data_options import ReadData, print_notes, with_data_options
from undiffuse.cli.options import DataArgument, console
from undiffuse.cli.results import show, with_json
from undiffuse.errors import ConfigError, counted

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset

MAX_LISTED = 12
"""Classes, sizes and formats that are listed by name."""
MAX_SKIPPED = 20
"""Skipped files that are printed one by one."""
SHEET_ITEMS, MAX_EXAMPLE = 64, 60
MAX_SHEET_VALUES = 1 << 26
"""The most values in a contact sheet, which shows fewer items if they are large."""


@with_json
@with_data_options
def check(
    data: DataArgument,
    out: Annotated[
        Path | None, typer.Option(help="Write a contact sheet to this image file, such as sheet.png.")
    ] = None,
    *,
    read: ReadData,
) -> None:
    """Show sizes, values, labels and duplicates of DATA.

    Also prints the number of items and the held-out split.
    """
    from undiffuse.runtime.own_output import MARKABLE_SUFFIXES, refuse_other_file

    if out is not None:
        if out.suffix.lower() not in MARKABLE_SUFFIXES:
            cause = f"{out.name!r} does not end in .png, .jpg, .webp, .tif or .gif"
            raise ConfigError("OPTION", "--out", cause, "Give a name that ends in .png")
        refuse_other_file(out)
    dataset = read(data)
    facts = data_facts(dataset)
    show([{"": name, "data": text} for name, text in describe_facts(facts).items()], data, **facts)
    print_notes(dataset)
    for problem in facts["skipped"][:MAX_SKIPPED]:
        console.print(f"skipped: [{problem['code']}] {problem['path']}: {problem['reason']}")
    if (more := len(facts["skipped"]) - MAX_SKIPPED) > 0:
        console.print(f"skipped: {more:,} more; --json lists all")
    if out is not None:
        count = write_contact_sheet(dataset, out)
        console.print(f"contact sheet of {count} evenly spaced items: {out}")


def write_contact_sheet(dataset: Dataset, out: Path) -> int:
    """Write up to SHEET_ITEMS evenly spaced items as one image to ``out``; returns how many."""
    import numpy as np

    from undiffuse.report.figures import image_grid
    from undiffuse.runtime.own_output import save_picture

    most = max(1, min(SHEET_ITEMS, MAX_SHEET_VALUES // math.prod(dataset.item_shape)))
    items = np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(np.int64)
    save_picture(image_grid(dataset.values[items], dataset.num_values, names=dataset.columns), out)
    return len(items)


def data_facts(dataset: Dataset) -> dict[str, Any]:
    """Everything about ``dataset`` as data that JSON can represent."""
    import numpy as np

    from undiffuse.data.source_report import plain_problems

    split = dataset.split() if dataset.held_out_fraction(0.1)[0] else None
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes)) if dataset.labels is not None else ()
    cond = dataset.cond
    return {
        "name": dataset.name,
        "items": len(dataset),
        "item_shape": list(dataset.item_shape),
        "num_values": dataset.num_values,
        "bytes": dataset.values.nbytes,
        "formats": dict(dataset.report.formats),
        "sizes": dict(dataset.report.sizes),
        "classes": dict(zip(dataset.classes, map(int, counts), strict=True)) if dataset.labels is not None else {},
        "conditions": None if cond is None else {"shape": list(cond.shape[1:]), "tokens": dataset.mask is not None},
        "captions": _caption_facts(dataset),
        "duplicates": len(dataset) - len(np.unique(dataset.digests)),
        "ignored": dataset.report.ignored,
        "hidden": dataset.report.hidden,
        "skipped": plain_problems(dataset.report.skipped),
        "split": split and {name: len(getattr(split, name)) for name in ("train", "validation", "test")},
        "notes": list(dataset.notes),
        "fingerprint": dataset.fingerprint,
    }


def _caption_facts(dataset: Dataset) -> dict[str, Any] | None:
    """How many captions there are, the longest in bytes, and examples; None without captions."""
    if not dataset.captions:
        return None
    texts = [text for each in dataset.captions for text in each]
    spread = [texts[i * (len(texts) - 1) // 2] for i in range(3)]
    facts = {"count": len(texts), "distinct": len(set(texts)), "longest": dataset.longest_caption}
    return facts | {"examples": list(dict.fromkeys(spread)), "encoder": dataset.text_encoder}


def describe_facts(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts of `data_facts` as text, without the notes; facts that do not apply are left out."""
    channels, *size = facts["item_shape"]
    unused = {"ignored": facts["ignored"], "hidden": facts["hidden"], "skipped": len(facts["skipped"])}
    shape = f"of {channels}{''.join(f'×{n}' for n in size)}" if size else f"vectors of {counted(channels, 'number')}"
    lines = {
        "items": f"{facts['items']:,} {shape}",
        "values": f"{_describe_values(facts['num_values'])}; {facts['bytes']:,} bytes in total",
        "channels": f"{channels:,}" if size else "",
        "files": _describe_counts(facts["formats"]),
        "sizes in files": _describe_counts(facts["sizes"]),
        "labels": _describe_counts(facts["classes"]) or "none",
        "conditions": _describe_conditions(facts["conditions"]),
        "captions": _describe_captions(facts["captions"]),
        "duplicates": f"{counted(facts['duplicates'], 'repetition')} of another item"
        if facts["duplicates"]
        else "none",
        "unused files": ", ".join(f"{count:,} {name}" for name, count in unused.items() if count),
        "split": ", ".join(f"{n:,} {part}" for part, n in facts["split"].items()) if facts["split"] else "none",
        "fingerprint": facts["fingerprint"][:16],
    }
    return {name: text for name, text in lines.items() if text}


def _describe_values(num_values: int | None) -> str:
    if num_values is None:
        return "continuous"
    bits = math.log2(num_values)
    return f"integers 0 to {num_values - 1:,}" + (f" ({counted(int(bits), 'bit')})" if bits.is_integer() else "")


def _describe_counts(counts: Mapping[str, int]) -> str:
    """Names with their counts; only the most frequent ones if there are more than MAX_LISTED."""
    listed = list(counts.items())
    if len(listed) > MAX_LISTED:
        listed = sorted(listed, key=lambda item: -item[1])[:MAX_LISTED]
    more = f" and {len(counts) - MAX_LISTED} more" if len(counts) > MAX_LISTED else ""
    return ", ".join(f"{name} ({count:,})" for name, count in listed) + more


def _describe_captions(captions: Mapping[str, Any] | None) -> str:
    if captions is None:
        return ""
    examples = ", ".join(repr(text[:MAX_EXAMPLE]) for text in captions["examples"])
    size = f"{captions['count']:,}, {captions['distinct']:,} distinct, of up to {counted(captions['longest'], 'byte')}"
    return f"{size}, for the encoder {captions['encoder']['name']}: {examples}"


def _describe_conditions(cond: Mapping[str, Any] | None) -> str:
    if cond is None:
        return "none"
    length = f"up to {counted(cond['shape'][0], 'token')}" if cond["tokens"] else "a vector"
    return f"{length} of {counted(cond['shape'][-1], 'number')}"
