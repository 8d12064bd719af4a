"""Which formats of images are read, and the format of a file by its first bytes."""

from __future__ import annotations

from undiffuse.runtime.file_errors import FileError

FORMATS = {"PNG": ".png .apng", "JPEG": ".jpg .jpeg .jpe .jfif", "WEBP": ".webp", "BMP": ".bmp .dib"}
FORMATS |= {"TIFF": ".tif .tiff", "GIF": ".gif"}
REFUSED_SUFFIXES = frozenset({".svg", ".psd", ".eps", ".fpx", ".pdf", ".ico", ".heic", ".heif", ".avif", ".jp2"})
SUFFIXES = REFUSED_SUFFIXES | {suffix for suffixes in FORMATS.values() for suffix in suffixes.split()}

_ALLOWED_MAGIC = [(b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF8", "GIF"), (b"BM", "BMP")]
_ALLOWED_MAGIC += [(magic, "TIFF") for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")]
_REFUSED_MAGIC = [(b"8BPS", "PSD"), (b"%PDF", "PDF"), (b"%!PS", "EPS"), (b"\xc5\xd0\xd3\xc6", "EPS")]
_REFUSED_MAGIC += [(b"\0\0\1\0", "ICO"), (b"\xd0\xcf\x11\xe0", "FPX"), (b"\0\0\0\x0cjP", "JPEG 2000")]


def detect_format(data: bytes) -> str:
    """The key of FORMATS for the first bytes of a file; raises `FileError` for all other content."""
    if not data:
        raise FileError("EMPTY_FILE", "the file is empty")
    for magic, name in _ALLOWED_MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for magic, name in _REFUSED_MAGIC:
        if data.startswith(magic):
            raise FileError("FORMAT_NOT_ALLOWED", f"its format is {name}")
    if data[4:8] == b"ftyp":
        name = "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC or another ISO media format"
        raise FileError("FORMAT_NOT_ALLOWED", f"its format is {name}")
    text = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise FileError("LFS_POINTER", "is a Git LFS pointer instead of the image")
    if b"<svg" in text:
        raise FileError("FORMAT_NOT_ALLOWED", "its format is SVG")
    html = ", it looks like HTML" if text.startswith((b"<!doctype", b"<html")) else ""
    raise FileError("NOT_AN_IMAGE", f"its first bytes are not those of an image{html}")
