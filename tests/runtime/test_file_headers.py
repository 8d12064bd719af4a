"""Headers of .npy and safetensors files: mutations, and an example of each rule."""

from __future__ import annotations

import io
import json
import random
import struct
import time

import numpy as np
import pytest
import torch
from children import in_child
from safetensors.torch import save

from undiffuse.data.sources.registry import load
from undiffuse.errors import CheckpointError, DataError
from undiffuse.model import checkpoint
from undiffuse.runtime import file_headers as headers
from undiffuse.runtime import own_output
from undiffuse.runtime.file_errors import FileError
from undiffuse.runtime.tensor_file import digest

TENSORS = {"x": torch.arange(12, dtype=torch.uint8).reshape(3, 4), "labels": torch.tensor([0, 1, 0])}
METADATA = {"undiffuse": "state"}
WHOLE = save(TENSORS, {**METADATA, "sha256": digest(TENSORS, METADATA)})
LENGTH = struct.unpack("<Q", WHOLE[:8])[0]
TEXT, BODY = WHOLE[8 : 8 + LENGTH], WHOLE[8 + LENGTH :]
ODD = (None, True, -1, 0, 1, 13, 2**31, 2**63, 2**80, 1.5, 1e300, "", "x", "F32", "U8", "F4", [], [1], [2**40] * 3, {})


def packed(text: bytes, body: bytes = BODY, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def mutated(rng: random.Random) -> bytes:
    """The file with changes to its header: its bytes, its length, its keys or its values."""
    kind = rng.randrange(5)
    if kind == 0:
        data = bytearray(WHOLE)
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(8 + LENGTH)] = rng.randrange(256)
        return bytes(data)
    if kind == 1:
        length = rng.choice((0, 1, LENGTH - 1, LENGTH + 1, len(WHOLE), 8 << 20, 2**31, 2**63 - 1, 2**64 - 1))
        return packed(TEXT, length=length)
    if kind == 2:
        cut = rng.randrange(LENGTH)
        return packed(TEXT[:cut] + rng.choice((b"", b'"', b"}", b"[" * 5000, b"\xff", b"{" * 9, TEXT)) + TEXT[cut:])
    table = json.loads(TEXT)
    name = rng.choice(list(table))
    if kind == 3:
        key = rng.choice([*table[name], "more"])
        table[name][key] = rng.choice(ODD)
        if key in ("shape", "data_offsets") and rng.random() < 0.7:
            table[name][key] = [rng.choice(ODD[3:9]) for _ in range(rng.randrange(4))]
    else:
        table[rng.choice(("", "x", "y", "__metadata__", "a" * 300, "\u202e"))] = rng.choice([*table.values(), *ODD])
    return packed(json.dumps(table).encode(), rng.choice((BODY, BODY, BODY[:-1], BODY + b"\0", b"")))


def try_mutations(folder, n: int, seed: int) -> dict:
    """How many of ``n`` mutated files are refused, and the longest time of one."""
    rng, lines, slowest = random.Random(seed), [], 0.0
    path = folder / "model.safetensors"
    for _ in range(n):
        path.write_bytes(mutated(rng))
        began = time.process_time()
        for read, error in ((checkpoint.read_tensors, CheckpointError), (load, DataError)):
            try:
                read(path)
            except error as caught:
                lines.append(str(caught))
        slowest = max(slowest, time.process_time() - began)
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    return {"refused": len(lines), "slowest": slowest}


@pytest.mark.parametrize("n", [1000, pytest.param(20_000, marks=pytest.mark.release)])
def test_mutated_headers(tmp_path, n):
    """Only typed errors, within 0.5 s and 64 MB; most files are refused."""
    parts = [in_child(lambda k=k: try_mutations(tmp_path, 500, k), 300, memory=64 << 20) for k in range(n // 500)]
    assert sum(part["refused"] for part in parts) > 1.5 * n
    assert max(part["slowest"] for part in parts) < 0.5
    print(f"{n:,} mutated headers: {max(p['slowest'] for p in parts):.3f} s at the most")


def test_a_length_beyond_the_file_takes_no_memory(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(packed(TEXT, length=1 << 29))
    assert in_child(lambda: own_output.is_own_tensor_file(tmp_path / "model.safetensors"), 60, memory=64 << 20) is False


def error_of(folder, content: bytes) -> str:
    """The code of the error as data, and the cause as a model."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError) as by_data:
        load(path)
    with pytest.raises(CheckpointError) as by_model:
        checkpoint.read_tensors(path)
    assert by_model.value.code == "DAMAGED"
    return by_data.value.code + " " + by_model.value.cause


def entry(**fields) -> dict:
    return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **fields}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"x": %(entry)s, "x": %(entry)s}', "'x' occurs twice"),
        (b'{"x": {"dtype": "U8", "dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', "'dtype' occurs twice"),
        (b'{"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, NaN]}}', "JSON has no number NaN"),
        (b"[]", "is not a table"),
        (b"{" + b" " * (9 << 20) + b"}", "9,437,186 bytes long, more than 8,388,608"),
        (b"{" + b'"data_offsets"' * 100_001 + b"}", "more than 100,000 tensors"),
        ({"x": entry(), "__metadata__": {"a": 1}}, "metadata are not all text"),
        ({"x": entry(), "__metadata__": []}, "metadata are not all text"),
        ({"x": entry(more=1)}, "'x' is not described by type, shape and offsets"),
        ({"x": []}, "'x' is not described"),
        ({"x": entry(dtype="F8_E4M3")}, "has the unsupported type 'F8_E4M3'"),
        ({"x": entry(dtype=3)}, "has the unsupported type '3'"),
        ({"x": entry(shape=[4.0])}, "has an invalid shape or invalid offsets"),
        ({"x": entry(shape=[True, 4])}, "has an invalid shape or invalid offsets"),
        ({"x": entry(data_offsets=[0])}, "has an invalid shape or invalid offsets"),
        ({"x": entry(data_offsets=[-4, 0])}, "has an invalid shape or invalid offsets"),
        ({"x": entry(shape=[2**62, 2**62])}, "has the shape [4611686018427387904, 4611686018427387904]"),
        ({"x": entry(shape=[3])}, "takes more or fewer bytes"),
        ({"x": entry(), "y": entry()}, "overlap or leave a gap at byte 4"),
        ({"x": entry(data_offsets=[1, 5])}, "overlap or leave a gap at byte 0"),
        ({"x": entry(shape=[5], data_offsets=[0, 5])}, "promises 5 bytes, 4 are there"),
    ],
)
def test_each_rule_for_safetensors(tmp_path, text, words):
    if isinstance(text, dict):
        text = json.dumps(text).encode()
    line = error_of(tmp_path, packed(text.replace(b"%(entry)s", json.dumps(entry()).encode()), b"\0" * 4))
    assert words in line
    assert line.split()[0] in ("BAD_HEADER", "SIZE_MISMATCH")


def test_written_tensors_are_read_back(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(WHOLE)
    tensors, _ = checkpoint.read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    with open(tmp_path / "a.safetensors", "rb") as stream:
        table = headers.read_safetensors_header(stream, len(WHOLE))
    assert table == {"x": ("U8", (3, 4)), "labels": ("I64", (3,))}
    (tmp_path / "none.safetensors").write_bytes(packed(b"{}", b""))
    with pytest.raises(DataError, match="NO_ARRAY"):
        load(tmp_path / "none.safetensors")


# --- .npy ------------------------------------------------------------------------------------------------------------


def npy(text: str, body: bytes = bytes(4), version: int = 1) -> bytes:
    start, length = b"\x93NUMPY" + bytes([version, 0]), "<H" if version == 1 else "<I"
    return start + struct.pack(length, len(text)) + text.encode("latin1") + body


def fields(descr: str = "'|u1'", order: str = "False", shape: str = "(4,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fields(), ((4,), "|u1", "C")),
        (fields(order="True", shape="(2, 1)", descr="'>i2'"), ((2, 1), ">i2", "F")),
        (fields(shape="()", descr="'<f4'"), ((), "<f4", "C")),
        ('{"shape": (1, 4), "descr": "b1", "fortran_order": False}', ((1, 4), "?", "C")),
    ],
)
def test_npy_headers(version, text, expected):
    content = npy(text, version=version)
    stream = io.BytesIO(content)
    header = headers.read_npy_header(stream, len(content))
    assert (header.shape, header.dtype, header.order) == (expected[0], np.dtype(expected[1]), expected[2])
    assert stream.tell() == header.offset == len(content) - header.bytes


@pytest.mark.filterwarnings("error")
def test_npy_headers_of_python_2():
    content = npy(fields(shape="(4L,)"))
    assert headers.read_npy_header(io.BytesIO(content), len(content)).shape == (4,)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (npy(fields("'|O'")), "PICKLE_REFUSED"),
        (npy(fields("[('a', '|u1'), ('b', '|O')]")), "DTYPE"),
        (npy(fields("'u1,u1'", shape="(2,)")), "DTYPE"),
        (npy(fields("('|u1', (2,))", shape="(2,)")), "DTYPE"),
        (npy(fields("'|x9'")), "BAD_HEADER"),
        (npy(fields("[[]]")), "BAD_HEADER"),
        (npy(fields("3")), "BAD_HEADER"),
        (npy(fields(order="0")), "BAD_HEADER"),
        (npy(fields(shape="[4]")), "BAD_HEADER"),
        (npy(fields(shape="(4.0,)")), "BAD_HEADER"),
        (npy(fields(shape="(-4,)")), "BAD_HEADER"),
        (npy(fields(shape=f"({2**80}, 0)"), b""), "BAD_HEADER"),
        (npy(fields(shape=f"({2**40}, {2**40}, 0)"), b""), "BAD_HEADER"),
        (npy(fields(shape="(4" + ", 1" * 64 + ")")), "BAD_HEADER"),
        (npy(fields(shape="(5,)")), "TRUNCATED"),
        (npy(fields(shape="(3,)")), "SIZE_MISMATCH"),
        (npy(fields(shape="(9,)")), "SIZE_MISMATCH"),
        (npy("{" * 3000), "BAD_HEADER"),
        (npy("-" * 9000 + "1"), "BAD_HEADER"),
        (npy(fields() + " " * 10_000), "BAD_HEADER"),
        (npy("1\\d"), "BAD_HEADER"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(20_000), "BAD_HEADER"),
        (b"\x93NUMPY\4\0" + npy(fields())[8:], "BAD_HEADER"),
        (b"\x93NUMP", "BAD_HEADER"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_each_rule_for_npy(content, code):
    with pytest.raises(FileError) as error:
        headers.read_npy_header(io.BytesIO(content), len(content))
    assert error.value.code == code
    assert len(error.value.reason) <= 200
