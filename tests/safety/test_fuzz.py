"""Randomly mutated images and arrays are accepted or refused in one line, without a crash or a hang."""

from __future__ import annotations

import gzip
import io
import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from bad_inputs import exif as exif_block
from bad_inputs import file, tiff
from children import in_child
from PIL import Image

from undiffuse.data.image_decoding import ImageOptions, decode_frames
from undiffuse.data.sources.registry import load
from undiffuse.errors import DataError, ResourceError
from undiffuse.runtime.file_errors import FileError
from undiffuse.runtime.file_headers import read_npy_header

SECONDS, MEMORY = 5.0, 1 << 30
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
ARRAY = np.arange(96, dtype=np.float32).reshape(2, 3, 4, 4)


def seeds() -> dict[str, bytes]:
    """Small files of different kinds."""

    def image(form: str, array: np.ndarray = PIXELS, **options) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, form, **options)
        return stream.getvalue()

    def saved(save, *arrays, **named) -> bytes:
        stream = io.BytesIO()
        save(stream, *arrays, **named)
        return stream.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(PIXELS[::-1])]
    idx = b"\0\0\x08\3" + struct.pack(">3I", 2, 3, 4) + bytes(range(24))
    return {
        "rgb.png": image("PNG", exif=exif),
        "deep.png": image("PNG", PIXELS[..., 0].astype(np.uint16) * 257),
        "alpha.png": image("PNG", np.dstack([PIXELS, PIXELS[..., :1]])),
        "a.jpg": image("JPEG", exif=exif),
        "progressive.jpg": image("JPEG", progressive=True, icc_profile=b"none"),
        "a.webp": image("WEBP", lossless=True),
        "a.bmp": image("BMP"),
        "a.tif": image("TIFF", compression="tiff_lzw"),
        "moving.gif": image("GIF", save_all=True, append_images=frames),
        "a.npy": saved(np.save, ARRAY),
        "a.npz": saved(np.savez_compressed, x=ARRAY, y=np.array([0, 1])),
        "tail.jpg": image("JPEG", exif=exif_block(6)) + b"\0\0\0\x18ftypmp42\xff\xda\xff\xd9",
        "broken-exif.jpg": image("JPEG", exif=exif_block(6, broken=True)),
        "grey.jpg": image("JPEG", np.full((24, 20, 3), 128, np.uint8), progressive=True),
        "twelve.tif": tiff(bytes(range(24)), 4, 4, 12, t270=(2, 99, b"\0\0\1\0")),
        "white.tif": tiff(bytes(range(64)), 8, 8, 8, deflate=True, t262=0, t278=8, t339=1),
        "dark.png": image("PNG", PIXELS // 255),
        "a-images-idx3-ubyte": idx,
        "b-images-idx3-ubyte.gz": gzip.compress(idx),
        "labelled/labels.csv": "file;label\na.png;x\nd\\\u00e9.png;y\n".encode("utf-16"),
        "index.csv": b",Unnamed: 0,a,target\n0,0,1,2\n1,1,3,4\n",
        "a.csv": b"a,b,label\n1,2,x\n3,4.5,y\n-1e3,0,x\n",
    }


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """``data`` with random changes: bits, bytes, sizes in a header, pieces cut, doubled or taken from another."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, end = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
        head = min(len(changed), 64)
        match rng.randrange(9):
            case 0 if changed:
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[rng.randrange(head)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                place = rng.randrange(head + 1)
                changed[place : place + 4] = rng.choice(
                    (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4), b"\0\1\0\0")
                )
            case 3:
                del changed[at:]
            case 4:
                del changed[at:end]
            case 5:
                changed[at:at] = changed[at:end]
            case 6:
                changed[at:end] = other[at:end]
            case 7:
                changed[at:end] = rng.randbytes(end - at)
            case 8:
                changed += rng.randbytes(rng.randrange(64))
    return bytes(changed)


def fuzz(place: Path, n: int, seed: int) -> dict:
    """How many of ``n`` mutated files are accepted, the codes of the errors, and the longest time of one."""
    rng, files = random.Random(seed), seeds()
    names, slowest, accepted, codes = list(files), 0.0, 0, {}
    for name in ("labelled/a.png", "labelled/d/\u00e9.png"):
        file(name, files["rgb.png"], place)
    for i in range(n):
        name = names[i % len(names)]
        content = mutated(files[name], files[rng.choice(names)], rng)
        path = file(name, content, place)
        began = time.process_time()
        try:
            if name.startswith("labelled"):
                load(path.parent)
            elif "idx" in name or name.endswith((".npy", ".npz", ".csv")):
                load(path)
            else:
                for frames in (None, "all"):
                    decode_frames(
                        content, name[-4:], ImageOptions(size=8, crop=True, channels=3, frames=frames, upscale=True)
                    )
            accepted += 1
        except (FileError, DataError, ResourceError) as error:
            codes[error.code] = codes.get(error.code, 0) + 1
        except BaseException as error:
            raise AssertionError(f"{name} {content!r}") from error
        slowest = max(slowest, time.process_time() - began)
    return {"accepted": accepted, "codes": codes, "slowest": slowest}


@pytest.mark.parametrize("n", [2000, pytest.param(50_000, marks=pytest.mark.release)])
def test_mutated_files(tmp_path, n):
    parts = [in_child(lambda k=k: fuzz(tmp_path, 1000, k), 300, memory=MEMORY) for k in range(n // 1000)]
    codes = {code: sum(part["codes"].get(code, 0) for part in parts) for part in parts for code in part["codes"]}
    accepted, slowest = sum(part["accepted"] for part in parts), max(part["slowest"] for part in parts)
    print(f"{n:,} mutated files: {accepted:,} accepted, slowest {slowest:.2f} s, {codes}")
    assert slowest < SECONDS
    assert accepted + sum(codes.values()) == n
    assert 0.02 * n < accepted < 0.6 * n  # some mutations are harmless and some are not
    assert len(codes) >= 8


def test_npy_headers_of_random_bytes():
    rng = random.Random(0)
    start = b"\x93NUMPY\1\0v\0"
    for _ in range(2000):
        text = bytes(rng.choice(b"{}'(),: desc|u1fortan_FlTshp0123456789-L<>[]\\\n\xff") for _ in range(118))
        with pytest.raises(FileError):
            read_npy_header(io.BytesIO(start + text), 500)
