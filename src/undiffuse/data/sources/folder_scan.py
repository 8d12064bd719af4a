"""The files below a folder: images in the order of their paths, and what is left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from undiffuse.data.image_formats import SUFFIXES
from undiffuse.data.source_report import FileStamp
from undiffuse.data.sources.folder_labels import LABELS_FILE
from undiffuse.errors import counted, printable
from undiffuse.runtime.file_errors import FileProblem, os_error
from undiffuse.runtime.own_output import is_marked_picture, is_own_folder, is_own_tensor_file

SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})


@dataclass
class FolderScan:
    """Files of a folder: images in the order of their paths, and counts of all others."""

    images: dict[Path, FileStamp] = field(default_factory=dict)
    problems: list[FileProblem] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # names of the sub-folders of the first level
    hidden: int = 0
    ignored: list[str] = field(default_factory=list)
    own_output: list[str] = field(default_factory=list)  # folders and pictures that this package wrote
    links_outside: int = 0
    has_labels_file: bool = False

    @property
    def notes(self) -> list[str]:
        """What was left out, counted, and how many links were followed."""
        notes = []
        if self.own_output:
            notes.append(f"{counted(len(self.own_output), 'output')} of undiffuse left out: {_listed(self.own_output)}")
        if self.ignored:
            notes.append(
                f"{counted(len(self.ignored), 'file')} ignored (no image file extension): {_listed(self.ignored)}"
            )
        if self.hidden:
            notes.append(f"{counted(self.hidden, 'hidden or system file')} ignored")
        if self.links_outside:
            notes.append(f"{counted(self.links_outside, 'link')} followed to files outside the folder")
        return notes


def scan_folder(root: Path) -> FolderScan:
    """Visit each folder once, identified by device and inode, and links to folders after folders.

    Output of this package below ``root`` is left out: run folders, sample folders, weights, and pictures that are no
    items. A sub-folder that contains nothing else is not listed. If ``root`` is such a folder, its own items are meant,
    without sub-folders: a run has none.
    """
    scan, visited, pending = FolderScan(), set(), [root]
    inside = os.path.realpath(root) + os.sep
    with_output: set[str] = set()  # sub-folders of the first level with output of this package, and with other files
    with_files: set[str] = set()
    while pending:
        folder = pending.pop()
        first = folder.relative_to(root).parts[:1]
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(folder))
        except OSError as error:
            scan.problems.append(_problem(folder, error))
            with_files.update(first)
            continue
        is_own = is_own_folder(folder, {entry.name for entry in entries})
        if folder != root and is_own:
            scan.own_output.append(folder.relative_to(root).as_posix())
            with_output.update(first)
            continue
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                scan.hidden += 1
                continue
            try:
                status = entry.stat()
            except OSError as error:
                scan.problems.append(_problem(path, error))
                with_files.update(first)
                continue
            if stat.S_ISDIR(status.st_mode) and is_own:
                scan.own_output.append(entry.name)
                continue
            if stat.S_ISDIR(status.st_mode):
                pending.insert(0 if entry.is_symlink() else len(pending), path)
                scan.folders += [entry.name] * (folder == root)
                continue
            if stat.S_ISREG(status.st_mode) and (is_marked_picture(path) or is_own_tensor_file(path)):
                scan.own_output.append(path.relative_to(root).as_posix())
                with_output.update(first)
                continue
            with_files.update(first)
            if not stat.S_ISREG(status.st_mode) and _is_read(path, root):
                scan.problems.append(FileProblem(path, "NOT_A_REGULAR_FILE", "is a pipe, a socket or a device"))
            elif folder == root and entry.name == LABELS_FILE:
                scan.has_labels_file = True
            elif path.suffix.lower() not in SUFFIXES:
                scan.ignored.append(entry.name)
            else:
                scan.images[path] = FileStamp.of(status)
                scan.links_outside += entry.is_symlink() and not os.path.realpath(path).startswith(inside)
    scan.images = {path: scan.images[path] for path in sorted(scan.images, key=os.fsencode)}
    scan.problems.sort(key=lambda problem: os.fsencode(problem.path))
    scan.folders = [name for name in scan.folders if name in with_files or name not in with_output]
    return scan


def _is_read(path: Path, root: Path) -> bool:
    """Whether a file of this name is opened: an image, or the table of labels."""
    return path.suffix.lower() in SUFFIXES or path == root / LABELS_FILE


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(printable, sorted(names)[:3])) + ", ..." * (len(names) > 3)


def _problem(path: Path, error: OSError) -> FileProblem:
    problem = os_error(error)
    return FileProblem(path, problem.code, problem.reason)
