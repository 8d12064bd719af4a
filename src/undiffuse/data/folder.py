"""A folder of images as a data set: every file looked at, every problem told at once."""

from __future__ import annotations

import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from undiffuse.data.dataset import Dataset
from undiffuse.data.image import SUFFIXES, Picture, Prepare, decode_all
from undiffuse.data.labels import TABLE, Labelled, by_folder, by_table, empty_classes
from undiffuse.data.memory import require
from undiffuse.data.problems import FIXES, BadFiles, Problem, Refused, refusal
from undiffuse.data.seen import Seen, Stamp, changed
from undiffuse.errors import ConfigError, DataError, printable

MAX_BYTES = 1 << 29
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})

Place = Callable[[tuple[int, ...], np.dtype], np.ndarray]
"""Makes room for an array of a shape and type, in memory or elsewhere."""

Kind = tuple[tuple[int, ...], int]
"""Shape and levels of a picture: one data set has one."""


@dataclass
class _Scan:
    """What a walk found: image files in the order of their names, and what was left aside."""

    files: dict[Path, Stamp] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # names of the first level's sub-folders
    hidden: int = 0
    others: list[str] = field(default_factory=list)
    outside: int = 0
    table: bool = False


def in_memory(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Room in memory. Raises ResourceError (MEMORY) where there is not so much."""
    fix = "Give a smaller size, or fewer images, or pack them first: undiffuse pack"
    require(math.prod(map(float, shape)) * dtype.itemsize, "images", fix)
    return np.empty(shape, dtype)


def load_folder(
    folder: str | Path,
    prepare: Prepare = Prepare(),  # noqa: B008 (frozen)
    on_bad: str = "stop",
    place: Place = in_memory,
) -> Dataset:
    """All images under ``folder``, decoded once: values (N, C, H, W), sorted by path, labelled.

    Labels are those of ``labels.csv`` (columns file and label) in the folder, else sub-folders of the first level
    are classes where there are at least two and every image is in one. With ``on_bad="skip"`` files that cannot be
    taken, or differ from most, are left out: ``Dataset.seen.skipped`` has each. ``place`` makes room for the values.
    Raises ConfigError (NOT_A_DIRECTORY, OPTION); BadFiles with every file that cannot be taken; DataError for what
    is wrong with all together (NO_IMAGES, MIXED_SIZES, MIXED_CHANNELS, MIXED_DEPTH, LABELS); ResourceError (MEMORY).
    """
    root = Path(folder)
    if on_bad not in ("stop", "skip"):
        raise ConfigError("OPTION", "on_bad", f"{on_bad!r} is unknown", "Give stop or skip")
    if not os.path.isdir(root):
        fix = "Give a folder of images, an array file or the name of a built-in set"
        raise ConfigError(
            "NOT_A_DIRECTORY", root, "is a file" if os.path.exists(root) else "there is no such file or folder", fix
        )
    scan = _scan(root)
    if not scan.files and not scan.problems:
        seen = _left_aside(scan) or ["it is empty"]
        raise DataError(
            "NO_IMAGES", root, f"no file in it is named as an image ({'; '.join(seen)})", FIXES["NO_IMAGES"]
        )
    if not scan.table:
        scan.problems += empty_classes(root, scan.files, scan.folders, [p.path for p in scan.problems])
    read = _read_all(scan, prepare, on_bad == "skip", place)
    classes, labels, about = _labels(root, scan, read)
    notes = [f"{n} of {len(read.values)} images: {phrase}" for phrase, n in sorted(read.done.items())]
    if any("background" in phrase for phrase in read.done):
        notes.append(f"the background is {prepare.background}")
    if read.problems:
        codes = ", ".join(f"{n} {code}" for code, n in Counter(p.code for p in read.problems).most_common())
        notes.append(f"{len(read.problems)} of {len(scan.files) + len(scan.problems)} files skipped: {codes}")
    notes = [*_left_aside(scan), *about, *notes]
    seen = Seen(read.formats, read.sizes, len(scan.others), scan.hidden, tuple(read.problems))
    names = tuple(path.relative_to(root).as_posix() for path in read.files)
    return Dataset(root.resolve().name, read.values, read.levels, labels, classes, tuple(notes), names=names, seen=seen)


def _scan(root: Path) -> _Scan:
    """Walk ``root`` once: every real folder once, by device and inode, and folders before links to folders."""
    scan, seen, pending = _Scan(), set(), [root]
    inside = os.path.realpath(root) + os.sep
    while pending:
        here = pending.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(here))
        except OSError as error:
            scan.problems.append(_problem(here, refusal(error)))
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                scan.hidden += 1
                continue
            try:
                status = entry.stat()
            except OSError as error:
                scan.problems.append(_problem(path, refusal(error)))
                continue
            if stat.S_ISDIR(status.st_mode):
                pending.insert(0 if entry.is_symlink() else len(pending), path)
                scan.folders += [entry.name] * (here == root)
            elif here == root and entry.name == TABLE:
                scan.table = True
            elif path.suffix.lower() not in SUFFIXES:
                scan.others.append(entry.name)
            elif not stat.S_ISREG(status.st_mode):
                scan.problems.append(Problem(path, "NOT_A_REGULAR_FILE", "is a pipe, a socket or a device"))
            else:
                scan.files[path] = Stamp.of(status)
                scan.outside += entry.is_symlink() and not os.path.realpath(path).startswith(inside)
    scan.files = {path: scan.files[path] for path in sorted(scan.files, key=os.fsencode)}
    scan.problems.sort(key=lambda problem: os.fsencode(problem.path))
    return scan


def _left_aside(scan: _Scan) -> list[str]:
    notes = []
    if scan.others:
        names = ", ".join(map(printable, sorted(scan.others)[:3]))
        notes.append(
            f"{len(scan.others)} files ignored (not named as images): {names}" + ", ..." * (len(scan.others) > 3)
        )
    if scan.hidden:
        notes.append(f"{scan.hidden} hidden or system files ignored")
    if scan.outside:
        notes.append(f"{scan.outside} links followed to files outside the folder")
    return notes


def _labels(root: Path, scan: _Scan, read: _Read) -> Labelled:
    """Names, labels of each picture, and notes."""
    if not scan.table:
        return by_folder(root, read.files)
    try:
        return by_table(root, read.files, [problem.path for problem in read.problems])
    except (Refused, OSError) as error:
        refused = refusal(error) if isinstance(error, OSError) else error
        raise refused.at(root / TABLE) from None


@dataclass
class _Read:
    """What decoding found: ``values`` (N, C, H, W) of one kind with the file of each, and what stood in the way."""

    problems: list[Problem]
    place: Place = in_memory
    values: np.ndarray = field(default_factory=lambda: np.empty((0, 0, 0, 0), np.uint8))
    files: list[Path] = field(default_factory=list)
    kinds: dict[Kind, list[Path]] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)

    @property
    def levels(self) -> int:
        return next(iter(self.kinds))[1]

    def add(self, path: Path, picture: Picture, expected: int) -> None:
        """Takes the next picture of about so many ``expected``; only counts it where it is of another kind."""
        kind = (picture.pixels.shape, picture.levels)
        self.kinds.setdefault(kind, []).append(path)
        if len(self.kinds) > 1:
            return
        self.done.update(picture.did)
        self.formats[picture.kind] += 1
        self.sizes["{} x {}".format(*picture.stored)] += 1
        at = len(self.files)
        if at == len(self.values):
            count = max(expected, 2 * at)
            grown = self.place((count, *kind[0]), picture.pixels.dtype)
            grown[:at] = self.values if at else 0
            self.values = grown
        self.values[at] = picture.pixels
        self.files.append(path)


def _read_all(scan: _Scan, prepare: Prepare, skip: bool, place: Place) -> _Read:
    """All pictures of one kind; raises everything that is wrong, or with ``skip`` keeps it in ``problems``."""

    def attempt(files: Sequence[Path], problems: list[Problem]) -> _Read:
        read = _Read(problems, place)
        for path in files:
            try:
                pictures = decode_all(_bytes(path, scan.files[path]), path.suffix, prepare)
            except (Refused, OSError) as error:
                problems.append(_problem(path, refusal(error) if isinstance(error, OSError) else error))
                continue
            if not problems or skip:
                for picture in pictures:
                    read.add(path, picture, len(files))
        return read

    read = attempt(list(scan.files), list(scan.problems))
    if skip and len(read.kinds) > 1:
        differing = mixed(read.kinds).problems
        others = {problem.path for problem in (*read.problems, *differing)}
        read = attempt([path for path in scan.files if path not in others], [*read.problems, *differing])
    if not read.kinds or (read.problems and not skip):
        raise BadFiles(read.problems)
    if len(read.kinds) > 1:
        raise mixed(read.kinds)
    read.values = read.values[: len(read.files)]
    return read


def mixed(kinds: dict[Kind, list[Path]]) -> BadFiles:
    """Why images that are fine one by one are no set: the first thing in which they differ, with examples."""
    aspects: dict[str, Callable[[tuple[int, ...], int], str]] = {
        "MIXED_SIZES": lambda shape, _: f"{shape[2]} x {shape[1]} pixels",
        "MIXED_CHANNELS": lambda shape, _: f"{shape[0]} channel{'s' * (shape[0] > 1)}",
        "MIXED_DEPTH": lambda _, levels: f"{levels} levels",
    }
    code = next(code for code, aspect in aspects.items() if len({aspect(*kind) for kind in kinds}) > 1)
    groups: dict[str, list[Path]] = {}
    for kind, paths in kinds.items():
        groups.setdefault(aspects[code](*kind), []).extend(paths)
    ranked = sorted(groups.items(), key=lambda group: -len(group[1]))
    most = ranked[0][0]
    problems = [Problem(p, code, f"{what}, where most have {most}") for what, paths in ranked[1:] for p in paths]
    examples = "; ".join(f"{what} in {len(paths)}, as {paths[0].name}" for what, paths in ranked[:3])
    return BadFiles(problems, examples)


def _bytes(path: Path, stamp: Stamp) -> bytes:
    """What the file holds, if it is the one that was listed."""
    if stamp.size > MAX_BYTES:
        raise Refused("TOO_LARGE", f"{stamp.size:,} bytes are more than {MAX_BYTES:,}")
    try:
        data, now = path.read_bytes(), Stamp.of(path.stat())
    except FileNotFoundError:
        raise changed() from None
    if now != stamp or len(data) != stamp.size:
        raise changed()
    return data


def _problem(path: Path, refused: Refused) -> Problem:
    return Problem(path, refused.code, refused.reason)
