"""Headers of ``.npy`` and ``.safetensors`` files, read by grammars of our own: nothing is evaluated or allocated."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from undiffuse.data.problems import Refused

MAGIC = b"\x93NUMPY"
LONGEST_NPY = 10_000
LONGEST, MOST = 8 << 20, 100_000
"""Bytes of a safetensors header, and tensors in it."""
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
BITS |= {"F32": 32, "F64": 64, "I64": 64, "U64": 64}

_ENTRY = r"""\s*(?:'descr'\s*:\s*'(?P<descr>[^'\\]*)'|'fortran_order'\s*:\s*(?P<order>True|False)"""
_ENTRY += r"""|'shape'\s*:\s*\((?P<shape>[-\d\s,L]*)\))\s*(?:,|(?=\}))"""
_DESCR = re.compile(r"[<>|=]?[a-zA-Z]\d{0,9}(\[\w{1,9}\])?")


class Npy(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]
    offset: int  # where the values begin

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def read_npy(stream: IO[bytes], size: int) -> Npy:
    """What the header of a ``.npy`` file of ``size`` bytes says, if the file is as long as it says.

    Refused: PICKLE_REFUSED for objects, DTYPE for tables, else BAD_HEADER, TRUNCATED or SIZE_MISMATCH.
    """
    start = stream.read(8)
    wide = {b"\1\0": 2, b"\2\0": 4, b"\3\0": 4}.get(start[6:8])
    if start[:6] != MAGIC or wide is None:
        raise Refused("BAD_HEADER", "it does not begin as a .npy file of version 1 to 3")
    length = int.from_bytes(stream.read(wide), "little")
    if length > LONGEST_NPY:
        raise Refused("BAD_HEADER", f"its header says to be {length:,} bytes long")
    text = stream.read(length).decode("latin1").strip().replace('"', "'")
    if "'descr'" in text and re.search(r"'descr'\s*:\s*\[", text):
        raise Refused("DTYPE", "its values are rows of a table with named columns")
    shape, descr, order = _npy_entries(text)
    dtype = np.dtype(descr)
    header = Npy(shape, dtype, order, 8 + wide + length)
    if dtype.hasobject:
        raise Refused("PICKLE_REFUSED", "holds Python objects, not numbers")
    if any(n < 0 for n in shape):
        raise Refused("BAD_HEADER", f"its header gives the shape {shape}")
    if header.bytes != (there := size - header.offset):
        code = "TRUNCATED" if header.bytes / 2 <= there < header.bytes else "SIZE_MISMATCH"
        raise Refused(code, f"its header promises {header.bytes:,} bytes, {there:,} are there")
    return header


def _npy_entries(text: str) -> tuple[tuple[int, ...], str, Literal["C", "F"]]:
    entries = list(re.finditer(_ENTRY, text)) if re.fullmatch(rf"\{{(?:{_ungrouped(_ENTRY)}){{3}}\s*\}}", text) else []
    said = {name: value for entry in entries for name, value in entry.groupdict().items() if value is not None}
    try:
        shape = tuple(int(n.strip().rstrip("L")) for n in said["shape"].split(",") if n.strip())
        if not _DESCR.fullmatch(said["descr"]):
            raise ValueError(said["descr"])
        np.dtype(said["descr"])
        return shape, said["descr"], "F" if said["order"] == "True" else "C"
    except (KeyError, ValueError, TypeError) as error:
        raise Refused("BAD_HEADER", f"its .npy header cannot be read ({repr(text)[:80]})") from error


def _ungrouped(pattern: str) -> str:
    return re.sub(r"\?P<\w+>", "?:", pattern)


def read_safetensors(stream: IO[bytes], size: int) -> dict[str, Tensor]:
    """The tensors that a safetensors file of ``size`` bytes says to hold, by name.

    Stricter than the format: Refused (BAD_HEADER, SIZE_MISMATCH) where a key occurs twice, tensors overlap or leave
    gaps, a header is longer than 8 MB or names more than 100,000, and for types that are not those of PyTorch.
    """
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise Refused("BAD_HEADER", "does not begin with a safetensors header")
    if length > LONGEST:
        raise Refused("BAD_HEADER", f"its header is {length:,} bytes long, more than {LONGEST:,}")
    text = stream.read(length)
    if text.count(b"data_offsets") > MOST:
        raise Refused("BAD_HEADER", f"it names more than {MOST:,} tensors")
    try:
        said = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refused("BAD_HEADER", f"its safetensors header cannot be read ({error})"[:200]) from None
    if not isinstance(said, dict):
        raise Refused("BAD_HEADER", "its safetensors header is no table")
    metadata = said.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Refused("BAD_HEADER", "its metadata are not all text")
    tensors, places = {}, []
    for name, about in said.items():
        tensors[name], place = _tensor(name, about)
        places.append(place)
    places.sort()
    for (_, end), (begin, _) in pairwise([(0, 0), *places]):
        if begin != end:
            raise Refused("BAD_HEADER", f"its tensors overlap or leave a gap at byte {end:,}")
    promised, there = places[-1][1] if places else 0, size - 8 - length
    if promised != there:
        raise Refused("SIZE_MISMATCH", f"its header promises {promised:,} bytes, {there:,} are there")
    return tensors


def _tensor(name: str, about: Any) -> tuple[Tensor, tuple[int, int]]:
    """The tensor and the bytes that it lies in."""
    if not isinstance(about, dict) or set(about) != {"dtype", "shape", "data_offsets"}:
        raise Refused("BAD_HEADER", f"the tensor {name[:80]!r} is not described by type, shape and offsets")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise Refused("BAD_HEADER", f"the tensor {name[:80]!r} has the type {str(dtype)[:20]!r}, which is not taken")
    if not _whole(shape) or not _whole(offsets) or len(offsets) != 2:
        raise Refused("BAD_HEADER", f"the tensor {name[:80]!r} has a shape or offsets that are none")
    if offsets[1] - offsets[0] != math.prod(shape) * BITS[dtype] // 8:
        raise Refused("SIZE_MISMATCH", f"the tensor {name[:80]!r} lies in more or fewer bytes than its shape needs")
    return Tensor(dtype, tuple(shape)), (offsets[0], offsets[1])


def _whole(numbers: Any) -> bool:
    return (
        isinstance(numbers, list) and len(numbers) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if any(name == other for other, _ in pairs[:i]))
        raise ValueError(f"{twice[:80]!r} occurs twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
