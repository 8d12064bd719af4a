"""Headers of ``.npy`` and ``.safetensors`` files, checked against the file's size before anything is allocated."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.lib import format as npy

from undiffuse.runtime.file_errors import FileError
from undiffuse.runtime.side_files import unique_keys

MAGIC = npy.MAGIC_PREFIX
MAX_NPY_HEADER_BYTES = 10_000
MAX_HEADER_BYTES, MAX_TENSORS = 8 << 20, 100_000
"""Bytes of a safetensors header, and tensors in it."""
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32}
BITS |= {"F32": 32, "F64": 64, "I64": 64, "U64": 64}
"""Bits of each type that both safetensors and PyTorch have."""


class NpyHeader(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]
    offset: int  # where the values begin

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorHeader(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def read_npy_header(stream: IO[bytes], size: int) -> NpyHeader:
    """The header of a ``.npy`` file of ``size`` bytes; leaves ``stream``, read from its start, where the values begin.

    Raises FileError: PICKLE_REFUSED for Python objects, DTYPE for structured types, TRUNCATED or SIZE_MISMATCH where
    the file is not as long as the header says, otherwise BAD_HEADER.
    """
    start = io.BytesIO(stream.read(12 + MAX_NPY_HEADER_BYTES))  # bounds what numpy reads, whatever length it finds
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files of Python 2, and about escapes in the header's text
            read = npy.read_array_header_1_0 if npy.read_magic(start) == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(start, max_header_size=MAX_NPY_HEADER_BYTES)
    except Exception as error:  # numpy raises ValueError, but its parser and types raise others too
        cause = str(error).partition(": <")[0]  # what follows is an address
        raise FileError("BAD_HEADER", f"its .npy header cannot be read ({cause})"[:200]) from error
    header = NpyHeader(shape, dtype, "F" if fortran else "C", start.tell())
    if dtype.names or dtype.subdtype:
        raise FileError("DTYPE", "its values are rows of a table with named columns")
    if dtype.hasobject:
        raise FileError("PICKLE_REFUSED", "holds Python objects, not numbers")
    if any(n < 0 for n in shape) or len(shape) > 64:
        raise FileError("BAD_HEADER", f"its header gives the shape {shape}"[:200])
    if header.bytes != (there := size - header.offset):
        code = "TRUNCATED" if header.bytes / 2 <= there < header.bytes else "SIZE_MISMATCH"
        raise FileError(code, f"its header promises {header.bytes:,} bytes, {there:,} are there")
    if math.prod(n for n in shape if n) * dtype.itemsize >= 1 << 63:  # of no bytes, but numpy cannot make it
        raise FileError("BAD_HEADER", f"its header gives the shape {shape}"[:200])
    stream.seek(header.offset)
    return header


def npy_header(shape: Sequence[int], dtype: np.dtype) -> bytes:
    """The header of a ``.npy`` file in C order; its length does not depend on the number of items."""
    stream = io.BytesIO()
    entries = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    npy.write_array_header_1_0(stream, entries)
    return stream.getvalue()


def read_safetensors_header(stream: IO[bytes], size: int) -> dict[str, TensorHeader]:
    """The type and shape of each tensor in a safetensors file of ``size`` bytes, by name.

    Stricter than the format. Raises FileError (BAD_HEADER, SIZE_MISMATCH) for a key that occurs twice, tensors that
    overlap or leave gaps, a header of more than 8 MB or 100,000 tensors, and types that PyTorch does not have.
    """
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > size - 8:
        raise FileError("BAD_HEADER", "does not begin with a safetensors header")
    if length > MAX_HEADER_BYTES:
        raise FileError("BAD_HEADER", f"its header is {length:,} bytes long, more than {MAX_HEADER_BYTES:,}")
    text = stream.read(length)
    if text.count(b"data_offsets") > MAX_TENSORS:
        raise FileError("BAD_HEADER", f"it names more than {MAX_TENSORS:,} tensors")
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FileError("BAD_HEADER", f"its safetensors header cannot be read ({error})"[:200]) from None
    if not isinstance(table, dict):
        raise FileError("BAD_HEADER", "its safetensors header is not a table")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError("BAD_HEADER", "its metadata are not all text")
    tensors, spans = {}, []
    for name, entry in table.items():
        tensors[name], span = _tensor(name, entry)
        spans.append(span)
    spans.sort()
    for (_, end), (begin, _) in pairwise([(0, 0), *spans]):
        if begin != end:
            raise FileError("BAD_HEADER", f"its tensors overlap or leave a gap at byte {end:,}")
    promised, there = spans[-1][1] if spans else 0, size - 8 - length
    if promised != there:
        raise FileError("SIZE_MISMATCH", f"its header promises {promised:,} bytes, {there:,} are there")
    return tensors


def _tensor(name: str, entry: Any) -> tuple[TensorHeader, tuple[int, int]]:
    """The header of one tensor, and its first byte and the byte after its last."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError("BAD_HEADER", f"the tensor {name[:80]!r} is not described by type, shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FileError("BAD_HEADER", f"the tensor {name[:80]!r} has the unsupported type {str(dtype)[:20]!r}")
    if not _is_list_of_counts(shape) or not _is_list_of_counts(offsets) or len(offsets) != 2:
        raise FileError("BAD_HEADER", f"the tensor {name[:80]!r} has an invalid shape or invalid offsets")
    if math.prod(n for n in shape if n) * BITS[dtype] >= 1 << 63:  # of no bytes, but no library can make it
        raise FileError("BAD_HEADER", f"the tensor {name[:80]!r} has the shape {shape}"[:200])
    if offsets[1] - offsets[0] != math.prod(shape) * BITS[dtype] // 8:
        raise FileError("SIZE_MISMATCH", f"the tensor {name[:80]!r} takes more or fewer bytes than its shape needs")
    return TensorHeader(dtype, tuple(shape)), (offsets[0], offsets[1])


def _is_list_of_counts(values: Any) -> bool:
    return isinstance(values, list) and len(values) <= 64 and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"JSON has no number {text}")
