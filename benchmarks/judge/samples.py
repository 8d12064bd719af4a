"""Pictures with the texts that they should show: a folder with metadata.csv, or samples of ``undiffuse sample``."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path


def read_metadata(folder: Path) -> dict[str, list[str]]:
    """The captions of each file, in the order of metadata.csv."""
    captions: dict[str, list[str]] = {}
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["file_name"], []).append(row["text"])
    return captions


def read_lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def in_turn(prompts: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    """Sample i, of file ``00000i.png``, shows prompt i mod N, as ``undiffuse sample`` uses its conditions in turn."""
    return {file: prompts[int(Path(file).stem) % len(prompts)] for file in files}


def read_named(folder: Path, prompts: Path | None = None, part: str = "") -> dict[Path, str]:
    """The text of each picture: its first caption in metadata.csv, or the sample's prompt.

    Of metadata.csv, files in the sub-folder ``part`` and without a skin tone. Prompts are those of the file
    ``prompts``, else those in manifest.json.
    """
    if prompts is None and (folder / "metadata.csv").exists():
        first = {file: listed[0] for file, listed in read_metadata(folder).items()}
        names = {file: name for file, name in first.items() if file.startswith(part) and "skin tone" not in name}
    else:
        files = sorted(path.name for path in folder.glob("[0-9]*.png"))
        names = in_turn(read_lines(prompts) if prompts else manifest_prompts(folder), files)
    if not names:
        raise SystemExit(f"{folder}: no pictures with names")
    return {folder / file: name for file, name in names.items()}


def manifest_prompts(folder: Path) -> list[str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in (manifest, manifest.get("plan", {})):
        for key in ("prompts", "prompt"):
            if found := record.get(key):
                return [found] if isinstance(found, str) else list(found)
    raise SystemExit(f"{folder / 'manifest.json'}: no prompts. Give --prompts FILE")
