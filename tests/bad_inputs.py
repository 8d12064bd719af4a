"""Seventy-two kinds of bad or unusual input: a row per case, with a function that makes it and the expected result."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 5, 3), np.uint8)
GREY = RNG.integers(0, 256, (5, 5), np.uint8)
BIG = RNG.integers(0, 256, (64, 64, 3), np.uint8)
SMALL = np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)


@dataclass(frozen=True)
class Row:
    """Case ``number``: ``make`` writes it into a folder and returns the path to load.

    codes    error codes of which one is expected; empty for accepted input
    text     part of the message, or of a note
    file     the path in the message, relative to the folder
    options  keywords of `load`
    as_user  load it as a user without permissions
    """

    number: int
    name: str
    make: Callable[[Path], Path]
    codes: str = ""
    text: str = ""
    file: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    as_user: bool = False

    def __str__(self) -> str:
        return f"{self.number}-{self.name}"


def encoded(array, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(stream, form, **options)
    return stream.getvalue()


def png(width, height, bits, colour, *blocks) -> bytes:
    def block(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(block(n, d) for n, d in [(b"IHDR", head), *blocks, (b"IEND", b"")])


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16-bit grey (H, W, 1), RGB (H, W, 3) or either with alpha."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], (b"IDAT", zlib.compress(rows)))


def tiff(pixels, width, height, bits, *, order="<", samples=1, deflate=False, **tags):
    """A TIFF of one strip; ``tags`` named t262 and so on replace or add tags of type SHORT, None leaves one out."""
    strip = zlib.compress(pixels) if deflate else pixels
    numbers = {256: width, 257: height, 258: [bits] * samples, 259: 8 if deflate else 1, 262: 1, 273: 8}
    numbers |= {277: samples, 278: height, 279: len(strip)}
    numbers |= {int(name[1:]): value for name, value in tags.items()}
    entries, tail = [], b""
    table_at = 8 + len(strip) + len(strip) % 2
    present = {tag: value for tag, value in sorted(numbers.items()) if value is not None}
    tail_at = table_at + 2 + 12 * len(present) + 4
    for tag, value in present.items():
        if isinstance(value, tuple):  # type, count and raw value
            entries.append(struct.pack(f"{order}HHI", tag, *value[:2]) + value[2])
            continue
        values = value if isinstance(value, list) else [value]
        kind, letter = (4, "I") if tag in (273, 279) else (3, "H")
        raw = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(raw) > 4:
            raw, tail = struct.pack(f"{order}I", tail_at + len(tail)), tail + raw
        entries.append(struct.pack(f"{order}HHI", tag, kind, len(values)) + raw.ljust(4, b"\0"))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", table_at)
    table = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return head + strip.ljust(table_at - 8, b"\0") + table + tail


def exif(orientation, *, broken=False):
    """An Exif block: the orientation, and with ``broken`` a text whose place is beyond the end."""
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)]
    entries += [struct.pack("<HHII", 0x0132, 2, 4000, 1 << 20)] * broken
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)


def zeros(megabytes: int) -> bytes:
    """Compressed megabytes of zeros, made in pieces."""
    stream, chunk = zlib.compressobj(1), bytes(1 << 20)
    return b"".join(stream.compress(chunk) for _ in range(megabytes)) + stream.flush()


def frames(form, **options) -> bytes:
    images = [Image.fromarray(RNG.integers(0, 256, (5, 5, 3), np.uint8)) for _ in range(3)]
    return encoded(images[0], form, save_all=True, append_images=images[1:], **options)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def with_thumbnail() -> bytes:
    """A JPEG with a smaller JPEG in its Exif block."""
    return encoded(BIG, "JPEG", exif=b"Exif\0\0" + encoded(RGB, "JPEG"))


def ycck() -> bytes:
    """A JPEG of luma, two chromas and black [Adobe's transform 2] of the colours `BIG`, with the marker set by hand."""
    image = encoded(Image.fromarray(BIG).resize((16, 16)).convert("CMYK"), "JPEG", quality=95)
    at = image.index(b"Adobe") + 11
    return image[:at] + b"\2" + image[at + 1 :]


def exif_loop() -> bytes:
    """A TIFF whose second directory is its first."""
    data = bytearray(encoded(RGB, "TIFF"))
    start = struct.unpack("<I", data[4:8])[0]
    entries = struct.unpack("<H", data[start : start + 2])[0]
    at = start + 2 + 12 * entries
    data[at : at + 4] = struct.pack("<I", start)
    return bytes(data)


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npy_header(shape: str, descr: str = "'|u1'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def zipped(*members, compression=zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return stream.getvalue()


def patched(data: bytes, mark: bytes, offset: int, new: bytes) -> bytes:
    at = data.index(mark) + offset
    return data[:at] + new + data[at + len(new) :]


def encrypted(data: bytes) -> bytes:
    return patched(patched(data, b"PK\1\2", 8, b"\1"), b"PK\3\4", 6, b"\1")


def tensors(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Canary:
    """A pickle that ends the process that loads it."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the canary ran')",)


def torch_pickle() -> bytes:
    stream = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, stream)
    return stream.getvalue()


def file(name: str, content: bytes, folder: Path) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def image(number, name, content, codes, text="", good=False, **options) -> Row:
    """A row for an image in a folder, with two valid ones next to it if ``good``."""

    def make(folder: Path) -> Path:
        file(name, content, folder)
        if good:
            file("good.png", PNG, folder)
            file("good too.png", PNG, folder)
        return folder

    return Row(number, name, make, codes, text, name if codes else None, options)


def array(number, name, content, codes, text="", **options) -> Row:
    return Row(number, name, partial(file, name, content), codes, text, name if codes else None, options)


def folder(number, name, make, codes, text="", names=None, as_user=False, **options) -> Row:
    """A row for a folder that ``make`` fills; the message names the path ``names`` in it."""

    def made_folder(folder: Path) -> Path:
        made = make(folder)
        return folder if made is None else made

    return Row(number, name, made_folder, codes, text, names, options, as_user)


PNG, JPEG = encoded(BIG, "PNG"), encoded(BIG, "JPEG")
ROW16 = zlib.compress(b"\0" + bytes(6))
BITS = zlib.compress(bytes(1251 * 10000), 9)
NPY = npy(SMALL)
OBJECTS, PICKLE = npy(np.array([Canary()], dtype=object)), pickle.dumps(Canary())
ALPHA = np.dstack([RGB, GREY])
PALETTE = Image.fromarray(GREY % 4, "L")
PALETTE.putpalette([9, 9, 9, 80, 0, 0, 0, 80, 0, 0, 0, 80])
LEVELS16 = np.array([[0, 1, 255], [256, 40000, 65535]], np.uint16)


def _pngs(folder: Path, *names: str, content: bytes = PNG) -> None:
    for name in names:
        file(name, content, folder)


def _labelled(table: str, folder: Path) -> None:
    _pngs(folder, "a.png", "b.png", "c.png", "d/e.png")
    (folder / "labels.csv").write_text(table)


def _linked(target: str, folder: Path) -> None:
    _pngs(folder, "a.png")
    (folder / "link.png").symlink_to(target)


def _loop(folder: Path) -> None:
    _pngs(folder, "a/0.png", "b/1.png")
    (folder / "a" / "up").symlink_to(folder)


def _outside(folder: Path) -> Path:
    _pngs(folder, "away/a.png")
    (folder / "here").mkdir()
    (folder / "here" / "a.png").symlink_to(folder / "away" / "a.png")
    return folder / "here"


def _shut(name: str, folder: Path) -> None:
    _pngs(folder, "a.png", "shut/b.png")
    (folder / name).chmod(0)


def _socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "s.png"))


def _odd_names(folder: Path) -> None:
    names = ["\u00e9.png", "e\u0301.png", "\u202egnp.png", "new\nline.png", "l" * 251 + ".png"]
    for i, name in enumerate([*(os.fsencode(name) for name in names), b"\xff\xfe.png"]):
        with open(os.path.join(os.fsencode(folder), name), "wb") as stream:
            stream.write(PNG if i % 2 else b"")


IMAGES = [
    image(1, "half.jpg", JPEG[: len(JPEG) // 2], "TRUNCATED", "the JPEG's end is missing"),
    image(1, "half.webp", encoded(BIG, "WEBP")[:400], "TRUNCATED CORRUPT"),
    image(1, "half.bmp", encoded(BIG, "BMP")[:4000], "TRUNCATED"),
    image(1, "half.gif", encoded(BIG, "GIF")[:1500], "TRUNCATED"),
    image(1, "half.tif", encoded(BIG, "TIFF")[:4000], "TRUNCATED CORRUPT"),
    image(1, "head.jpg", JPEG[:30], "TRUNCATED CORRUPT"),
    image(2, "end.jpg", JPEG[:-1], "TRUNCATED"),
    image(2, "end-with-thumbnail.jpg", with_thumbnail()[:-1], "TRUNCATED"),
    image(3, "half.png", PNG[: len(PNG) // 2], "TRUNCATED", "bytes are missing"),
    image(3, "end.png", PNG[:-12], "TRUNCATED"),
    image(3, "head.png", PNG[:20], "TRUNCATED"),
    image(4, "crc.png", flipped(PNG, len(PNG) // 2), "CORRUPT", "checksum in block IDAT"),
    image(4, "head-crc.png", flipped(PNG, 20), "CORRUPT"),
    image(5, "empty.png", b"", "EMPTY_FILE"),
    image(6, "text.jpg", b"shopping list", "NOT_AN_IMAGE"),
    image(7, "page.png", b"\n<!DOCTYPE html><title>404", "NOT_AN_IMAGE", "looks like HTML"),
    image(8, "lfs.png", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS_POINTER", "git lfs pull"),
    image(9, "b.jpg", PNG, "", "1 of 1 images: PNG with another file extension"),
    image(10, "image", PNG, "", "1 file ignored (no image file extension): image", good=True),
    image(11, "a.JPG", JPEG, ""),
    image(11, "a.JPEG", JPEG, ""),
    image(11, "a.Png", PNG, ""),
    image(12, "still.gif", encoded(RGB, "GIF"), ""),
    image(12, "moving.gif", frames("GIF"), "ANIMATED", "3 frames"),
    image(12, "moving.webp", frames("WEBP"), "ANIMATED", "3 frames"),
    image(12, "moving.png", frames("PNG"), "ANIMATED", "3 frames"),
    image(12, "first.gif", frames("GIF"), "", "1 of 1 images: first of several frames", frames="first"),
    image(12, "all.png", frames("PNG"), "", "3 of 3 images: one of several frames", frames="all"),
    image(13, "pages.tif", frames("TIFF"), "MULTIPAGE", "3 pages"),
    image(13, "all.tif", frames("TIFF"), "", "3 of 3 images: one of several frames", frames="all"),
    image(14, "a.svg", b"<?xml version='1.0'?><svg></svg>", "FORMAT_NOT_ALLOWED", "its format is SVG"),
    image(14, "a.psd", b"8BPS\0\1", "FORMAT_NOT_ALLOWED", "its format is PSD"),
    image(14, "eps.png", b"%!PS-Adobe-3.0 EPSF", "FORMAT_NOT_ALLOWED", "its format is EPS"),
    image(14, "a.pdf", b"%PDF-1.4", "FORMAT_NOT_ALLOWED"),
    image(14, "a.fpx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "FORMAT_NOT_ALLOWED"),
    image(14, "a.ico", encoded(RGB, "ICO"), "FORMAT_NOT_ALLOWED"),
    image(15, "a.heic", b"\0\0\0\x18ftypheic", "FORMAT_NOT_ALLOWED", "HEIC"),
    image(15, "avif.jpg", b"\0\0\0\x18ftypavif", "FORMAT_NOT_ALLOWED", "AVIF"),
    image(16, "bomb.png", png(10000, 10000, 1, 0, (b"IDAT", BITS)), "TOO_MANY_PIXELS"),
    image(16, "large.png", png(9000, 9000, 8, 2, (b"IDAT", b"")), "TOO_MANY_PIXELS", "9000 x 9000 pixels"),
    image(17, "giant.png", png(2**31 - 1, 2**31 - 1, 8, 2, (b"IDAT", b"")), "TOO_MANY_PIXELS"),
    image(18, "text.png", png(1, 1, 8, 0, (b"zTXt", b"a\0\0" + zeros(300))), "TOO_LARGE_METADATA"),
    image(18, "loop.tif", exif_loop(), ""),
    image(19, "grey.png", deep_png(LEVELS16[..., None]), ""),
    image(20, "rgb.png", deep_png(np.dstack([LEVELS16] * 3)), ""),
    image(20, "deep-alpha.png", deep_png(np.dstack([LEVELS16] * 4)), "UNSUPPORTED_DEPTH", "more than 8 bits"),
    image(20, "deep-grey-alpha.png", deep_png(np.dstack([LEVELS16] * 2)), "UNSUPPORTED_DEPTH"),
    image(20, "int.tif", encoded(np.zeros((4, 4), np.int32), "TIFF"), "UNSUPPORTED_DEPTH"),
    image(21, "float.tif", encoded(np.zeros((4, 4), np.float32), "TIFF"), "NEEDS_RANGE", "array in a .npy file"),
    image(22, "nan.tif", encoded(np.full((4, 4), np.nan, np.float32), "TIFF"), "NON_FINITE", "16 pixels"),
    image(23, "palette.png", encoded(PALETTE, "PNG"), ""),
    image(24, "alpha.png", encoded(ALPHA, "PNG"), "", "1 of 1 images: transparency composited", background="#102030"),
    image(24, "clear.png", encoded(PALETTE, "PNG", transparency=0), "", "1 of 1 images: transparency composited"),
    image(25, "bit.png", encoded(GREY > 100, "PNG"), ""),
    image(26, "cmyk.jpg", encoded(Image.fromarray(BIG).convert("CMYK"), "JPEG"), "", "CMYK converted to RGB"),
    image(26, "ycck.jpg", ycck(), "", "CMYK converted to RGB"),
    image(26, "cmyk.tif", encoded(Image.new("CMYK", (4, 4)), "TIFF"), "UNSUPPORTED_COLOUR", "CMYK"),
    image(26, "lab.tif", encoded(Image.new("LAB", (4, 4)), "TIFF"), "UNSUPPORTED_COLOUR", "LAB"),
    image(27, "grey.png", encoded(BIG[..., 0], "PNG"), "MIXED_CHANNELS", "1 channel, where most have 3", good=True),
    image(27, "grey-made-rgb.png", encoded(BIG[..., 0], "PNG"), "", "grey repeated as RGB", good=True, channels=3),
    image(29, "profile.png", encoded(RGB, "PNG", icc_profile=b"broken"), "", "colour profile ignored"),
    image(30, "dot.png", encoded(RGB[:1, :1], "PNG"), "TOO_SMALL", "under a quarter of 16", size=16),
    image(30, "dot-enlarged.png", encoded(RGB[:1, :1], "PNG"), "", "enlarged to 16 x 16", size=16, upscale=True),
    image(31, "line.png", encoded(np.zeros((5000, 1), np.uint8), "PNG"), "ASPECT", "1 x 5000", size=4),
    image(
        31,
        "cut.png",
        encoded(np.zeros((5000, 1), np.uint8), "PNG"),
        "",
        "cropped to the centre square",
        size=4,
        crop=True,
    ),
    image(32, "other.png", encoded(RGB, "PNG"), "MIXED_SIZES", "5 x 5 pixels in 1, such as other.png", good=True),
    image(33, "same.png", PNG, "", "2 of 3 items repeat another one exactly", good=True),
    image(34, "good.jpg", JPEG, "", good=True),
]

FILES = [
    folder(35, "nothing", lambda f: None, "NO_IMAGES", "it is empty"),
    folder(35, "no image", lambda f: file("a.txt", b"", f).parent, "NO_IMAGES", "a.txt"),
    folder(36, "no folder", lambda f: f / "none", "NOT_A_DIRECTORY", "no such file or folder", "none"),
    folder(36, "a file", lambda f: file("a.unknown", b"", f), "NOT_A_DIRECTORY", "is a file", "a.unknown"),
    folder(37, "class", lambda f: _pngs(f, "cats/a.png") or (f / "dogs").mkdir(), "EMPTY_CLASS", "", "dogs"),
    folder(39, "single", lambda f: _pngs(f, "a.png"), "", "there is only one item"),
    folder(40, "shut file", partial(_shut, "a.png"), "PERMISSION", "may not be read", "a.png", as_user=True),
    folder(41, "shut folder", partial(_shut, "shut"), "PERMISSION", "may not be read", "shut", as_user=True),
    folder(42, "dangling", partial(_linked, "none.png"), "BROKEN_LINK", "", "link.png"),
    folder(43, "itself", partial(_linked, "link.png"), "BROKEN_LINK", "back to itself", "link.png"),
    folder(44, "loop", _loop, "", "2 classes from sub-folders: a (1), b (1)"),
    folder(45, "outside", _outside, "", "1 link followed to files outside the folder"),
    folder(46, "pipe", lambda f: os.mkfifo(f / "p.png"), "NOT_A_REGULAR_FILE", "", "p.png"),
    folder(46, "socket", _socket, "NOT_A_REGULAR_FILE", "", "s.png"),
    folder(46, "device", partial(_linked, "/dev/zero"), "NOT_A_REGULAR_FILE", "", "link.png"),
    folder(46, "array", lambda f: os.mkfifo(f / "p.npy") or f / "p.npy", "NOT_A_REGULAR_FILE", "", "p.npy"),
    folder(47, "named x.jpg", lambda f: _pngs(f, "a.png", "x.jpg/b.txt"), "", "1 file ignored"),
    folder(48, "system", lambda f: _pngs(f, "a.png", "._a.jpg", ".DS_Store", "Thumbs.db"), "", "3 hidden or system"),
    folder(49, "odd names", _odd_names, "EMPTY_FILE", "and 2 more: 2 EMPTY_FILE", ""),
    folder(50, "cases", lambda f: _pngs(f, "a.png", "A.png", "A.PNG"), "", "2 of 3 items repeat"),
    folder(52, "long", lambda f: Path(f"{f}/{'a/' * 2500}"), "PATH_TOO_LONG", "", ""),
]

ARRAYS = [
    array(53, "objects.npy", OBJECTS, "PICKLE_REFUSED", "Python objects"),
    array(53, "objects.npz", zipped(("x.npy", OBJECTS)), "PICKLE_REFUSED"),
    array(53, "objects-y.npz", zipped(("x.npy", NPY), ("y.npy", OBJECTS)), "PICKLE_REFUSED"),
    *[array(54, f"pickle{s}", PICKLE, "PICKLE_REFUSED", "run code") for s in (".npy", ".npz", ".pt", ".safetensors")],
    *[array(54, f"torch{s}", torch_pickle(), "PICKLE_REFUSED") for s in (".npy", ".npz", ".ckpt", ".safetensors")],
    array(55, "promise.npy", npy_header("(400000000000,)") + bytes(16), "SIZE_MISMATCH", "400,000,000,000 bytes, 16"),
    array(55, "promise.npz", zipped(("x.npy", npy_header("(400000000000,)") + bytes(16))), "SIZE_MISMATCH"),
    array(56, "huge.npy", npy_header(f"({2**80},)") + bytes(16), "SIZE_MISMATCH"),
    *[
        array(56, f"empty-{n}.npy", npy_header(str(shape), "'<f8'"), code)
        for n, (shape, code) in enumerate(
            [((0, 2**70), "BAD_HEADER"), ((0, 2**59), "SHAPE"), ((2**62, 0), "BAD_HEADER")]
        )
    ],
    *[
        array(56, f"empty-{n}.safetensors", tensors({"x": {"dtype": "F32", "shape": s, "data_offsets": [0, 0]}}), code)
        for n, (s, code) in enumerate([([0, 2**70], "BAD_HEADER"), ([0, 2**62], "BAD_HEADER"), ([0, 4], "SHAPE")])
    ],
    array(56, "negative.npy", npy_header("(-1, 4)") + bytes(16), "BAD_HEADER", "(-1, 4)"),
    array(56, "words.npy", npy_header("words") + bytes(16), "BAD_HEADER"),
    array(56, "code.npy", npy_header("(1,)", "'|u1' if print('ran') else 0") + bytes(1), "BAD_HEADER"),
    array(56, "cut.npy", NPY[:-5], "TRUNCATED", "promises 24 bytes, 19 are there"),
    array(56, "header-cut.npy", NPY[:50], "BAD_HEADER"),
    array(56, "magic-cut.npy", NPY[:7], "BAD_HEADER"),
    array(56, "long.npy", NPY + b"more", "SIZE_MISMATCH"),
    array(56, "long-header.npy", NPY[:6] + b"\2\0\xff\xff\xff\xff" + NPY[10:], "BAD_HEADER", "4294967295"),
    array(56, "version.npy", NPY[:6] + b"\x09\x00" + NPY[8:], "BAD_HEADER"),
    array(56, "empty.npy", b"", "EMPTY_FILE"),
    array(56, "text.npy", b"1, 2, 3\n", "BAD_HEADER"),
    array(56, "text.npz", b"1, 2, 3\n", "BAD_HEADER"),
    array(56, "text.safetensors", b"1, 2, 3\n and more", "BAD_HEADER"),
    array(
        56, "cut.safetensors", tensors({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}), "SIZE_MISMATCH"
    ),
    array(57, "big.npy", npy(SMALL.astype(">u2")), ""),
    array(57, "fortran.npy", npy(np.asfortranarray(SMALL)), ""),
    array(57, "half.npy", npy(SMALL.astype(np.float16) / 8), "", "stored as float32"),
    array(57, "int.npy", npy(SMALL.astype(np.int64)), "", "values run from 0 to 23"),
    array(57, "bool.npy", npy(SMALL > 7), ""),
    array(57, "complex.npy", npy(SMALL.astype(complex)), "DTYPE", "Give bool, integers from 0, or floats"),
    array(57, "string.npy", npy(np.array([["a"]])), "DTYPE"),
    array(57, "record.npy", npy(np.zeros(3, [("a", "f4"), ("b", "f4")])), "DTYPE", "named columns"),
    array(
        58, "bomb.npz", zipped(("x.npy", bytes(1 << 25)), compression=zipfile.ZIP_DEFLATED), "ZIP_BOMB", "33,554,432"
    ),
    array(
        58, "lie.npz", patched(zipped(("x.npy", NPY)), b"PK\1\2", 24, struct.pack("<I", 60)), "BAD_HEADER BAD_ARCHIVE"
    ),
    array(
        58, "large.npz", patched(zipped(("x.npy", NPY)), b"PK\1\2", 20, b"\xff\xff\xff\x7f"), "BAD_ARCHIVE", "larger"
    ),
    array(59, "evil.npz", zipped(("../../x.npy", NPY)), "BAD_ARCHIVE", "points outside of the archive"),
    array(59, "root.npz", zipped(("/x.npy", NPY)), "BAD_ARCHIVE"),
    array(59, "twice.npz", zipped(("x.npy", NPY), ("x", NPY)), "BAD_ARCHIVE", "the same name"),
    array(59, "encrypted.npz", encrypted(zipped(("x.npy", NPY))), "BAD_ARCHIVE"),
    array(59, "flipped.npz", flipped(zipped(("x.npy", NPY)), 170), "BAD_ARCHIVE"),
    array(59, "place.npz", zipped(("x.npy", NPY))[:-6] + b"\0\0\0\x80\0\0", "BAD_ARCHIVE", "an impossible place"),
    array(59, "cut.npz", zipped(("x.npy", NPY))[:-30], "BAD_ARCHIVE"),
    array(59, "several.npz", zipped(("a.npy", NPY), ("b.npy", NPY)), "NO_ARRAY", "contains a, b"),
    array(59, "nothing.npz", zipped(), "NO_ARRAY"),
    array(60, "nan.npy", npy(np.array([[0, 1], [np.nan, 0]], np.float32)), "NON_FINITE", "the value at (1, 0) is nan"),
    array(60, "inf.npy", npy(np.array([[0.0, 1e300]])), "NON_FINITE", "(0, 1)"),
    array(61, "range.npy", npy(SMALL / 1.0), "RANGE", "from 0 to 23", value_range=(-1.0, 1.0)),
    array(61, "negative-whole.npy", npy(np.array([[0, -1]])), "RANGE", "from -1 to 0"),
    array(61, "constant.npy", npy(np.full((4, 1, 2, 2), 7, np.uint8)), "", "the same value everywhere"),
    array(62, "flat.npy", npy(np.zeros(4)), "SHAPE"),
    array(62, "nhwc.npy", npy(BIG[None]), "SHAPE", "looks like NHWC"),
    array(62, "none.npy", npy_header("(0, 4)"), "SHAPE"),
    array(62, "six.npy", npy(np.zeros((1,) * 6)), "SHAPE"),
    array(62, "five-channels.npy", npy(np.zeros((2, 5, 8, 8), np.uint8)), "SHAPE", "images of 5 channels, or volumes"),
    array(62, "channels.npy", npy(np.zeros((2, 5, 8, 8), np.uint8)), "", layout="NCHW"),
    array(62, "volumes.npy", npy(np.zeros((2, 5, 8, 8), np.uint8)), "", "one channel added", layout="NDHW"),
    array(62, "ndhwc.npy", npy(np.zeros((2, 5, 8, 8, 3), np.uint8)), "SHAPE", "looks like NDHWC"),
    *[
        array(63, f"{what}.npz", zipped(("x.npy", NPY), ("y.npy", npy(np.array(y)))), "LABELS", text)
        for what, y, text in (
            ("gap", [0, 2], "1 has no item"),
            ("negative", [0, -1], "1 labels are negative, the first at 1"),
            ("float", [0.0, 1.0], "float64"),
            ("length", [0, 1, 2], "for 2 items"),
            ("many", [0, 1500], "1, 2, 3, 4, 5, ... have no item"),
        )
    ],
    array(63, "cond.npz", zipped(("x.npy", NPY), ("cond.npy", npy(np.zeros((3, 2))))), "CONDITION"),
    array(63, "mask.npz", zipped(("cond.npy", npy(np.zeros((3, 2)))), ("mask.npy", NPY)), "CONDITION"),
]

ROW = "a.png,x\nb.png,y\nc.png,y\n"
LABELS = [
    folder(63, f"{what}.csv", partial(_labelled, table), codes, text, codes and "labels.csv")
    for what, table, codes, text in (
        ("good", f"file,label\n{ROW}./d/e.png,z\na.png,x\n", "", "3 classes from labels.csv: x (1), y (2), z (1)"),
        ("no columns", ROW, "LABELS", "does not name the columns file and label"),
        ("missing file", f"file,label\n{ROW}d/e.png,z\nf.png,z\n", "LABELS", "no such image for 1 file: f.png"),
        ("missing row", f"file,label\n{ROW}", "LABELS", "no row for 1 file: d/e.png"),
        ("two labels", f"file,label\n{ROW}d/e.png,z\na.png,z\nb.png,z\n", "LABELS", "labels for 2 files: a.png"),
        ("empty label", f"file,label\n{ROW}d/e.png,\n", "LABELS", "an empty label for 1 file: d/e.png"),
        ("zeros", "file,label\n\0", "LABELS", ""),
    )
]  # fmt: skip


def _semicolons(folder: Path) -> None:
    _labelled("file;label\na.png;x\nb.png;y\nc.png;y\nd\\e.png;z\n", folder)


def _labels_pipe(folder: Path) -> None:
    _pngs(folder, "a.png")
    os.mkfifo(folder / "labels.csv")


def _shard_beside_images(folder: Path) -> None:
    _pngs(folder, "a.png", "b.png")
    with tarfile.open(folder / "x.tar", "w") as archive:
        archive.add(folder / "a.png", "a.png")


def _idx_without_labels(folder: Path) -> Path:
    return file("x-images-idx3-ubyte", b"\0\0\x08\3" + struct.pack(">3I", 2, 2, 3) + bytes(range(12)), folder)


ODD = [
    image(65, "tail.jpg", JPEG + b"\0\0\0\x18ftypmp42\xff\xda\xff", "", "bytes after its end ignored"),
    image(65, "closed.jpg", JPEG[: len(JPEG) // 2] + b"\xff\xd9", "TRUNCATED", "end before its last pixels"),
    image(65, "film.jpg", JPEG[: len(JPEG) // 2] + b"\0\0\0\x18ftypmp42\xff\x3c", "TRUNCATED"),
    image(66, "rows.png", png(2, 2, 8, 0, (b"IDAT", zlib.compress(b"\0ab"))), "TRUNCATED", "before the last row"),
    image(67, "exif.jpg", encoded(RGB, "JPEG", exif=exif(1)[:-9]), "", "metadata that cannot be read ignored"),
    image(67, "key.png", png(2, 1, 8, 0, (b"zTXt", b"a\0\7x"), (b"IDAT", zlib.compress(b"\0ab"))), ""),
    image(68, "signed.tif", tiff(bytes(16), 4, 4, 8, t339=2), "UNSUPPORTED_DEPTH", "its samples are signed"),
    image(68, "white.tif", tiff(bytes(32), 4, 4, 16, t262=0), ""),
    image(68, "twelve.tif", tiff(bytes(24), 4, 4, 12), ""),
    image(68, "strips.tif", tiff(bytes(16), 4, 4, 8, t278=2), "TRUNCATED", "1 of its 2 strips or tiles are missing"),
    folder(69, "a shard beside images", _shard_beside_images, "AMBIGUOUS", "a WebDataset and also 2 image files", ""),
    folder(70, "a pipe as labels", _labels_pipe, "NOT_A_REGULAR_FILE", "", "labels.csv"),
    folder(70, "semicolons and backslashes", _semicolons, "", "3 classes from labels.csv: x (1), y (2), z (1)"),
    array(71, "index.csv", b",a,b\n0,1,2\n1,3,4\n", "", "lines (pandas' index)"),
    array(71, "classes.csv", b"a,class\n1,cat\n", "TABLE", "'cat' is not a number"),
    folder(72, "idx", _idx_without_labels, "", "no labels: no file of labels beside x-images-idx3-ubyte"),
    array(72, "x-images-idx3-ubyte", b"\0\0\x08\3" + b"\xff" * 12, "TRUNCATED"),
]

ROWS = [*IMAGES, *FILES, *ARRAYS, *LABELS, *ODD]
ELSEWHERE = {
    28: "test_image_folder.py: all eight orientations",
    38: "epochs follow each other without a gap, so a batch may be larger than the data",
    51: "test_bad_inputs.py: files that change",
    64: "test_bad_inputs.py: checkpoints",
}
"""Numbers without a row."""
