"""A folder of images as a data set: every file looked at, every problem told at once."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from undiffuse.data.dataset import Dataset
from undiffuse.data.image import SUFFIXES, Prepare, decode
from undiffuse.data.problems import FIXES, BadFiles, Problem, Refused, refusal
from undiffuse.errors import ConfigError, DataError, ResourceError, printable

MAX_BYTES = 1 << 29
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass
class _Scan:
    """What a walk found: image files in the order of their names, and what was left aside."""

    files: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # names of the first level's sub-folders
    hidden: int = 0
    others: list[str] = field(default_factory=list)
    outside: int = 0


def load_folder(folder: str | Path, prepare: Prepare = Prepare()) -> Dataset:  # noqa: B008 (frozen)
    """All images under ``folder``, decoded once: values (N, C, H, W), sorted by path; sub-folders label them.

    Sub-folders of the first level are classes where there are at least two and every image is in one.
    Raises ConfigError (NOT_A_DIRECTORY); BadFiles with every file that cannot be taken; DataError for what
    is wrong with all together (NO_IMAGES, MIXED_SIZES, MIXED_CHANNELS, MIXED_DEPTH); ResourceError (MEMORY).
    """
    root = Path(folder)
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
    classes, labels, about = _classes(root, scan)
    values, levels, done = _decode_all(scan, prepare)
    notes = [f"{n} of {len(values)} images: {phrase}" for phrase, n in sorted(done.items())]
    if any("background" in phrase for phrase in done):
        notes.append(f"the background is {prepare.background}")
    notes = [*_left_aside(scan), *about, *notes]
    return Dataset(root.resolve().name, values, levels, labels, classes, tuple(notes))


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
                mode = entry.stat().st_mode
            except OSError as error:
                scan.problems.append(_problem(path, refusal(error)))
                continue
            if stat.S_ISDIR(mode):
                pending.insert(0 if entry.is_symlink() else len(pending), path)
                scan.folders += [entry.name] * (here == root)
            elif path.suffix.lower() not in SUFFIXES:
                scan.others.append(entry.name)
            elif not stat.S_ISREG(mode):
                scan.problems.append(Problem(path, "NOT_A_REGULAR_FILE", "is a pipe, a socket or a device"))
            else:
                scan.files.append(path)
                scan.outside += entry.is_symlink() and not os.path.realpath(path).startswith(inside)
    scan.files.sort(key=os.fsencode)
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


def _classes(root: Path, scan: _Scan) -> tuple[tuple[str, ...], np.ndarray | None, list[str]]:
    """Names, labels and notes; an empty first-level folder beside classes is added to the scan's problems."""
    parts = [path.relative_to(root).parts for path in scan.files]
    loose = sum(len(p) == 1 for p in parts)
    if not parts or loose:
        return (), None, [f"no labels: {loose} images lie outside sub-folders"] if loose < len(parts) else []
    names = sorted({p[0] for p in parts}, key=os.fsencode)
    broken = {problem.path.relative_to(root).parts[:1] for problem in scan.problems}
    empty = [name for name in scan.folders if name not in names and (name,) not in broken]
    scan.problems += [Problem(root / name, "EMPTY_CLASS", "holds no images, but its neighbours do") for name in empty]
    if len(names) == 1:
        return (), None, ["no labels: all images are in one sub-folder"]
    number = {name: label for label, name in enumerate(names)}
    counts = Counter(p[0] for p in parts)
    shown = ", ".join(f"{printable(name)} ({counts[name]})" for name in names[:5]) + ", ..." * (len(names) > 5)
    labels = np.array([number[p[0]] for p in parts], np.int64)
    return tuple(map(printable, names)), labels, [f"{len(names)} classes from sub-folders: {shown}"]


def _decode_all(scan: _Scan, prepare: Prepare) -> tuple[np.ndarray, int, Counter[str]]:
    """(N, C, H, W) values, levels and how often each thing was done; raises everything that is wrong."""
    values = np.empty(0)
    kinds: dict[tuple[tuple[int, ...], int], list[Path]] = {}
    problems, done = list(scan.problems), Counter[str]()
    for i, path in enumerate(scan.files):
        try:
            picture = decode(_read(path), path.suffix, prepare)
        except (Refused, OSError) as error:
            problems.append(_problem(path, refusal(error) if isinstance(error, OSError) else error))
            continue
        done.update(picture.did)
        kinds.setdefault((picture.pixels.shape, picture.levels), []).append(path)
        if problems or len(kinds) > 1:
            continue
        if i == 0:
            values = _empty((len(scan.files), *picture.pixels.shape), picture.pixels.dtype)
        values[i] = picture.pixels
    if problems:
        raise BadFiles(problems)
    if len(kinds) > 1:
        raise _mixed(kinds)
    return values, next(iter(kinds))[1], done


def _mixed(kinds: dict[tuple[tuple[int, ...], int], list[Path]]) -> DataError:
    """Why images that are fine one by one are no set: the first thing in which they differ, with examples."""
    aspects = {
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


def _read(path: Path) -> bytes:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise Refused("TOO_LARGE", f"{size:,} bytes are more than {MAX_BYTES:,}")
    return path.read_bytes()


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        return np.empty(shape, dtype)
    except MemoryError:
        need = f"{np.prod(shape, dtype=float) * dtype.itemsize / 1e9:.1f} GB do not fit into memory"
        raise ResourceError("MEMORY", "images", need, "Give a smaller size, or fewer images") from None


def _problem(path: Path, refused: Refused) -> Problem:
    return Problem(path, refused.code, refused.reason)
