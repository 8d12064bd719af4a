"""A folder of samples: an image file for each sample that is an image, a table, a grid, an array, a manifest.

It is written part by part, so that only one part is in memory at a time (all finished ones where others are added
to them) and an interrupted command resumes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from undiffuse.errors import CheckpointError, ConfigError, counted
from undiffuse.report.figures import image_grid, prompt_grid
from undiffuse.report.sample_image import image_name, sample_image, write_arrays, write_image
from undiffuse.runtime.atomic_file import atomic_file, file_digest, json_digest, write_csv
from undiffuse.runtime.folder_lock import lock_folder
from undiffuse.runtime.output_folder import check_output_folder, listed_files
from undiffuse.runtime.own_output import mark_options
from undiffuse.runtime.part_store import OTHER_JOB, PartStore
from undiffuse.runtime.side_files import read_record, write_record
from undiffuse.sampling.sampler import Sampler, describe_stages

GRID_ITEMS = 144
"""Samples in the grid, at most."""
PART_ITEMS = 1024
"""Samples in a part that is made of a finished array, at most."""
RECORD_KEYS = {"key", "first", "n", "finished", "files"}
"""What `SampleFolder` reads of its record, beside the plan."""


class SampleFolder:
    """Samples of one ``plan`` in ``folder``; the plan is plain data, all that a sample depends on beside its number.

    Until `finish` has written ``samples.npz``, the samples are in ``parts/``, a `PartStore`. The image files of a part
    are written before it. How the samples are divided into parts changes no result. Samples of ``item_shape`` with
    ``num_values`` values are images or not; vectors whose ``columns`` have names are also written to ``samples.csv``.
    Sample i was drawn with the (i mod K)-th of the K ``labels``, a number of ``classes``, or −1 without a class.

    ``manifest.json`` is the record of the files: each name with the sha256 of its content, or with null until `finish`.
    It is written first, and no other file is ever replaced or removed.
    """

    def __init__(
        self,
        folder: Path,
        plan: dict[str, Any],
        item_shape: Sequence[int],
        num_values: int | None,
        columns: Sequence[str] = (),
        more: Sequence[str] = (),
        labels: Sequence[int] = (),
        classes: Sequence[str] = (),
    ) -> None:
        self.folder, self.plan, self.num_values = folder, json.loads(json.dumps(plan)), num_values
        self.columns, self.more, self.key, self.finished = tuple(columns), tuple(more), json_digest(self.plan), False
        self.labels, self.classes = np.array(labels, int), list(classes)
        self.is_image = len(item_shape) == 3 and item_shape[0] in (1, 3, 4) and num_values is not None
        self.array, self.manifest = folder / "samples.npz", folder / "manifest.json"
        self.parts, self.table, self.grid = folder / "parts", folder / "samples.csv", folder / "grid.png"
        self.store = PartStore(self.parts, "samples", self.key, r"\d{9,}-\d{9,}")

    @contextmanager
    def open(self, items: range, log: Callable[[str], None] = print) -> Iterator[list[range]]:
        """Lock the folder, and give the stretches of ``items`` that are to be added, before `finish`, in the block.

        There are none if `finished` is true: then the folder has these samples, perhaps among others, and every file is
        as it was written. Files that are missing or were changed are made again, here or by adding their samples;
        samples of another plan and damaged parts are removed. ``log`` receives what is reused, made again or removed.
        Raises `ConfigError` if the folder holds other files than ours, and `ResourceError` if another process writes
        into it.
        """
        names = self._names(items)
        self._own_record(names)
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock_folder(self.folder, "writing samples into"):
            record = self._own_record(names)
            if record is not None:
                record = self._reuse(record, items, log)
            if not self.finished:
                kept = {} if record is None else record["files"]
                self._write_manifest(items, dict.fromkeys([*kept, *names]))
                self.parts.mkdir(exist_ok=True)
                self.store.check(log)
                if count := len(items) - sum(map(len, self.missing_items(items))):
                    log(f"resuming: {counted(count, 'sample')} in {self.parts}")
            yield [] if self.finished else self.missing_items(items)

    def missing_items(self, items: range) -> list[range]:
        """The stretches of ``items`` that are in no part."""
        gaps, start = [], items.start
        for part, _ in self._parts():
            gaps.append(range(start, min(part.start, items.stop)))
            start = max(start, part.stop)
        return [gap for gap in [*gaps, range(start, items.stop)] if gap]

    def add(self, first: int, values: np.ndarray) -> None:
        """Write ``values`` (n, ...), the samples from number ``first`` on, as a part, and the image files."""
        self._write_part(first, values, [self._write_picture(item, value) for item, value in enumerate(values, first)])

    def _write_part(self, first: int, values: np.ndarray, pictures: list[str | None]) -> None:
        name, tensors = f"{first:09d}-{first + len(values) - 1:09d}", {"x": torch.from_numpy(values)}
        self.store.write(name, tensors, {"pictures": json.dumps(pictures if self.is_image else None)})

    @contextmanager
    def adding_in_background(self) -> Iterator[Callable[[int, np.ndarray], None]]:
        """A block with an `add` that returns while it writes, so that the next part can be drawn meanwhile.

        It waits for the part before. Its errors are raised by the next call, or at the end of the block; a block that
        ends by an error of its own waits for the part too.
        """
        pending: list[Future[None]] = []

        def wait() -> None:
            while pending:
                pending.pop().result()

        def add(first: int, values: np.ndarray) -> None:
            wait()
            pending.append(writer.submit(self.add, first, values))

        with ThreadPoolExecutor(1) as writer:
            yield add
            wait()

    def finish(
        self, items: range, facts: Mapping[str, Any] | None = None, more: Mapping[str, Image.Image] | None = None
    ) -> Path | None:
        """Write the array, the grid of the first `GRID_ITEMS` samples, ``more``, and the manifest with ``facts``.

        Returns the path of the grid; None where matplotlib would be needed and is missing. Raises `CheckpointError`
        where a part is missing, damaged, or of another job, or where another job has taken the folder.
        """
        record = read_record(self.manifest)
        if record is None or record.get("key") != self.key:
            cause = "another job has written into this folder since this one began"
            raise CheckpointError(OTHER_JOB, self.folder, cause, "Run the same command again with another --out")
        if missing := self.missing_items(items):
            cause = f"the samples {missing[0].start} to {missing[0][-1]} are missing"
            raise CheckpointError("PARTS", self.parts, cause, "Run the same command again")
        files: dict[str, str | None] = {}
        with atomic_file(self.array) as file:
            write_arrays(file, self._read(items, files), len(items), self._labels(items))
        files[self.array.name] = file_digest(self.array)
        if self.columns:
            self._write_table(self._read(items), files)
        self._write_grid(np.concatenate(list(self._read(items[:GRID_ITEMS]))), files)
        for name, image in (more or {}).items():
            files[name] = write_image(self.folder / name, image, **mark_options(".png"))
        self._remove(record["files"].keys() - files)
        named = {"labels": self._label_names, "classes": self.classes} if len(self.labels) else {}
        self._write_manifest(items, files, {**named, **(facts or {})})
        self._remove_parts(items)
        return self.grid if self.grid.name in files else None

    def _names(self, items: Iterable[int]) -> set[str]:
        """The names of all files that may be written for ``items``."""
        pictures = map(image_name, items) if self.is_image else ()
        table = [self.table.name] if self.columns else []
        return {*pictures, *table, *self.more, self.array.name, self.grid.name}

    def _own_record(self, names: set[str]) -> dict[str, Any] | None:
        """The record of the folder, None if there is none. Raises `ConfigError` if ``names`` are not ours to write."""
        record = read_record(self.manifest)
        if record is not None and not (record.keys() >= RECORD_KEYS and isinstance(record["files"], dict)):
            record = None
        ours = listed_files(record)
        check_output_folder(self.folder, self.manifest, ours and {*ours, self.parts.name}, {*names, self.parts.name})
        return record

    def _reuse(self, record: dict[str, Any], items: range, log: Callable[[str], None]) -> dict[str, Any] | None:
        """The ``record`` if its samples are of the same plan, None if they were removed; sets `finished`."""
        if record["key"] != self.key:
            changed = [name for name, value in self.plan.items() if record.get(name) != value]
            log(f"starting over: the samples in {self.folder} differ in {', '.join(changed) or 'their plan'}")
        elif not record["finished"]:
            return record
        else:
            done, files = range(record["first"], record["first"] + record["n"]), record["files"]
            harmed = sorted(name for name, sha256 in files.items() if _sha256(self.folder / name) != sha256)
            if self.array.name not in harmed:
                self.finished = done.start <= items.start and items.stop <= done.stop
                if not self.finished:
                    log(f"kept: the {counted(len(done), 'sample')} of {self.folder}")
                    self._array_to_part(done, files)
                    return record
                if harmed:
                    self._make_again(record, done, harmed)
                    log(f"made again, as they were missing or changed: {', '.join(harmed[:3])}{_more(harmed[3:])}")
                self._remove_parts(done)
                return record
            log(f"starting over: {self.array} is missing or changed")
        self._remove(record["files"])
        if record["key"] != self.key:
            self.store.remove()
        return None

    def _array_to_part(self, done: range, files: Mapping[str, str | None]) -> None:
        """Write the samples of the array, ``done``, as a part, so that others can be added to them."""
        self.parts.mkdir(exist_ok=True)
        values = self._read_array()
        for start in range(0, len(done), PART_ITEMS):
            part = done[start : start + PART_ITEMS]
            self._write_part(part.start, values[start:][: len(part)], [files.get(image_name(item)) for item in part])

    def _read_array(self) -> np.ndarray:
        with np.load(self.array, allow_pickle=False) as file:
            return file["x"]

    def _make_again(self, record: dict[str, Any], items: range, harmed: Sequence[str]) -> None:
        """Write the ``harmed`` files of a finished folder from its array."""
        values, files = self._read_array(), record["files"]
        for item, value in zip(items, values, strict=True):
            if image_name(item) in harmed:
                files[image_name(item)] = self._write_picture(item, value)
        if self.table.name in harmed:
            self._write_table([values], files)
        if self.grid.name in harmed:
            self._write_grid(values[:GRID_ITEMS], files)
        write_record(self.manifest, record)

    def _write_manifest(
        self, items: range, files: Mapping[str, str | None], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Write the record: the plan, ``facts`` if the samples are finished, and the ``files``."""
        range_of_items = {"first": items.start, "n": len(items)}
        done = {"key": self.key, "finished": all(files.values())}
        write_record(self.manifest, {**self.plan, **(facts or {}), **range_of_items, **done, "files": dict(files)})

    def _write_picture(self, item: int, value: np.ndarray) -> str | None:
        """The sha256 of the image file of a sample; None if it is no image."""
        if not self.is_image:
            return None
        assert self.num_values is not None
        return write_image(self.folder / image_name(item), sample_image(value, self.num_values))

    def _write_table(self, parts: Iterable[np.ndarray], files: dict[str, str | None]) -> None:
        rows = (row for part in parts for row in part.astype(str).tolist())
        write_csv(self.table, itertools.chain([self.columns], rows))
        files[self.table.name] = file_digest(self.table)

    def _write_grid(self, values: np.ndarray, files: dict[str, str | None]) -> None:
        try:
            names = self.plan.get("prompt") or self._label_names
            if self.is_image and 1 < len(names) <= len(values):
                image = prompt_grid(values, names, self.num_values)
            else:
                image = image_grid(values, self.num_values, names=self.columns)
        except ConfigError:  # there is no matplotlib
            files.pop(self.grid.name, None)
        else:
            files[self.grid.name] = write_image(self.grid, image, **mark_options(".png"))

    @property
    def _label_names(self) -> list[str]:
        return ["none" if label < 0 else self.classes[label] for label in self.labels]

    def _labels(self, items: range) -> np.ndarray | None:
        """The class of each of ``items``; None if one has none, or if classes are left out, which readers refuse."""
        if not len(self.labels):
            return None
        labels = self.labels[np.arange(items.start, items.stop) % len(self.labels)]
        used = np.unique(labels)
        return labels.astype(np.min_scalar_type(used[-1])) if np.array_equal(used, np.arange(len(used))) else None

    def _remove(self, names: Iterable[str]) -> None:
        """Remove files that the record lists; a name in it that we give no file is passed over."""
        for name in names:
            if re.fullmatch(r"\d{6,}\.png|[a-z]+\.(png|csv|npz)", name):
                (self.folder / name).unlink(missing_ok=True)

    def _remove_parts(self, items: range) -> None:
        """Remove the parts that have no other samples than ``items``; others are of a longer job, which can go on."""
        self.store.remove([name for part, name in self._parts() if part.stop > items.stop or part.start < items.start])

    def _parts(self) -> list[tuple[range, str]]:
        """The samples and the name of each part, in the order of the samples."""
        return sorted(((_items_of(name), name) for name in self.store.names()), key=lambda part: part[0].start)

    def _read(self, items: range, files: dict[str, str | None] | None = None) -> Iterator[np.ndarray]:
        """The values of ``items``, one part at a time; the image files are checked and noted in ``files`` if given."""
        start = items.start
        for part, name in self._parts():
            inside = range(max(start, part.start), min(items.stop, part.stop))
            start = max(start, part.stop)
            if inside:
                tensors, metadata = self.store.read(name)
                values = tensors["x"][inside.start - part.start : inside.stop - part.start].numpy()
                if files is not None and self.is_image:
                    digests = dict(zip(part, json.loads(metadata["pictures"]), strict=True))
                    for item, value in zip(inside, values, strict=True):
                        digest = digests[item]
                        same = _sha256(self.folder / image_name(item)) == digest
                        files[image_name(item)] = digest if same else self._write_picture(item, value)
                yield values


def write_samples(
    folder: Path, values: np.ndarray, num_values: int | None, plan: dict[str, Any], first: int = 0
) -> Path | None:
    """Write ``values`` (N, ...), the samples from number ``first`` on, to ``folder``; the path of the grid, if any."""
    contents = hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()
    samples = SampleFolder(folder, {**plan, "values": contents}, values.shape[1:], num_values)
    items = range(first, first + len(values))
    with samples.open(items, lambda message: None) as missing:
        for gap in missing:
            samples.add(gap.start, values[gap.start - first : gap.stop - first])
        if not samples.finished:
            return samples.finish(items)
    return samples.grid if samples.grid.is_file() else None


def sampler_in_words(manifest: Mapping[str, Any]) -> str | None:
    """How the samples of a folder were drawn, by its ``manifest``; None if that is not known."""
    try:
        stages = [Sampler.from_dict(plain) for plain in manifest.get("stage_samplers") or [manifest["sampler"]]]
        given = [f"{name} {', '.join(map(str, manifest[name]))}" for name in ("label", "prompt") if manifest.get(name)]
        given += [f"guidance {stages[0].guidance:g}"] * (stages[0].guidance != 1)
        return ", ".join([describe_stages(stages), *given, f"seed {manifest['seed']}"])
    except (ConfigError, LookupError, TypeError):
        return None


def _sha256(path: Path) -> str | None:
    """The sha256 of a file; None if it is missing or cannot be read."""
    try:
        return file_digest(path)
    except OSError:
        return None


def _more(names: Sequence[str]) -> str:
    return f" and {len(names)} more" if names else ""


def _items_of(name: str) -> range:
    """The samples of the part called "first-last"."""
    first, last = name.split("-")
    return range(int(first), int(last) + 1)
