"""A folder of image files, each decoded once; all problems are collected before one is raised."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from undiffuse.data.dataset import Dataset
from undiffuse.data.decoding_threads import map_in_order
from undiffuse.data.image_decoding import DecodedImage, ImageOptions, decode_frames
from undiffuse.data.source_report import FileStamp, SourceReport, changed_error
from undiffuse.data.sources.captions import LABELS_LEFT_OUT, TABLES, Captions, captions_note, captions_of_folder
from undiffuse.data.sources.folder_labels import (
    LABELS_FILE,
    PARTS,
    Labels,
    check_parts,
    empty_classes,
    labels_from_folders,
    labels_from_table,
    part_of,
    parts_note,
)
from undiffuse.data.sources.folder_scan import FolderScan, scan_folder
from undiffuse.errors import ConfigError, DataError, counted
from undiffuse.runtime.file_errors import FIXES, BadFilesError, FileError, FileProblem, file_errors_at, os_error
from undiffuse.runtime.machine import require_memory

MAX_FILE_BYTES = 1 << 29

Allocator = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""Returns an array of a shape and dtype, in memory or on disk."""

ImageKind = tuple[tuple[int, ...], int]
"""Shape and num_values of an image; all images of a data set must agree in it."""


def sniff(source: str | Path) -> bool:
    """Whether ``source`` is a folder."""
    return os.path.isdir(source)


def allocate_in_memory(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array in memory; raises `ResourceError` (MEMORY) if there is too little."""
    fix = "Give a smaller size, or fewer images, or pack them first: undiffuse pack"
    require_memory(math.prod(map(float, shape)) * dtype.itemsize, "images", fix)
    return np.empty(shape, dtype)


def load(
    source: str | Path,
    *,
    on_bad: str = "stop",
    split_folders: bool = False,
    captions: bool = False,
    with_labels: bool = False,
    allocate: Allocator = allocate_in_memory,
    **image_options: Any,
) -> Dataset:
    """All images in a folder and its sub-folders: values (N, C, H, W), in the order of their paths, with labels.

    Labels come from ``labels.csv`` (columns file and label) in the folder, otherwise from the sub-folders of the first
    level, if there are at least two and each image is in one. ``image_options`` are those of `ImageOptions`. With
    ``on_bad="skip"`` files that cannot be used, or differ from most, are listed in ``Dataset.report.skipped``. With
    ``split_folders`` the folders called train, val and test are the parts of the data, in this order, and the
    sub-folders in them the classes. With ``captions`` those beside the images (`captions_of_folder`) take the place of
    labels, unless ``with_labels`` keeps both.

    Raises `ConfigError` (OPTION); `BadFilesError` with every file that cannot be used; `DataError` for
    problems of the whole (NO_IMAGES, MIXED_SIZES, MIXED_CHANNELS, MIXED_DEPTH, LABELS); `ResourceError` (MEMORY).
    """
    root, options = Path(source), ImageOptions(**image_options)
    check_on_bad(on_bad)
    scan = scan_folder(root)
    if not scan.images and not scan.problems:
        contents = "; ".join(scan.notes) or "it is empty"
        raise DataError("NO_IMAGES", root, f"no file has the extension of an image ({contents})", FIXES["NO_IMAGES"])
    if split_folders:
        check_parts(root, scan.images)
        order = list(PARTS)
        scan.images = dict(sorted(scan.images.items(), key=lambda image: order.index(part_of(root, image[0]) or "")))
    texts, read_from = _read_captions(root, scan) if captions else ({}, "")
    labelled = with_labels or not captions
    if not scan.has_labels_file and labelled:
        scan.problems += empty_classes(root, scan.images, scan.folders, [p.path for p in scan.problems])
    images = _read_all(root, scan, options, on_bad == "skip", allocate)
    classes, labels, label_notes = _labels(root, scan, images, split_folders) if labelled else ((), None, [])
    of_images = tuple(texts[path] for path in images.paths if captions)
    if captions:
        label_notes.append(captions_note(of_images, read_from))
        if not labelled and (unused := _unused_labels(root, scan, images, split_folders)):
            label_notes.append(f"{unused} {LABELS_LEFT_OUT}")
    elif found := sorted({name for name in scan.ignored if name in TABLES}):
        label_notes.append(f"{' and '.join(found)} ignored; captions=True reads captions from it")
    notes = [*scan.notes, *label_notes, *([] if split_folders else parts_note(root, images.paths))]
    counts = Counter(part_of(root, path) for path in images.paths if split_folders)
    if split_folders and not counts["train"]:
        cause = "no image in the folder of training images can be used"
        raise DataError("NO_IMAGES", root, cause, FIXES["NO_IMAGES"])
    if split_folders:
        notes.append(f"parts from folders: {', '.join(f'{part} ({counts[part]})' for part in PARTS if counts[part])}")
    notes += image_notes(
        images.changes, len(images.values), images.problems, len(scan.images) + len(scan.problems), "files"
    )
    if any("background" in change for change in images.changes):
        notes.append(f"the background is {options.background}")
    return Dataset(
        root.resolve().name,
        images.values,
        images.num_values,
        labels,
        classes,
        tuple(notes),
        captions=of_images,
        names=tuple(path.relative_to(root).as_posix() for path in images.paths),
        report=SourceReport(images.formats, images.sizes, len(scan.ignored), scan.hidden, tuple(images.problems)),
        validation_from=counts["train"] if counts["validation"] else None,
        test_from=len(images.paths) - counts["test"] if counts["test"] else None,
    )


def _read_captions(root: Path, scan: FolderScan) -> tuple[dict[Path, Captions], str]:
    """The captions of each image, and the files with them; images without any become problems of ``scan``."""
    captions, problems, read = captions_of_folder(root, scan.images)
    scan.images = {path: stamp for path, stamp in scan.images.items() if path in captions}
    scan.problems += problems
    scan.ignored = list((Counter(scan.ignored) - Counter(path.name for path in read)).elements())
    tables = sorted({path.name for path in read if path.name in TABLES})
    return captions, " and ".join(tables) or "files beside the images"


def check_on_bad(on_bad: str) -> None:
    if on_bad not in ("stop", "skip"):
        raise ConfigError("OPTION", "on_bad", f"{on_bad!r} is unknown", "Give stop or skip")


def image_notes(
    changes: Mapping[str, int], count: int, problems: Sequence[FileProblem], total: int, kind: str
) -> list[str]:
    """How many of the ``count`` images were changed, by change, and how many of ``total`` files were skipped, by code.

    ``kind`` is the plural noun for these files.
    """
    notes = [f"{n} of {count} images: {change}" for change, n in sorted(changes.items())]
    if problems:
        codes = ", ".join(f"{n} {code}" for code, n in Counter(p.code for p in problems).most_common())
        fix = "; crop=True keeps those that are not square" if "ASPECT" in codes else ""
        notes.append(f"{len(problems)} of {total} {kind} skipped: {codes}{fix}")
    return notes


def _labels(root: Path, scan: FolderScan, images: _Images, in_parts: bool) -> Labels:
    """Class names, the label of each image, and notes."""
    if not scan.has_labels_file:
        return labels_from_folders(root, images.paths, in_parts)
    with file_errors_at(root / LABELS_FILE):
        return labels_from_table(root, images.paths, [problem.path for problem in images.problems])


def _unused_labels(root: Path, scan: FolderScan, images: _Images, in_parts: bool) -> str:
    """What the labels would come from; empty if there are none."""
    classes = () if scan.has_labels_file else labels_from_folders(root, images.paths, in_parts)[0]
    return LABELS_FILE if scan.has_labels_file else f"labels of {counted(len(classes), 'sub-folder')}" * bool(classes)


@dataclass
class _Images:
    """Decoded images of one kind in one array, and what is counted about them."""

    problems: list[FileProblem]
    allocate: Allocator = allocate_in_memory
    values: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0, 0), np.uint8))
    paths: list[Path] = field(default_factory=list)
    kinds: dict[ImageKind, list[Path]] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)

    @property
    def num_values(self) -> int:
        return next(iter(self.kinds))[1]

    def add(self, path: Path, image: DecodedImage, expected: int) -> None:
        """Append an image, of about ``expected`` in total; once there are two kinds, only count it."""
        kind = (image.pixels.shape, image.num_values)
        self.kinds.setdefault(kind, []).append(path)
        if len(self.kinds) > 1:
            return
        self.changes.update(image.changes)
        self.formats[image.format] += 1
        self.sizes["{} x {}".format(*image.size_on_disk)] += 1
        count = len(self.paths)
        if count == len(self.values):
            grown = self.allocate((max(expected, 2 * count), *kind[0]), image.pixels.dtype)
            grown[:count] = self.values if count else 0
            self.values = grown
        self.values[count] = image.pixels
        self.paths.append(path)


def _read_all(root: Path, scan: FolderScan, options: ImageOptions, skip: bool, allocate: Allocator) -> _Images:
    """All images of one kind. Raises every problem at once, or with ``skip`` keeps them in ``problems``."""

    def attempt(paths: Sequence[Path], problems: list[FileProblem], options: ImageOptions = options) -> _Images:
        images = _Images(problems, allocate)

        def decode(path: Path) -> list[DecodedImage] | FileError:
            try:
                return decode_frames(_bytes(path, scan.images[path]), path.suffix, options)
            except (FileError, OSError) as error:
                return os_error(error) if isinstance(error, OSError) else error

        with closing(map_in_order(decode, paths, lambda path: scan.images[path].size)) as results:
            for path, frames in zip(paths, results, strict=True):
                if isinstance(frames, FileError):
                    problems.append(FileProblem(path, frames.code, frames.reason))
                elif not problems or skip:
                    for frame in frames:
                        images.add(path, frame, len(paths))
        return images

    images = attempt(list(scan.images), list(scan.problems))
    while skip and len(images.kinds) > 1:  # sizes, then channels, then depths
        mixed = mixed_kinds_error(images.kinds, root)
        if mixed.of_whole:
            raise mixed
        differing = mixed.problems
        excluded = {problem.path for problem in (*images.problems, *differing)}
        images = attempt([path for path in scan.images if path not in excluded], [*images.problems, *differing])
    if not images.kinds or (images.problems and not skip):
        remedy: dict[str, Any] = {}
        if {problem.code for problem in images.problems} == {"ASPECT"}:
            kinds = attempt(list(scan.images), [], replace(options, crop=True)).kinds
            remedy = {"crop": True} | _remedy([shape for shape, _ in kinds], {num_values for _, num_values in kinds})
        skippable = len(images.problems) < len(scan.images) + len(scan.problems)
        raise BadFilesError(images.problems, remedy=remedy, skippable=skippable)
    if len(images.kinds) > 1:
        raise mixed_kinds_error(images.kinds, root)
    images.values = images.values[: len(images.paths)]
    return images


def mixed_kinds_error(kinds: dict[ImageKind, list[Path]], where: Path) -> BadFilesError:
    """The error for images of ``where`` that differ in size, else in channels, else in depth.

    If more than half of them agree, ``problems`` are the others, otherwise the whole. ``remedy`` makes them equal.
    """
    aspects: dict[str, Callable[[tuple[int, ...], int], str]] = {
        "MIXED_SIZES": lambda shape, _: f"{shape[2]} x {shape[1]} pixels",
        "MIXED_CHANNELS": lambda shape, _: counted(shape[0], "channel"),
        "MIXED_DEPTH": lambda _, num_values: f"{num_values} values",
    }
    code = next(code for code, aspect in aspects.items() if len({aspect(*kind) for kind in kinds}) > 1)
    groups: dict[str, list[Path]] = {}
    for kind, paths in kinds.items():
        groups.setdefault(aspects[code](*kind), []).extend(paths)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    most, total = ranked[0][0], sum(map(len, groups.values()))
    shapes = [shape for (shape, _), paths in kinds.items() for _ in paths]
    remedy = _remedy(shapes, {num_values for _, num_values in kinds})
    if 2 * len(ranked[0][1]) > total:
        problems = [
            FileProblem(p, code, f"{what}, where most have {most}") for what, paths in ranked[1:] for p in paths
        ]
        examples = "; ".join(f"{what} in {len(paths)}, such as {paths[0].name}" for what, paths in ranked[:3])
        return BadFilesError(problems, examples, remedy)
    if code == "MIXED_SIZES":
        small, *_, large = sorted((shape[1:] for shape, _ in kinds), key=math.prod)
        names = f"{len(groups):,} sizes, from {small[1]} x {small[0]} to {large[1]} x {large[0]} pixels"
    else:
        names = " and ".join(f"{what} in {len(paths):,}" for what, paths in ranked)
    return BadFilesError([FileProblem(where, code, f"{total:,} images have {names}")], None, remedy, of_whole=True)


DEFAULT_SIDES = (64, 32, 16, 8)
"""Sides in pixels that are proposed for images of many sizes: the largest one for which few images are too small."""
FEW = 0.02
"""The share of images that may be too small for a proposed side: one narrow image must not decide for all others."""


def _remedy(shapes: Sequence[tuple[int, ...]], num_values: Collection[int]) -> dict[str, Any]:
    """Options that give images of these shapes (C, H, W) and numbers of values one kind; empty if none do."""
    if len(set(num_values) - {2}) > 1:
        return {}
    remedy: dict[str, Any] = {}
    if len({shape[1:] for shape in shapes}) > 1:
        sides = sorted(min(shape[1:]) for shape in shapes)
        side = sides[int(FEW * len(sides))]
        remedy = {"size": next((s for s in DEFAULT_SIDES if s <= side), side), "crop": True}
        if sides[0] < remedy["size"]:
            remedy["on_bad"] = "skip"
    channels = {shape[0] for shape in shapes}
    if len(channels) > 1 or (len(num_values) > 1 and not remedy):
        remedy["channels"] = max(channels)
    return remedy


def _bytes(path: Path, stamp: FileStamp) -> bytes:
    """The content of a file, if it still has this ``stamp``."""
    if stamp.size > MAX_FILE_BYTES:
        raise FileError("TOO_LARGE", f"{stamp.size:,} bytes are more than {MAX_FILE_BYTES:,}")
    try:
        with path.open("rb", buffering=0) as file:
            data, now = file.read(), FileStamp.of(os.fstat(file.fileno()))
    except FileNotFoundError:
        raise changed_error() from None
    if now != stamp or len(data) != stamp.size:
        raise changed_error()
    return data
