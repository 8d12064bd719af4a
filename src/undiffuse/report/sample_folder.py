"""A folder of samples: an image file for each sample that is an image, a table, a grid, an array, a manifest.

It is written part by part, so that only one part is in memory at a time and an interrupted command resumes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.report.figures import image_grid
from undiffuse.runtime.atomic_file import atomic_file, write_csv
from undiffuse.runtime.own_output import save_picture
from undiffuse.runtime.part_store import PartStore, plan_key

GRID_ITEMS = 144
"""Samples in the grid, at most."""


class SampleFolder:
    """Samples of one ``plan`` in ``folder``; the plan is plain data, all that a sample depends on beside its number.

    Until `finish` has written ``samples.npz``, the samples are in ``parts/``, a `PartStore`. The image files of a part
    are written before it. How the samples are divided into parts changes no result. Vectors whose ``columns`` have
    names are also written to ``samples.csv``.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], num_values: int | None, columns: Sequence[str] = ()) -> None:
        self.folder, self.plan, self.num_values = folder, json.loads(json.dumps(plan)), num_values
        self.columns, self.table = tuple(columns), folder / "samples.csv"
        self.key = plan_key(self.plan)
        self.parts, self.array, self.manifest = folder / "parts", folder / "samples.npz", folder / "manifest.json"
        self.store = PartStore(self.parts, "samples", self.key)

    def open(self, report: Callable[[str], None] = print) -> None:
        """Removes finished samples, damaged parts and parts of another plan; ``report`` receives what is reused."""
        done = _read_manifest(self.manifest)
        if "key" in done:
            if done["key"] != self.key:
                changed = [name for name, value in self.plan.items() if done.get(name) != value]
                report(f"starting over: the samples in {self.folder} differ in {', '.join(changed) or 'their plan'}")
            for name in [*map(_image_name, done["items"]), "grid.png", "samples.csv", "samples.npz", "manifest.json"]:
                (self.folder / name).unlink(missing_ok=True)
        self.parts.mkdir(parents=True, exist_ok=True)
        if kept := sum(len(_items_of(name)) for name in self.store.check(report)):
            report(f"resuming: {kept:,} samples are in {self.parts}")

    def finished(self, items: range) -> bool:
        """Whether exactly these ``items`` are finished, with an array that matches its sha256."""
        done = _read_manifest(self.manifest)
        if (done.get("key"), done.get("first"), done.get("n")) != (self.key, items.start, len(items)):
            return False
        return done.get("sha256") == _sha256(self.array)

    def missing_items(self, items: range) -> list[range]:
        """The stretches of ``items`` that are in no part."""
        gaps, start = [], items.start
        for part, _ in self._parts():
            gaps.append(range(start, min(part.start, items.stop)))
            start = max(start, part.stop)
        return [gap for gap in [*gaps, range(start, items.stop)] if gap]

    def add(self, first: int, values: np.ndarray) -> None:
        """Writes ``values`` (n, ...), the samples from number ``first`` on, as a part."""
        if values.ndim == 4 and values.shape[1] in (1, 3, 4) and self.num_values is not None:
            for item, value in enumerate(values, first):
                _image(value, self.num_values).save(self.folder / _image_name(item))
        self.store.write(f"{first:09d}-{first + len(values) - 1:09d}", {"x": torch.from_numpy(values)})

    def finish(self, items: range, facts: dict[str, Any] | None = None) -> Path | None:
        """Writes the array, the manifest (the plan and ``facts``) and the grid of the first `GRID_ITEMS` samples.

        Returns the path of the grid; None where matplotlib would be needed and is missing. Raises `CheckpointError`
        where a part is missing or damaged.
        """
        if missing := self.missing_items(items):
            cause = f"the samples {missing[0].start} to {missing[0][-1]} are missing"
            raise CheckpointError("PARTS", self.parts, cause, "Run the same command again")
        with atomic_file(self.array) as file:
            _write_array(file, self._read(items), len(items))
        if self.columns:
            rows = (row for part in self._read(items) for row in part.astype(str).tolist())
            write_csv(self.table, itertools.chain([self.columns], rows))
        grid = self.folder / "grid.png"
        try:
            first = np.concatenate(list(self._read(items[:GRID_ITEMS])))
            save_picture(image_grid(first, self.num_values, names=self.columns), grid)
        except ConfigError:
            grid = None
        manifest = {**self.plan, **(facts or {}), "first": items.start, "n": len(items)}
        manifest |= {"key": self.key, "sha256": _sha256(self.array)}
        with atomic_file(self.manifest) as file:
            file.write(json.dumps(manifest, indent=1)[:-2].encode() + b',\n "items": [')
            file.writelines(f"{', ' if item > items.start else ''}{item}".encode() for item in items)
            file.write(b"]\n}\n")
        self.remove_parts()
        return grid

    def remove_parts(self) -> None:
        """Removes the parts: the last thing that `finish` does, left over where it was interrupted there."""
        self.store.remove()

    def _parts(self) -> list[tuple[range, str]]:
        """The samples and the name of each part, in the order of the samples."""
        return sorted(((_items_of(name), name) for name in self.store.names()), key=lambda part: part[0].start)

    def _read(self, items: range) -> Iterator[np.ndarray]:
        """The values of ``items``, one part at a time."""
        for part, name in self._parts():
            inside = range(max(items.start, part.start), min(items.stop, part.stop))
            if inside:
                yield self.store.read(name)[0]["x"][inside.start - part.start : inside.stop - part.start].numpy()


def write_samples(
    folder: Path, values: np.ndarray, num_values: int | None, plan: dict[str, Any], first: int = 0
) -> Path | None:
    """Writes ``values`` (N, ...), the samples from number ``first`` on, to ``folder``; the path of the grid, if any."""
    samples = SampleFolder(folder, plan, num_values)
    samples.open(lambda message: None)
    samples.add(first, values)
    return samples.finish(range(first, first + len(values)))


def _write_array(file: IO[bytes], parts: Iterator[np.ndarray], n: int) -> None:
    """Writes ``parts`` as an npz file with one array x of ``n`` items, compressed as a stream."""
    first = next(parts)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    entry = zipfile.ZipInfo("x.npy")  # dated 1980: the same samples give the same bytes
    entry.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(file, "w") as archive, archive.open(entry, "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (n, *first.shape[1:])})
        for part in itertools.chain([first], parts):
            stream.write(np.ascontiguousarray(part).data)


def _read_manifest(path: Path) -> dict[str, Any]:
    """The contents of a manifest; empty where it is missing or cannot be read."""
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _items_of(name: str) -> range:
    """The samples of the part called "first-last"."""
    first, last = name.split("-")
    return range(int(first), int(last) + 1)


def _image_name(item: int) -> str:
    return f"{item:06d}.png"


def _image(value: np.ndarray, num_values: int) -> Image.Image:
    """(C, H, W) whole numbers as an image of 8 bits a channel, or of 16 for grey with more than 256 values."""
    if num_values > 256 and value.shape[0] == 1:
        return Image.fromarray((value[0].astype(np.float64) * 65535 / (num_values - 1)).round().astype(np.uint16))
    scaled = (value.astype(np.float64) * 255 / (num_values - 1)).round().astype(np.uint8)
    return Image.fromarray(scaled[0] if len(scaled) == 1 else np.moveaxis(scaled, 0, -1))
