"""The blocks of JPEG, PNG, WebP and TIFF files: whether an image is complete, and the image without its metadata."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from undiffuse.runtime.file_errors import FileError

SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""The marker that ends a JPEG's scan: stuffed bytes and restart markers are part of the scan [ITU-T T.81, B.1.1.5].

More bytes 0xFF may be before it; without ``+`` the search is ten times as fast."""
AFTER_SCAN = frozenset({0xC4, 0xCC, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)})
"""Markers that may follow a scan: tables, another scan, comments, the end."""
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
ARITHMETIC = frozenset(range(0xC9, 0xD0))
JPEG_METADATA = frozenset(range(0xE1, 0xF0)) - {0xEE} | {0xFE}
"""Application segments but JFIF's, and Adobe's on which the colours depend; comments."""
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row, and steps between columns and rows, of each pass of an interlaced PNG."""
PNG_IMAGE = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"})
WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
"""Metadata chunks of a WebP file, and the flag in its VP8X chunk that announces each."""
TIFF_METADATA = frozenset({269, 270, 271, 272, 282, 283, 285, 296, 305, 306, 315, 316, 700, 33432, 33550, 33723, 33922})
TIFF_METADATA |= {34377, 34665, 34675, 34735, 34736, 34737, 34853, 42112, 42113, 50341, 50838, 50839}
"""Tags on which no pixel depends: texts, dates, resolution, XMP, IPTC, Exif, GPS, profiles, GeoTIFF, GDAL, ImageJ."""
FILLER = bytes((73 * i * i + 41 * i) % 255 for i in range(1, 513))
"""Bytes that continue a scan that ends early: no 0xFF, so no marker."""


@dataclass
class Jpeg:
    """Where a JPEG's first image ends, and its segments (marker, start, end); scans are segments of marker 0xDA."""

    end: int = 0
    frame: int = 0  # the marker of its process
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    components: set[int] = field(default_factory=set)

    @property
    def scan_ends(self) -> list[int]:
        return [end for marker, _, end in self.segments if marker == 0xDA]

    @property
    def is_arithmetic(self) -> bool:
        return self.frame in ARITHMETIC


def read_jpeg(data: bytes) -> Jpeg:
    """The structure of the first image in ``data``, from its beginning to its own end; bytes after that do not matter.

    Raises `FileError` (TRUNCATED) if the end is missing, a scan ends with a marker that cannot follow it, or a
    component has no scan.
    """
    jpeg, at, scanned = Jpeg(), 2, set()
    while True:
        at = data.find(b"\xff", at)
        while at >= 0 and data[at : at + 1] == b"\xff":
            at += 1
        marker = data[at] if 0 < at < len(data) else None
        if marker is None:
            raise FileError("TRUNCATED", f"the JPEG's end is missing after {len(data):,} bytes")
        at += 1
        start = at - 2
        if marker == 0xD9:
            jpeg.end = at
            if jpeg.components - scanned:
                raise FileError("TRUNCATED", "the JPEG ends before all of its colour components")
            return jpeg
        if marker in (0, 1) or 0xD0 <= marker <= 0xD8:
            continue
        at += int.from_bytes(data[at : at + 2])
        if marker in FRAMES:
            jpeg.frame, jpeg.components = marker, set(data[start + 10 : at : 3])
        if marker == 0xDA:
            scanned |= set(data[start + 5 : at - 3 : 2])
            first, end = at, SCAN_END.search(data, at)
            at = end.start() if end else len(data)
            while end and at > first and data[at - 1] == 0xFF:
                at -= 1
            if end and end[0][1] not in AFTER_SCAN:
                raise FileError("TRUNCATED", f"the JPEG's data end early, after {at:,} bytes")
        jpeg.segments.append((marker, start, at))


def continued(data: bytes, jpeg: Jpeg) -> bytes:
    """The same JPEG with more data at the end of each scan. A decoder reads them only if a scan ends too early."""
    parts, start = [], 0
    for end in jpeg.scan_ends:
        parts += [data[start:end], FILLER]
        start = end
    return b"".join([*parts, data[start : jpeg.end]])


def check_complete(data: bytes, file_format: str) -> int:
    """The number of bytes after the end of a JPEG or PNG, 0 for other formats.

    Raises `FileError` if the end is missing, or for a PNG block with a wrong checksum.
    """
    if file_format == "JPEG":
        return len(data) - read_jpeg(data).end
    if file_format == "PNG":
        return len(data) - max(end for _, _, end in _png_blocks(data, check=True))
    return 0


def check_png_rows(data: bytes) -> None:
    """Raise `FileError` (TRUNCATED) if the compressed data of a PNG end before its last row [PNG, 7.2 and 8.2]."""
    width, height, bits, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    passes = ADAM7 if interlace else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // across), -(-(height - y) // down)) for x, y, across, down in passes]
    bits *= PNG_CHANNELS[colour]
    missing = sum(rows * (1 + (columns * bits + 7) // 8) for columns, rows in sizes if columns > 0 and rows > 0)
    stream = zlib.decompressobj()
    for name, start, end in _png_blocks(data):
        part = data[start + 8 : end - 4] if name == b"IDAT" else b""
        while part and missing > 0:
            missing -= len(stream.decompress(part, min(missing, 1 << 20)))
            part = stream.unconsumed_tail
    if missing > 0:
        raise FileError("TRUNCATED", f"its data end {missing:,} bytes before the last row")


def without_metadata(data: bytes, file_format: str) -> bytes:
    """The same image without the blocks that no pixel depends on: Exif, XMP, colour profiles, texts, times.

    Raises `FileError` as `check_complete`; other formats are returned as they are.
    """
    if file_format == "JPEG":
        jpeg = read_jpeg(data)
        kept = [data[start:end] for marker, start, end in jpeg.segments if marker not in JPEG_METADATA]
        return b"".join([data[:2], *kept, b"\xff\xd9"])
    if file_format == "PNG":
        return data[:8] + b"".join(data[a:b] for name, a, b in _png_blocks(data) if name in PNG_IMAGE)
    if file_format == "WEBP":
        return _webp_without_metadata(data)
    return _tiff_without_metadata(data) if file_format == "TIFF" else data


def _png_blocks(data: bytes, check: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each block up to the last."""
    offset, name = 8, b""
    while name != b"IEND":
        length = int.from_bytes(data[offset : offset + 4])
        if (missing := offset + 12 + length - len(data)) > 0:
            raise FileError("TRUNCATED", f"at least {missing:,} bytes are missing after {len(data):,}")
        name = data[offset + 4 : offset + 8]
        checksum = zlib.crc32(memoryview(data)[offset + 4 : offset + 8 + length])
        if check and struct.pack(">I", checksum) != data[offset + 8 + length :][:4]:
            raise FileError("CORRUPT", f"wrong checksum in block {name.decode('latin1')}")
        yield name, offset, offset + 12 + length
        offset += 12 + length


def _webp_without_metadata(data: bytes) -> bytes:
    chunks, offset = [], 12
    while offset + 8 <= len(data):
        name, length = data[offset : offset + 4], int.from_bytes(data[offset + 4 : offset + 8], "little")
        chunk = data[offset : offset + 8 + length + length % 2]
        if name == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~sum(WEBP_METADATA.values())]) + chunk[9:]
        chunks += [chunk] * (name not in WEBP_METADATA)
        offset += 8 + length + length % 2
    content = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def _tiff_without_metadata(data: bytes) -> bytes:
    """Each directory without its metadata tags, in place; BigTIFF is returned as it is."""
    order = "<" if data[:2] == b"II" else ">"
    edited, visited, at = bytearray(data), set(), struct.unpack_from(f"{order}I", data, 4)[0]
    if data[2:4] not in (b"*\0", b"\0*"):
        return data
    while at and at not in visited:
        visited.add(at)
        count = struct.unpack_from(f"{order}H", data, at)[0]
        end = at + 2 + 12 * count
        entries = [data[start : start + 12] for start in range(at + 2, end, 12)]
        kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] not in TIFF_METADATA]
        directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + data[end : end + 4]
        edited[at : at + len(directory)] = directory
        at = struct.unpack_from(f"{order}I", data, end)[0]
    return bytes(edited)
