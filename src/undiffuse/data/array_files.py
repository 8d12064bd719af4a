"""Array files as a data set: ``.npy``, ``.npz`` and ``.safetensors``, checked before anything is allocated."""

from __future__ import annotations

import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from undiffuse.data import arrays, headers
from undiffuse.data.arrays import Range, check_options, conditions, dataset_from
from undiffuse.data.dataset import Dataset
from undiffuse.data.memory import require
from undiffuse.data.problems import Refused, refusal
from undiffuse.data.rows import as_array, stored
from undiffuse.data.seen import Stamp

SUFFIXES = (".npy", ".npz", ".safetensors")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
NAMES = ("images", "x", "data", "arr_0")
BESIDE = {"labels": ("labels", "y"), "cond": ("cond",), "mask": ("mask",)}
MAX_BYTES = 1 << 36
BROKEN = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
BROKEN += (EOFError, ValueError, ArithmeticError, RuntimeError)  # NotImplementedError among them
"""What reading an archive may raise."""

T = TypeVar("T")


class Read(NamedTuple):
    arrays: dict[str, np.ndarray]  # by role
    notes: list[str]


def load_array(
    path: str | Path, *, layout: str | None = None, levels: int | None = None, value_range: Range | None = None
) -> Dataset:
    """The array in ``path`` called images, x, data or arr_0 (or the only one), with labels or y if there are.

    An array ``cond`` beside it holds a vector (N, D) for each item, or tokens (N, L, D) with their ``mask`` (N, L).
    ``.npy`` files in their final form stay on the disk. ``layout``, ``levels`` and ``value_range`` as in
    ``from_array``. DataError for what is wrong with the file or its arrays; nothing is unpickled.
    """
    check_options(layout, levels, value_range)

    def make(read: Read) -> Dataset:
        values = read.arrays["values"]
        return dataset_from(Path(path).stem, values, read.arrays, layout, levels, read.notes, value_range)

    return _read(Path(path), make)


def load_conditions(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The vectors (N, D), or tokens (N, L, D) and their mask, of a file: its array ``cond``, or the only one.

    DataError for what is wrong with the file or its arrays.
    """
    return _read(
        Path(path),
        lambda read: conditions(read.arrays.get("cond", read.arrays["values"]), read.arrays.get("mask"), None),
    )


def _read(path: Path, make: Callable[[Read], T]) -> T:
    """What ``make`` makes of what is read from a file, and DataError for what is wrong with it."""
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
        return make(readers[path.suffix.lower()](path, start))
    except Refused as refused:
        raise refused.at(path) from refused.__cause__
    except OSError as error:
        raise refusal(error).at(path) from error


def _read_npy(path: Path, start: bytes) -> Read:
    _check_magic(start)
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        header = headers.read_npy(stream, status.st_size)
    if not header.bytes or not header.shape:
        return Read({"values": np.empty(header.shape, header.dtype)}, [])
    rows = stored(path, header, Stamp.of(status))
    scattered = header.order == "F" and header.bytes <= arrays.COPIED
    return Read({"values": rows[:] if scattered else as_array(rows)}, [])


def _check_magic(start: bytes) -> None:
    if not start.startswith(headers.MAGIC):
        raise _no_array(start, "a .npy header")


def _read_npz(path: Path, start: bytes) -> Read:
    if not start.startswith((b"PK\3\4", b"PK\5\6")):
        raise _no_array(start, "an archive")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            _check_members(archive, members, path.stat().st_size)
            read = {role: _read_member(archive, members[name]) for role, name in _pick(members).items()}
    except BROKEN as error:
        raise Refused("BAD_ARCHIVE", f"cannot be unpacked ({error})") from error
    return Read(read, [])


def _check_members(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], size: int) -> None:
    if len(members) != len(archive.infolist()):
        raise Refused("BAD_ARCHIVE", "two members have the same name")
    for name, info in members.items():
        if name.startswith("/") or ".." in Path(name).parts or "\\" in name:
            raise Refused("BAD_ARCHIVE", f"the member {name} points out of it")
        if info.compress_size > size:
            raise Refused("BAD_ARCHIVE", f"the member {name} says to be larger than the archive")
        if info.file_size > MAX_BYTES or info.file_size > max(1 << 24, 200 * info.compress_size):
            raise Refused(
                "ZIP_BOMB", f"the member {name} unpacks from {info.compress_size:,} to {info.file_size:,} bytes"
            )
    if any(name.endswith("data.pkl") for name in members):
        raise Refused("PICKLE_REFUSED", "is a pickled PyTorch file")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """The array of a member, which is never read further than its header and the directory both say."""
    with archive.open(info) as stream:
        _check_magic(stream.read(16))
    with archive.open(info) as stream:
        header = headers.read_npy(stream, info.file_size)
        require(header.bytes, info.filename)
        buffer, at = np.empty(header.bytes, np.uint8), 0
        while chunk := stream.read(1 << 20):
            buffer[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
            at += len(chunk)
    if at != header.bytes:
        raise Refused("BAD_ARCHIVE", f"the member {info.filename} ends before its header says")
    return np.ndarray(header.shape, header.dtype, buffer, order=header.order)


def _read_safetensors(path: Path, start: bytes) -> Read:
    if start[8:9] != b"{":
        raise _no_array(start, "a safetensors header")
    with path.open("rb") as stream:
        there = headers.read_safetensors(stream, os.fstat(stream.fileno()).st_size)
    names = _pick(there)
    notes = ["bfloat16 widened to float32"] if there[names["values"]].dtype == "BF16" else []
    try:
        with safe_open(path, framework="pt") as file:
            read = {role: file.get_tensor(name) for role, name in names.items()}
    except SafetensorError as error:
        raise Refused("BAD_HEADER", f"cannot be read as safetensors ({error})"[:200]) from error
    return Read({role: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for role, t in read.items()}, notes)


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
