"""Safetensors headers are read more strictly than the format asks: a thousand mutations, and what each rule is for."""

from __future__ import annotations

import json
import random
import struct
import time

import pytest
import torch
from children import in_child
from safetensors.torch import save

from undiffuse import checkpoint
from undiffuse.checkpoint import digest
from undiffuse.data import headers, load
from undiffuse.errors import CheckpointError, DataError

TENSORS = {"x": torch.arange(12, dtype=torch.uint8).reshape(3, 4), "labels": torch.tensor([0, 1, 0])}
ABOUT = {"undiffuse": "state"}
WHOLE = save(TENSORS, {**ABOUT, "sha256": digest(TENSORS, ABOUT)})
LENGTH = struct.unpack("<Q", WHOLE[:8])[0]
TEXT, BODY = WHOLE[8 : 8 + LENGTH], WHOLE[8 + LENGTH :]
ODD = (None, True, -1, 0, 1, 13, 2**31, 2**63, 2**80, 1.5, 1e300, "", "x", "F32", "U8", "F4", [], [1], [2**40] * 3, {})


def packed(text: bytes, body: bytes = BODY, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def mutated(rng: random.Random) -> bytes:
    """One change or a few to the header: its bytes, its length, its keys, or what they say."""
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
    said = json.loads(TEXT)
    name = rng.choice(list(said))
    if kind == 3:
        key = rng.choice([*said[name], "more"])
        said[name][key] = rng.choice(ODD)
        if key in ("shape", "data_offsets") and rng.random() < 0.7:
            said[name][key] = [rng.choice(ODD[3:9]) for _ in range(rng.randrange(4))]
    else:
        said[rng.choice(("", "x", "y", "__metadata__", "a" * 300, "\u202e"))] = rng.choice([*said.values(), *ODD])
    return packed(json.dumps(said).encode(), rng.choice((BODY, BODY, BODY[:-1], BODY + b"\0", b"")))


def try_mutations(folder, n: int, seed: int) -> dict:
    """How many of ``n`` were refused, and the longest time that one took."""
    rng, lines, slowest = random.Random(seed), [], 0.0
    path = folder / "model.safetensors"
    for _ in range(n):
        path.write_bytes(mutated(rng))
        began = time.process_time()
        for reads, error in ((checkpoint.read_tensors, CheckpointError), (load, DataError)):
            try:
                reads(path)
            except error as refusal:
                lines.append(str(refusal))
        slowest = max(slowest, time.process_time() - began)
    assert all(line.isprintable() and len(line) < 1000 for line in lines)
    return {"refused": len(lines), "slowest": slowest}


@pytest.mark.parametrize("n", [1000, pytest.param(20_000, marks=pytest.mark.release)])
def test_mutated_headers(tmp_path, n):
    """Nothing but typed errors, in half a second and 64 MB; about all are refused."""
    parts = [in_child(lambda k=k: try_mutations(tmp_path, 500, k), 300, memory=64 << 20) for k in range(n // 500)]
    assert sum(part["refused"] for part in parts) > 1.5 * n
    assert max(part["slowest"] for part in parts) < 0.5
    print(f"{n:,} mutated headers: {max(p['slowest'] for p in parts):.3f} s at the most")


def refusal(folder, content: bytes) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError) as by_data:
        load(path)
    with pytest.raises(CheckpointError) as by_model:
        checkpoint.read_tensors(path)
    assert by_model.value.code == "DAMAGED"
    return by_data.value.code + " " + by_model.value.cause


def one(**about) -> dict:
    return {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **about}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"x": %(one)s, "x": %(one)s}', "'x' occurs twice"),
        (b'{"x": {"dtype": "U8", "dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', "'dtype' occurs twice"),
        (b'{"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, NaN]}}', "NaN is no number"),
        (b"[]", "is no table"),
        (b"{" + b" " * (9 << 20) + b"}", "9,437,186 bytes long, more than 8,388,608"),
        (b"{" + b'"data_offsets"' * 100_001 + b"}", "more than 100,000 tensors"),
        ({"x": one(), "__metadata__": {"a": 1}}, "metadata are not all text"),
        ({"x": one(), "__metadata__": []}, "metadata are not all text"),
        ({"x": one(more=1)}, "'x' is not described by type, shape and offsets"),
        ({"x": []}, "'x' is not described"),
        ({"x": one(dtype="F8_E4M3")}, "has the type 'F8_E4M3'"),
        ({"x": one(dtype=3)}, "has the type '3'"),
        ({"x": one(shape=[4.0])}, "a shape or offsets that are none"),
        ({"x": one(shape=[True, 4])}, "a shape or offsets that are none"),
        ({"x": one(data_offsets=[0])}, "a shape or offsets that are none"),
        ({"x": one(data_offsets=[-4, 0])}, "a shape or offsets that are none"),
        ({"x": one(shape=[2**62, 2**62])}, "more or fewer bytes"),
        ({"x": one(shape=[3])}, "more or fewer bytes"),
        ({"x": one(), "y": one()}, "overlap or leave a gap at byte 4"),
        ({"x": one(data_offsets=[1, 5])}, "overlap or leave a gap at byte 0"),
        ({"x": one(shape=[5], data_offsets=[0, 5])}, "promises 5 bytes, 4 are there"),
    ],
)
def test_each_rule(tmp_path, text, words):
    if isinstance(text, dict):
        text = json.dumps(text).encode()
    said = refusal(tmp_path, packed(text.replace(b"%(one)s", json.dumps(one()).encode()), b"\0" * 4))
    assert words in said
    assert said.split()[0] in ("BAD_HEADER", "SIZE_MISMATCH")


def test_what_is_written_is_read(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(WHOLE)
    found, _ = checkpoint.read_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    with open(tmp_path / "a.safetensors", "rb") as stream:
        said = headers.read_safetensors(stream, len(WHOLE))
    assert said == {"x": ("U8", (3, 4)), "labels": ("I64", (3,))}
    (tmp_path / "none.safetensors").write_bytes(packed(b"{}", b""))
    with pytest.raises(DataError, match="NO_ARRAY"):
        load(tmp_path / "none.safetensors")
