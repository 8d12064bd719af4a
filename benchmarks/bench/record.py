"""Results as a section of benchmarks/RECORDS.md and a folder of benchmarks/records, all parts in one format."""

from __future__ import annotations

import datetime
import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from undiffuse.runtime.atomic_file import write_atomic
from undiffuse.runtime.environment import package_versions, processor, usable_cores
from undiffuse.runtime.precision import cpu_multiplies_bfloat16

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "diffusers", "denoising-diffusion-pytorch")


@dataclass(frozen=True)
class Table:
    """Rows of one kind with a title; a cell is text."""

    title: str
    rows: Sequence[Mapping[str, str]]


@dataclass
class Result:
    """What a part found. ``raw`` are all numbers, ``files`` pictures by name, ``seeds`` those that it used.

    ``where``: commit and machine of what was measured before this process began.
    """

    title: str
    tables: Sequence[Table]
    raw: Mapping[str, Any]
    seeds: Sequence[int] = (0,)
    notes: Sequence[str] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)


def machine() -> dict[str, str]:
    """The features of this machine on which times depend."""
    facts = processor()
    return {
        "processor": facts["processor"],
        "cores": f"{usable_cores()} usable",
        "threads": str(torch.get_num_threads()),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16 products": "yes" if cpu_multiplies_bfloat16() else "no",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that are compared."""
    return package_versions(PACKAGES)


@functools.cache
def commit() -> str:
    """The commit of this checkout at the first call, and whether files of package or benchmark differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "benchmarks/bench")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def command_line() -> str:
    """The command of this process from the repository."""
    return "benchmarks/bench/run " + shlex.join(sys.argv[1:])


def markdown(name: str, result: Result, where: Mapping[str, Any], folder: str) -> str:
    """The section of ``result`` in RECORDS.md, whose raw files are in ``folder``."""
    facts = ", ".join(f"{key} {value}" for key, value in where["machine"].items())
    packages = ", ".join(f"{key} {value}" for key, value in where["versions"].items())
    lines = [f"## {result.title} (`{name}`, {where['date']})", ""]
    lines += [f"`{where['command']}`, commit {where['commit']}; seeds {', '.join(map(str, result.seeds))}; {packages}."]
    lines += [f"Machine: {facts}. Raw files: `{folder}`.", ""]
    for table in result.tables:
        lines += [table.title + ":", "", *rows_as_markdown(table.rows), ""]
    lines += [f"- {note}" for note in result.notes] + [""] * bool(result.notes)
    return "\n".join(lines)


def rows_as_markdown(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A table with the columns of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]


def append(name: str, result: Result, benchmarks: Path = ROOT / "benchmarks") -> str:
    """Write the raw files, append the section to RECORDS.md and return it. Nothing that exists is overwritten."""
    where = {
        "command": command_line(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        **result.where,
    }
    base = f"{where['date']}-bench-{name}"
    folder, number = benchmarks / "records" / base, 1
    while folder.exists():
        number += 1
        folder = benchmarks / "records" / f"{base}-{number}"
    folder.mkdir(parents=True)
    content = {"where": where, "seeds": list(result.seeds), "notes": list(result.notes), **result.raw}
    write_atomic(folder / "numbers.json", (json.dumps(content, indent=1) + "\n").encode())
    for file, data in result.files.items():
        write_atomic(folder / file, data)
    section = markdown(name, result, where, f"records/{folder.name}/")
    place = benchmarks / "RECORDS.md"
    earlier = place.read_text(encoding="utf-8").rstrip("\n") if place.exists() else "# Records"
    write_atomic(place, f"{earlier}\n\n{section.rstrip()}\n".encode())
    return section
