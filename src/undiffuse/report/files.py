"""Samples as files: one picture each where they are images, a table of what has columns, a grid, an array, a manifest.

They are written part by part, so that no more than one part is in memory and a stopped run goes on.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from undiffuse.checkpoint import read_tensors, sync_folder, write_tensors
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.report.pictures import grid

SHOWN = 144
"""Items in the grid."""


class Album:
    """Samples of one ``plan`` in ``folder``: plain data, all that an item depends on beside its own number.

    Vectors whose ``columns`` have names become ``samples.csv`` too.

    Until `finish` has made ``samples.npz``, the items lie in ``parts/`` with a sha256 each. A part is there whole
    or not at all, and its pictures were written before it. Which items share a part changes no result.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], levels: int | None, columns: Sequence[str] = ()) -> None:
        self.folder, self.plan, self.levels = folder, json.loads(json.dumps(plan)), levels
        self.columns, self.table = tuple(columns), folder / "samples.csv"
        self.key = hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()
        self.parts, self.array, self.manifest = folder / "parts", folder / "samples.npz", folder / "manifest.json"

    def begin(self, say: Callable[[str], None] = print) -> None:
        """Removes what was finished before, damaged parts and parts of another plan; ``say`` is told what is kept."""
        done = _manifest(self.manifest)
        if "key" in done:
            if done["key"] != self.key:
                changed = [name for name, value in self.plan.items() if done.get(name) != value]
                say(f"drawn anew: what lies in {self.folder} differs in {', '.join(changed) or 'its plan'}")
            for name in [*map(_name, done["items"]), "grid.png", "samples.csv", "samples.npz", "manifest.json"]:
                (self.folder / name).unlink(missing_ok=True)
        self.parts.mkdir(parents=True, exist_ok=True)
        kept = 0
        for items, path in self._kept():
            try:
                if read_tensors(path)[1].get("plan") == self.key:
                    kept += len(items)
                    continue
            except CheckpointError as damaged:
                say(f"drawn again: {path.name}, {damaged.cause}")
            path.unlink()
        if kept:
            say(f"goes on: {kept:,} samples are kept in {self.parts}")

    def finished(self, items: range) -> bool:
        """Whether these very items are all there, whole."""
        done = _manifest(self.manifest)
        asked = (self.key, items.start, len(items))
        return asked == (done.get("key"), done.get("first"), done.get("n")) and done.get("sha256") == _sha256(
            self.array
        )

    def missing(self, items: range) -> list[range]:
        """The runs of ``items`` that are in no part."""
        runs, start = [], items.start
        for kept, _ in self._kept():
            runs.append(range(start, min(kept.start, items.stop)))
            start = max(start, kept.stop)
        return [run for run in [*runs, range(start, items.stop)] if run]

    def add(self, first: int, values: np.ndarray) -> None:
        """Keeps ``values`` (n, ...), the items from ``first`` on."""
        if values.ndim == 4 and values.shape[1] in (1, 3, 4) and self.levels is not None:
            for item, value in enumerate(values, first):
                _image(value, self.levels).save(self.folder / _name(item))
        told = {"undiffuse": "samples", "plan": self.key}
        path = self.parts / f"{first:09d}-{first + len(values) - 1:09d}.safetensors"
        write_tensors(path, {"x": torch.from_numpy(values)}, told)

    def finish(self, items: range, told: dict[str, Any] | None = None) -> Path | None:
        """Makes the array, the manifest (the plan and ``told``) and the grid of the first 144, whose path is returned.

        None where there is no matplotlib to draw such items. Raises `CheckpointError` where a part is gone or damaged.
        """
        if missing := self.missing(items):
            cause = f"the samples {missing[0].start} to {missing[0][-1]} are gone"
            raise CheckpointError("PARTS", self.parts, cause, "Run the same command again")
        with _replacing(self.array) as file:
            _write_array(file, self._read(items), len(items))
        if self.columns:
            with open(self.table, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(self.columns)
                csv.writer(file).writerows(row for part in self._read(items) for row in part.astype(str).tolist())
        picture = self.folder / "grid.png"
        try:
            first = np.concatenate(list(self._read(items[:SHOWN])))
            grid(first, self.levels, names=self.columns).save(picture)
        except ConfigError:
            picture = None
        about = {**self.plan, **(told or {}), "first": items.start, "n": len(items)}
        about |= {"key": self.key, "sha256": _sha256(self.array)}
        with _replacing(self.manifest) as file:
            file.write(json.dumps(about, indent=1)[:-2].encode() + b',\n "items": [')
            file.writelines(f"{', ' if item > items.start else ''}{item}".encode() for item in items)
            file.write(b"]\n}\n")
        self.tidy()
        return picture

    def tidy(self) -> None:
        """Removes the parts, as `finish` does in the end, which may be stopped at it."""
        for path in self.parts.glob("*"):
            path.unlink()
        if self.parts.is_dir():
            self.parts.rmdir()

    def _kept(self) -> list[tuple[range, Path]]:
        """The parts in the order of their items."""
        named = ((path.stem.split("-"), path) for path in self.parts.glob("*.safetensors"))
        return sorted(((range(int(a), int(b) + 1), path) for (a, b), path in named), key=lambda part: part[0].start)

    def _read(self, items: range) -> Iterator[np.ndarray]:
        """The ``items`` from their parts, one part at a time."""
        for kept, path in self._kept():
            inside = range(max(items.start, kept.start), min(items.stop, kept.stop))
            if inside:
                yield read_tensors(path)[0]["x"][inside.start - kept.start : inside.stop - kept.start].numpy()


def write_samples(
    folder: Path, values: np.ndarray, levels: int | None, plan: dict[str, Any], first: int = 0
) -> Path | None:
    """Writes ``values`` (N, ...), the items from ``first`` on; the path of the grid, if their shape has one."""
    album = Album(folder, plan, levels)
    album.begin(lambda said: None)
    album.add(first, values)
    return album.finish(range(first, first + len(values)))


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` when it is whole and durable."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def _write_array(file: IO[bytes], parts: Iterator[np.ndarray], n: int) -> None:
    """The npz file of ``parts``, one array x of ``n`` items, compressed as they come."""
    first = next(parts)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    entry = zipfile.ZipInfo("x.npy")  # dated 1980: the same samples make the same bytes
    entry.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(file, "w") as archive, archive.open(entry, "w", force_zip64=True) as stream:
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (n, *first.shape[1:])})
        for part in itertools.chain([first], parts):
            stream.write(np.ascontiguousarray(part).data)


def _manifest(path: Path) -> dict[str, Any]:
    """What a manifest says; nothing where there is none or it cannot be read."""
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(item: int) -> str:
    return f"{item:06d}.png"


def _image(value: np.ndarray, levels: int) -> Image.Image:
    """(C, H, W) levels as an image of 8 bits, or of 16 where there are more than 256 grey levels."""
    if levels > 256 and value.shape[0] == 1:
        return Image.fromarray((value[0].astype(np.float64) * 65535 / (levels - 1)).round().astype(np.uint16))
    scaled = (value.astype(np.float64) * 255 / (levels - 1)).round().astype(np.uint8)
    return Image.fromarray(scaled[0] if len(scaled) == 1 else np.moveaxis(scaled, 0, -1))
