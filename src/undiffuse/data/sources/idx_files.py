"""Files in MNIST's idx format, compressed or not: one file of images, or a folder with training and test files."""

from __future__ import annotations

import gzip
import math
import os
import re
import stat
import zlib
from pathlib import Path
from typing import IO, cast

import numpy as np

from undiffuse.data.dataset import Dataset
from undiffuse.data.from_array import ValueRange, build_dataset, check_options
from undiffuse.errors import DataError
from undiffuse.runtime.file_errors import FileError, file_errors_at
from undiffuse.runtime.machine import require_memory

NAME = re.compile(r"(.*)[-._]idx\d(-\w+)?(\.gz)?", re.IGNORECASE)
IMAGES, TEST = re.compile(r"images|imgs", re.IGNORECASE), re.compile(r"t10k|test", re.IGNORECASE)
DTYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""Types of values by the third byte of a file."""
MAX_RANK, MAX_RATIO = 8, 1100
"""Dimensions of an array, and bytes into which gzip can unpack one byte."""


def sniff(source: str | Path) -> bool:
    """Whether ``source`` is a file with a name such as train-images-idx3-ubyte.gz, or a folder that contains images."""
    path = Path(source)
    if path.is_dir():
        return os.access(path, os.R_OK) and bool(_image_files(path))  # the folder of images reports one without access
    return bool(NAME.fullmatch(path.name)) and os.path.lexists(path)


def load(
    source: str | Path,
    *,
    layout: str | None = None,
    num_values: int | None = None,
    value_range: ValueRange | None = None,
) -> Dataset:
    """The array in an idx file, (N, H, W) as grey images, with labels from the file of labels beside it.

    A folder gives its file of training images and, as official test part, the one with t10k or test in its name.
    Options as in `from_array`. Raises `DataError`, also for a folder of several data sets (AMBIGUOUS).
    """
    check_options(layout, num_values, value_range)
    path = Path(source)
    images = _parts(path) if path.is_dir() else [path]
    values = [read_idx(image) for image in images]
    labels, notes = _labels(path, images)
    with file_errors_at(path):
        if len({part.shape[1:] for part in values}) > 1 or len({part.dtype for part in values}) > 1:
            shapes = " and ".join(f"{part.dtype} {part.shape}" for part in values)
            raise FileError("SHAPE", f"its files contain {shapes}", "Name one file")
        joined = np.concatenate(values) if len(values) > 1 else values[0]
        layout = "NHW" if layout is None and joined.ndim == 3 else layout
        name = path.name if path.is_dir() else _stem(path)
        data = build_dataset(name, joined, {}, layout, num_values, notes, value_range)
        classes = () if labels is None else np.unique(labels)
        if labels is not None and len(labels) != len(data):
            raise FileError("LABELS", f"{len(labels):,} labels for {len(data):,} items", "Give one label per item")
    return Dataset(
        data.name,
        data.values,
        data.num_values,
        None if labels is None else np.searchsorted(classes, labels).astype(np.int64),
        tuple(map(str, classes)),
        data.notes,
        test_from=len(values[0]) if len(values) > 1 else None,
        value_range=value_range,
    )


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file. Raises `DataError`."""
    return parse_idx(read_content(path))


def parse_idx(content: bytes) -> np.ndarray:
    """The array in the decompressed ``content`` of an idx file, whose header was checked."""
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, 4).tolist()
    return np.frombuffer(content, DTYPES[content[2]], offset=4 + 4 * rank).reshape(shape)


def read_content(path: Path) -> bytes:
    """The decompressed bytes of an idx file: two zeros, type, rank, big-endian sizes, values [MNIST].

    Raises `DataError` if they are not an idx file of exactly that size, before memory is allocated for the values.
    """
    with file_errors_at(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileError("NOT_A_REGULAR_FILE", "is a folder, a pipe, a socket or a device")
        with path.open("rb") as file:
            is_compressed = file.read(2) == b"\x1f\x8b"
        try:
            with gzip.open(path) if is_compressed else path.open("rb") as stream:
                return _content(cast(IO[bytes], stream), status.st_size, is_compressed)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FileError("CORRUPT", f"cannot be unpacked ({error})") from error


def _content(stream: IO[bytes], size: int, is_compressed: bool) -> bytes:
    head = stream.read(4)
    if not head:
        raise FileError("EMPTY_FILE", "the file is empty")
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in DTYPES or not 1 <= head[3] <= MAX_RANK:
        raise FileError("BAD_HEADER", "does not begin with an idx header")
    head += stream.read(4 * head[3])
    if len(head) < 4 + 4 * head[3]:
        raise FileError("TRUNCATED", "its idx header ends early")
    shape = np.frombuffer(head, ">u4", head[3], 4).tolist()
    expected = math.prod(shape) * np.dtype(DTYPES[head[2]]).itemsize
    most = size * MAX_RATIO if is_compressed else size - len(head)
    cause = f"its header promises {expected:,} bytes for the shape {tuple(shape)}"
    if expected > most:
        raise FileError("TRUNCATED", f"{cause}, more than there can be")
    require_memory(expected, "idx file")
    values = stream.read(expected)
    if len(values) < expected:
        raise FileError("TRUNCATED", f"{cause}, {len(values):,} are there")
    if stream.read(1):
        raise FileError("SIZE_MISMATCH", f"{cause}, more are there")
    return head + values


def _stem(path: Path) -> str:
    match = NAME.fullmatch(path.name)
    return match[1] if match else path.name


def _image_files(folder: Path) -> dict[str, Path]:
    """The files of images in a folder by their stems; of a file and its compressed copy the file itself."""
    paths = sorted(folder.iterdir(), key=lambda path: (not path.name.lower().endswith(".gz"), os.fsencode(path)))
    named = [path for path in paths if NAME.fullmatch(path.name) and IMAGES.search(path.name) and not path.is_dir()]
    return {_stem(path): path for path in named}


def _parts(folder: Path) -> list[Path]:
    """The file of training images, and that of test images if there is one."""
    files = _image_files(folder)
    tests = [path for stem, path in files.items() if TEST.search(stem)]
    others = [path for path in files.values() if path not in tests]
    if len(tests) > 1 or len(others) > 1:
        cause = f"contains several data sets ({', '.join(sorted(files))})"
        raise DataError("AMBIGUOUS", folder, cause, "Name one file of images")
    return [*others, *tests]


def _labels(source: Path, images: list[Path]) -> tuple[np.ndarray | None, list[str]]:
    """The labels of all images, and notes; None if one file of images has no file of labels beside it."""
    found = [_labels_file(path) for path in images]
    if None in found:
        missing = ", ".join(path.name for path, labels in zip(images, found, strict=True) if labels is None)
        return None, [f"no labels: no file of labels beside {missing}"]
    paths = [path for path in found if path is not None]
    labels = [read_idx(path) for path in paths]
    with file_errors_at(source):
        for path, array in zip(paths, labels, strict=True):
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise FileError(
                    "LABELS", f"{path.name} contains {array.dtype} {array.shape}", "Give whole numbers (N,)"
                )
    return np.concatenate(labels), [f"labels from {', '.join(path.name for path in paths)}"]


def _labels_file(images: Path) -> Path | None:
    if not IMAGES.search(images.name):
        return None
    stem = IMAGES.sub("labels", _stem(images)).lower()
    paths = [path for path in images.parent.iterdir() if NAME.fullmatch(path.name) and not path.is_dir()]
    matching = sorted(path for path in paths if _stem(path).lower() == stem and path != images)
    return matching[0] if matching else None
