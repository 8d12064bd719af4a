"""Array files: ``.npy``, ``.npz`` and ``.safetensors``, checked before memory is allocated."""

from __future__ import annotations

import errno
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

from undiffuse.data import from_array
from undiffuse.data.dataset import Dataset
from undiffuse.data.from_array import ValueRange, build_dataset, check_options, conditions
from undiffuse.data.lazy_array import cast_to_array, npy_rows
from undiffuse.data.source_report import FileStamp
from undiffuse.runtime import file_headers as headers
from undiffuse.runtime.file_errors import FileError, file_errors_at
from undiffuse.runtime.machine import require_memory
from undiffuse.runtime.own_output import is_own_tensor_file

SUFFIXES = (".npy", ".npz", ".safetensors")
PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
"""Recognized in order to be refused."""
VALUE_NAMES = ("images", "x", "data", "arr_0")
SIDE_ARRAYS = {"labels": ("labels", "y"), "cond": ("cond",), "mask": ("mask",)}
MAX_MEMBER_BYTES = 1 << 36
ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error)
ARCHIVE_ERRORS += (EOFError, ValueError, ArithmeticError, RuntimeError)  # RuntimeError covers NotImplementedError
"""Exceptions that reading an archive may raise."""

T = TypeVar("T")


class ReadArrays(NamedTuple):
    by_role: dict[str, np.ndarray]  # values, labels, cond, mask
    notes: list[str]


def sniff(source: str | Path) -> bool:
    """Whether ``source`` has the extension of an array file or a pickle and exists, not as a folder."""
    suffix = Path(source).suffix.lower()
    return suffix in (*SUFFIXES, *PICKLE_SUFFIXES) and os.path.lexists(source) and not os.path.isdir(source)


def load(
    source: str | Path,
    *,
    layout: str | None = None,
    num_values: int | None = None,
    value_range: ValueRange | None = None,
) -> Dataset:
    """The array called images, x, data or arr_0 (or the only array), with labels from an array labels or y.

    An array ``cond`` holds a vector (N, D) per item, or tokens (N, L, D) with an array ``mask`` (N, L). The values of
    a ``.npy`` file that need no conversion stay on disk. Options as in `from_array`. Raises `DataError`. Nothing is
    unpickled.
    """
    check_options(layout, num_values, value_range)
    path = Path(source)

    def make(arrays: ReadArrays) -> Dataset:
        values = arrays.by_role["values"]
        return build_dataset(path.stem, values, arrays.by_role, layout, num_values, arrays.notes, value_range)

    return _read(path, make)


def load_conditions(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(vectors (N, D), None), or (tokens (N, L, D), mask), of a file: its array ``cond``, or its only array.

    Raises `DataError`.
    """

    def make(arrays: ReadArrays) -> tuple[np.ndarray, np.ndarray | None]:
        cond = arrays.by_role.get("cond", arrays.by_role["values"])
        return conditions(cond, arrays.by_role.get("mask"), None)

    return _read(Path(path), make)


def _read(path: Path, make: Callable[[ReadArrays], T]) -> T:
    """``make(arrays)`` of the arrays in a file; its `FileError` becomes a `DataError`."""
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    with file_errors_at(path):
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileError("NOT_A_REGULAR_FILE", "is a folder, a pipe, a socket or a device")
        with path.open("rb") as stream:
            start = stream.read(16)
        if not start:
            raise FileError("EMPTY_FILE", "the file is empty")
        if path.suffix.lower() not in readers:
            raise FileError("PICKLE_REFUSED", "this format can contain pickles")
        return make(readers[path.suffix.lower()](path, start))


def _read_npy(path: Path, start: bytes) -> ReadArrays:
    _check_magic(start)
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        header = headers.read_npy_header(stream, status.st_size)
    if not header.bytes or not header.shape:
        return ReadArrays({"values": np.empty(header.shape, header.dtype)}, [])
    rows = npy_rows(path, header, FileStamp.of(status))
    in_memory = header.order == "F" and header.bytes <= from_array.MAX_CONVERTED_BYTES
    return ReadArrays({"values": rows[:] if in_memory else cast_to_array(rows)}, [])


def _check_magic(start: bytes) -> None:
    if not start.startswith(headers.MAGIC):
        raise _format_error(start, "a .npy header")


def _read_npz(path: Path, start: bytes) -> ReadArrays:
    if not start.startswith((b"PK\3\4", b"PK\5\6")):
        raise _format_error(start, "an archive")
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            _check_members(archive, members, path.stat().st_size)
            read = {role: _read_member(archive, members[name]) for role, name in _pick(members).items()}
    except ARCHIVE_ERRORS as error:
        raise FileError("BAD_ARCHIVE", f"cannot be unpacked ({error})") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the beginning of the file
            raise
        raise FileError("BAD_ARCHIVE", "cannot be unpacked (its directory gives an impossible place)") from error
    return ReadArrays(read, [])


def _check_members(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], size: int) -> None:
    if len(members) != len(archive.infolist()):
        raise FileError("BAD_ARCHIVE", "two members have the same name")
    for name, info in members.items():
        if name.startswith("/") or ".." in Path(name).parts or "\\" in name:
            raise FileError("BAD_ARCHIVE", f"the member {name} points outside of the archive")
        if info.compress_size > size:
            raise FileError("BAD_ARCHIVE", f"the member {name} is declared larger than the archive")
        if info.file_size > MAX_MEMBER_BYTES or info.file_size > max(1 << 24, 200 * info.compress_size):
            cause = f"the member {name} unpacks from {info.compress_size:,} to {info.file_size:,} bytes"
            raise FileError("ZIP_BOMB", cause)
    if any(name.endswith("data.pkl") for name in members):
        raise FileError("PICKLE_REFUSED", "is a pickled PyTorch file")


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """The array of a member, read up to the size that its header and the archive's directory agree on."""
    with archive.open(info) as stream:
        _check_magic(stream.read(16))
    with archive.open(info) as stream:
        header = headers.read_npy_header(stream, info.file_size)
        require_memory(header.bytes, info.filename)
        buffer, offset = np.empty(header.bytes, np.uint8), 0
        while chunk := stream.read(1 << 20):
            buffer[offset : offset + len(chunk)] = np.frombuffer(chunk, np.uint8)
            offset += len(chunk)
    if offset != header.bytes:
        raise FileError("BAD_ARCHIVE", f"the member {info.filename} is shorter than its header states")
    return np.ndarray(header.shape, header.dtype, buffer, order=header.order)


def _read_safetensors(path: Path, start: bytes) -> ReadArrays:
    if start[8:9] != b"{":
        raise _format_error(start, "a safetensors header")
    if is_own_tensor_file(path):
        fix = "Name the data, or use 'undiffuse inspect' for a model"
        raise FileError("NO_ARRAY", "is a model or another file of undiffuse, not data", fix)
    with path.open("rb") as stream:
        tensors = headers.read_safetensors_header(stream, os.fstat(stream.fileno()).st_size)
    names = _pick(tensors)
    notes = ["bfloat16 converted to float32"] if tensors[names["values"]].dtype == "BF16" else []
    try:
        with safe_open(path, framework="pt") as file:
            picked = {role: file.get_tensor(name) for role, name in names.items()}
    except SafetensorError as error:
        raise FileError("BAD_HEADER", f"cannot be read as safetensors ({error})"[:200]) from error
    by_role = {role: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for role, t in picked.items()}
    return ReadArrays(by_role, notes)


def _pick(names: Iterable[str]) -> dict[str, str]:
    """{role: name} of the values and the side arrays among the ``names`` of a file's arrays."""
    names = list(names)
    side = {role: next((name for name in options if name in names), None) for role, options in SIDE_ARRAYS.items()}
    side = {role: name for role, name in side.items() if name and len(names) > 1}
    if "cond" not in side:
        side.pop("mask", None)  # without cond it may be the values
    others = [name for name in names if name not in side.values()]
    if not others and "cond" in side:
        others = [side.pop("cond")]  # a file of conditions only
    values = next((name for name in VALUE_NAMES if name in names), others[0] if len(others) == 1 else None)
    if values is None:
        listed = ", ".join(sorted(names)[:8])
        cause = f"contains {listed}, and which one is the data is unclear" if listed else "contains no arrays"
        raise FileError("NO_ARRAY", cause)
    return {"values": values, **side}


def _format_error(start: bytes, expected: str) -> FileError:
    is_zip = start.startswith(b"PK") and expected != "an archive"
    if is_zip or (start[:1] == b"\x80" and start[1:2] <= b"\x05"):
        return FileError("PICKLE_REFUSED", "is a pickle or a pickled PyTorch file")
    return FileError("BAD_HEADER", f"does not begin with {expected}")
