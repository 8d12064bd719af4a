"""Array files as a data set: ``.npy``, ``.npz`` and ``.safetensors``, checked before anything is allocated."""

from __future__ import annotations

import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open

from undiffuse.data.arrays import check_options, conditions, dataset_from
from undiffuse.data.dataset import Dataset
from undiffuse.data.problems import Refused, refusal

SUFFIXES = (".npy", ".npz", ".safetensors")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
NAMES = ("images", "x", "data", "arr_0")
BESIDE = {"labels": ("labels", "y"), "cond": ("cond",), "mask": ("mask",)}
MAX_BYTES = 1 << 36

T = TypeVar("T")

Read = tuple[dict[str, np.ndarray], list[str]]  # arrays by role, notes


def load_array(path: str | Path, *, layout: str | None = None, levels: int | None = None) -> Dataset:
    """The array in ``path`` called images, x, data or arr_0 (or the only one), with labels or y if there are.

    An array ``cond`` beside it holds a vector (N, D) for each item, or tokens (N, L, D) with their ``mask`` (N, L).
    ``.npy`` files in their final form stay memory-mapped. ``layout`` and ``levels`` as in ``from_array``. DataError
    for what is wrong with the file or its arrays; nothing is unpickled.
    """
    check_options(layout, levels)

    def make(arrays: dict[str, np.ndarray], notes: list[str]) -> Dataset:
        return dataset_from(Path(path).stem, arrays["values"], arrays, layout, levels, notes)

    return _read(Path(path), make)


def load_conditions(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The vectors (N, D), or tokens (N, L, D) and their mask, of a file: its array ``cond``, or the only one.

    DataError for what is wrong with the file or its arrays.
    """
    return _read(
        Path(path), lambda arrays, _: conditions(arrays.get("cond", arrays["values"]), arrays.get("mask"), None)
    )


def _read(path: Path, make: Callable[[dict[str, np.ndarray], list[str]], T]) -> T:
    """What ``make`` makes of the arrays and notes of a file, and DataError for what is wrong with them."""
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise Refused("NOT_A_REGULAR_FILE", "is a folder, a pipe, a socket or a device")
        with path.open("rb") as stream:
            start = stream.read(16)
        if not start:
            raise Refused("EMPTY_FILE", "holds no bytes")
        if path.suffix.lower() not in readers:
            raise Refused("PICKLE_REFUSED", "a format that can hold pickles")
        return make(*readers[path.suffix.lower()](path, start))
    except Refused as refused:
        raise refused.at(path) from refused.__cause__
    except OSError as error:
        raise refusal(error).at(path) from error


def _read_npy(path: Path, start: bytes) -> Read:
    with path.open("rb") as stream:
        _check_npy(stream, start, os.fstat(stream.fileno()).st_size)
    return {"values": np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)}, []


def _check_npy(stream: IO[bytes], start: bytes, size: int) -> None:
    """Refused unless the header can be read, holds no objects and promises exactly what ``size`` leaves for it."""
    if not start.startswith(npy.MAGIC_PREFIX):
        raise _no_array(start, "a .npy header")
    try:
        version = npy.read_magic(stream)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, _, dtype = read(stream)
    except (ValueError, KeyError, TypeError, SyntaxError, EOFError, UnicodeError, RecursionError) as error:
        raise Refused("BAD_HEADER", f"its .npy header cannot be read ({str(error)[:80]})") from error
    if dtype.hasobject:
        raise Refused("PICKLE_REFUSED", "holds Python objects, not numbers")
    if any(n < 0 for n in shape):
        raise Refused("BAD_HEADER", f"its header gives the shape {shape}")
    promised, there = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if promised != there:
        code = "TRUNCATED" if promised / 2 <= there < promised else "SIZE_MISMATCH"
        raise Refused(code, f"its header promises {promised:,} bytes, {there:,} are there")


def _read_npz(path: Path, start: bytes) -> Read:
    if not start.startswith((b"PK\3\4", b"PK\5\6")):
        raise _no_array(start, "an archive")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            _check_members(archive, members)
            read = {role: _read_member(archive, members[name]) for role, name in _pick(members).items()}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise Refused("BAD_ARCHIVE", f"cannot be unpacked ({error})") from error
    return read, []


def _check_members(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> None:
    if len(members) != len(archive.infolist()):
        raise Refused("BAD_ARCHIVE", "two members have the same name")
    for name, info in members.items():
        if name.startswith("/") or ".." in Path(name).parts or "\\" in name:
            raise Refused("BAD_ARCHIVE", f"the member {name} points out of it")
        if info.file_size > MAX_BYTES or info.file_size > max(1 << 24, 200 * info.compress_size):
            raise Refused(
                "ZIP_BOMB", f"the member {name} unpacks from {info.compress_size:,} to {info.file_size:,} bytes"
            )
    if any(name.endswith("data.pkl") for name in members):
        raise Refused("PICKLE_REFUSED", "is a pickled PyTorch file")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        start = stream.read(16)
    with archive.open(info) as stream:
        _check_npy(stream, start, info.file_size)
    with archive.open(info) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _read_safetensors(path: Path, start: bytes) -> Read:
    try:
        with safe_open(path, framework="pt") as file:
            names = _pick(file.keys())
            notes = ["bfloat16 widened to float32"] if file.get_slice(names["values"]).get_dtype() == "BF16" else []
            read = {role: file.get_tensor(name) for role, name in names.items()}
    except SafetensorError as error:
        if "not fully covered" in str(error):
            raise Refused("SIZE_MISMATCH", "its header promises another number of bytes than are there") from error
        raise _no_array(start, "a safetensors header") from error
    return {role: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for role, t in read.items()}, notes


def _pick(names: Iterable[str]) -> dict[str, str]:
    """The names of the values and of what stands beside them among those of a file, by role."""
    names = list(names)
    found = {role: next((name for name in known if name in names), None) for role, known in BESIDE.items()}
    beside = {role: name for role, name in found.items() if name and len(names) > 1}
    if "cond" not in beside:
        beside.pop("mask", None)  # then it is any other array
    others = [name for name in names if name not in beside.values()]
    if not others and "cond" in beside:
        others = [beside.pop("cond")]  # a file of conditions
    values = next((name for name in NAMES if name in names), others[0] if len(others) == 1 else None)
    if values is None:
        raise Refused(
            "NO_ARRAY", f"holds {', '.join(sorted(names)[:8]) or 'nothing'}, which does not say which is the data"
        )
    return {"values": values, **beside}


def _no_array(start: bytes, wanted: str) -> Refused:
    zipped = start.startswith(b"PK") and wanted != "an archive"
    if zipped or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
        return Refused("PICKLE_REFUSED", "is a pickle or a pickled PyTorch file")
    return Refused("BAD_HEADER", f"does not begin with {wanted}")
