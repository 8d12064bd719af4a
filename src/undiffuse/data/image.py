"""One image file's bytes to an array: strict, from an allow-list of formats, with a record of what was done."""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from undiffuse.data.problems import Refused
from undiffuse.errors import ConfigError

MAX_PIXELS = 64_000_000
FORMATS = {"PNG": ".png .apng", "JPEG": ".jpg .jpeg .jpe .jfif", "WEBP": ".webp", "BMP": ".bmp .dib"}
FORMATS |= {"TIFF": ".tif .tiff", "GIF": ".gif"}
REFUSED_SUFFIXES = frozenset({".svg", ".psd", ".eps", ".fpx", ".pdf", ".ico", ".heic", ".heif", ".avif", ".jp2"})
SUFFIXES = REFUSED_SUFFIXES | {suffix for suffixes in FORMATS.values() for suffix in suffixes.split()}

_OURS = [(b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF8", "GIF"), (b"BM", "BMP")]
_OURS += [(start, "TIFF") for start in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")]
_THEIRS = [(b"8BPS", "PSD"), (b"%PDF", "PDF"), (b"%!PS", "EPS"), (b"\xc5\xd0\xd3\xc6", "EPS")]
_THEIRS += [(b"\0\0\1\0", "ICO"), (b"\xd0\xcf\x11\xe0", "FPX"), (b"\0\0\0\x0cjP", "JPEG 2000")]

LUMA = np.array([19595, 38470, 7471], np.uint32)
"""Red, green and blue in grey, of 65536 [ITU-R BT.601]; 16 bits of each fit."""


@dataclass(frozen=True)
class Prepare:
    """What may be done to every image beside decoding it; by default nothing but compositing over white.

    ``size``: pixels a side to resize squares to; ``crop``: cut the centre square out first; ``channels``:
    1 (grey), 3 (RGB) or 4 (RGB and opacity) to convert to; ``background``: colour under transparent pixels, a name or
    "#rrggbb"; ``frames``: "first" or "all" of a file that holds several; ``upscale``: enlarge to more than four times
    an image's side.
    """

    size: int | None = None
    crop: bool = False
    channels: int | None = None
    background: str = "white"
    frames: str | None = None
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and (type(self.size) is not int or not 1 <= self.size <= 8000):
            raise ConfigError("OPTION", "size", f"{self.size!r} is no side in pixels", "Give a number from 1 to 8000")
        if self.channels not in (None, 1, 3, 4):
            fix = "Give 1 (grey), 3 (RGB) or 4 (RGBA)"
            raise ConfigError("OPTION", "channels", f"{self.channels!r} is none of 1, 3 and 4", fix)
        if self.frames not in (None, "first", "all"):
            raise ConfigError("OPTION", "frames", f"{self.frames!r} is unknown", "Give first or all")
        _ = self.colour

    @property
    def colour(self) -> tuple[int, int, int]:
        """``background`` as red, green and blue; ConfigError for what is no opaque colour."""
        try:
            colour = ImageColor.getrgb(self.background)
        except ValueError:
            colour = ()
        if len(colour) != 3:
            fix = 'Give an opaque one, as "white" or "#ffffff"'
            raise ConfigError("OPTION", "background", f"{self.background!r} is no colour", fix)
        return colour


class Picture(NamedTuple):
    pixels: np.ndarray  # (C, H, W) uint8 or uint16
    levels: int  # 2, 256 or 65536
    did: tuple[str, ...]  # what was done, each a phrase that notes can count
    kind: str  # the format of the file, one of FORMATS
    stored: tuple[int, int]  # width and height in the file


def decode(data: bytes, suffix: str, prepare: Prepare) -> Picture:
    """The picture in ``data``, upright; opaque unless 4 channels are asked for.

    ``suffix`` is only compared with what it turns out to be.

    Raises Refused for everything that is not one whole image of an allowed format, or several if ``frames`` are given.
    """
    return decode_all(data, suffix, prepare)[0]


def decode_all(data: bytes, suffix: str, prepare: Prepare) -> list[Picture]:
    """The pictures in ``data`` as `decode` has them: one, or with ``frames="all"`` every frame or page."""
    kind = sniff(data)
    did = [] if suffix.lower() in FORMATS[kind].split() else [f"{kind} whatever the name ends in"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            with Image.open(BytesIO(data), formats=[kind]) as image:
                count = _check_header(image, data, kind, prepare.frames)
                _check_whole(data, kind)
                shown = count if prepare.frames == "all" else 1
                return [_frame(image, data, kind, i, count, did, prepare) for i in range(shown)]
    except (Refused, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused("TOO_MANY_PIXELS", str(error).split(",")[0]) from error
    except Exception as error:  # decoders raise whatever they like
        _check_whole(data, kind)
        text = "not a header that can be read" if isinstance(error, UnidentifiedImageError) else str(error)
        if "MAX_TEXT" in text or "too large for" in text:
            raise Refused(
                "TOO_LARGE_METADATA", "its text or profile blocks are larger than the image may be"
            ) from error
        raise Refused("TRUNCATED" if "truncated" in text.lower() else "CORRUPT", text.rstrip(".")) from error


def _frame(
    image: Image.Image, data: bytes, kind: str, number: int, count: int, did: list[str], prepare: Prepare
) -> Picture:
    """The picture ``number`` of an open image."""
    if number:
        image.seek(number)
    turned = getattr(image, "tag_v2", {}).get(0x0112, 1) != 1  # Pillow turns TIFFs while it loads them
    image.load()
    _check_values(image)
    done = [*did]
    done += [f"{'first' if prepare.frames == 'first' else 'one'} of several frames or pages"] * (count > 1)
    done += ["first picture of a multi-picture JPEG"] * (image.format == "MPO")
    done += ["colour profile ignored"] * ("icc_profile" in image.info)
    done += ["CMYK made RGB, without a colour profile"] * (image.mode == "CMYK")
    done += ["turned upright as its EXIF orientation says"] * (turned or image.getexif().get(0x0112, 1) != 1)
    pixels, levels, how = _pixels(ImageOps.exif_transpose(image), prepare.colour, prepare.channels == 4)
    if kind == "PNG" and _is_deep_colour(data):
        pixels, levels = pixels.astype(np.uint16) << 8 | _low_bytes(data), 65536
    return _prepared(pixels, levels, [*done, *how], prepare, kind, image.size)


def _is_deep_colour(png: bytes) -> bool:
    return png[24:26] == b"\x10\2"  # 16 bits, RGB


def _low_bytes(png: bytes) -> np.ndarray:
    """(H, W, 3) uint8: what Pillow leaves out of 16-bit colours, had by calling their bytes swapped."""
    with Image.open(BytesIO(png), formats=["PNG"]) as image:
        image.tile = [image.tile[0]._replace(args="RGB;16L")]
        return np.asarray(ImageOps.exif_transpose(image))


def sniff(data: bytes) -> str:
    """The format that the first bytes show, one of FORMATS; Refused for everything else."""
    if not data:
        raise Refused("EMPTY_FILE", "holds no bytes")
    for start, kind in _OURS:
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    for start, kind in _THEIRS:
        if data.startswith(start):
            raise Refused("FORMAT_NOT_ALLOWED", f"is a {kind} file")
    if data[4:8] == b"ftyp":
        brand = "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIC or other ISO media"
        raise Refused("FORMAT_NOT_ALLOWED", f"is an {brand} file" if brand == "AVIF" else f"is a {brand} file")
    text = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise Refused("LFS_POINTER", "is a Git LFS pointer, not the image itself")
    if b"<svg" in text:
        raise Refused("FORMAT_NOT_ALLOWED", "is an SVG file")
    html = ", it looks like HTML" if text.startswith((b"<!doctype", b"<html")) else ""
    raise Refused("NOT_AN_IMAGE", f"no image format begins like this{html}")


def _check_header(image: Image.Image, data: bytes, kind: str, frames: str | None) -> int:
    """How many frames or pages there are, 1 where they are none of ours; Refused for what cannot be taken."""
    count = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    shown = count if frames == "all" else 1
    if image.width * image.height * shown > MAX_PIXELS:
        times = f"{shown} times " if shown > 1 else ""
        raise Refused("TOO_MANY_PIXELS", f"{times}{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    if count > 1 and frames is None:
        raise Refused(*("MULTIPAGE", f"{count} pages") if kind == "TIFF" else ("ANIMATED", f"{count} frames"))
    deep = data[24] == 16 if kind == "PNG" else kind == "TIFF" and ";16" in str(getattr(image, "tile", ""))
    whole = image.mode.startswith("I;16") or (kind == "PNG" and image.mode == "RGB" and count == 1)
    if image.mode == "I" or (deep and not whole):
        raise Refused("UNSUPPORTED_DEPTH", "more than 8 bits in several channels, or 32-bit integers")
    if deep and image.has_transparency_data:
        raise Refused("UNSUPPORTED_DEPTH", "16 bits with transparency")
    known = image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "F") or image.mode.startswith("I;16")
    if not known and (image.mode, kind, "adobe" in image.info) != ("CMYK", "JPEG", True):  # the mark says which way
        raise Refused("UNSUPPORTED_COLOUR", f"its colours are {image.mode}")
    return count


def _check_whole(data: bytes, kind: str) -> None:
    """Raise Refused where a JPEG has no end, or where a PNG has none or a block's check sum is wrong."""
    if kind == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise Refused("TRUNCATED", f"the JPEG's end is missing after {len(data):,} bytes")
    at, name = 8, b""
    while kind == "PNG" and name != b"IEND":
        length = int.from_bytes(data[at : at + 4])
        if (missing := at + 12 + length - len(data)) > 0:
            raise Refused("TRUNCATED", f"at least {missing:,} bytes are missing after {len(data):,}")
        name = data[at + 4 : at + 8]
        if struct.pack(">I", zlib.crc32(memoryview(data)[at + 4 : at + 8 + length])) != data[at + 8 + length :][:4]:
            raise Refused("CORRUPT", f"wrong check sum in block {name.decode('latin1')}")
        at += 12 + length


def _check_values(image: Image.Image) -> None:
    if image.mode == "F":
        if bad := int((~np.isfinite(np.asarray(image))).sum()):
            raise Refused("NON_FINITE", f"{bad} pixels are NaN or infinite")
        raise Refused("NEEDS_RANGE", "holds floating-point pixels, whose range an image file does not say")


def _pixels(image: Image.Image, background: tuple[int, int, int], keep: bool) -> tuple[np.ndarray, int, list[str]]:
    """(H, W, C) pixels, levels, what was done: palettes looked up, nothing rescaled.

    Transparency is composited, or with ``keep`` a fourth channel; then what nobody can see is made ``background``.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)[..., None], 65536, []
    if not image.has_transparency_data:
        if image.mode == "1":
            return np.asarray(image).astype(np.uint8)[..., None], 2, []
        flat = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "CMYK") else image)
        return flat.reshape(*flat.shape[:2], -1), 256, []
    grey = image.mode in ("L", "LA") and len(set(background)) == 1 and not keep
    layers = np.asarray(image.convert("LA" if grey else "RGBA")).astype(np.uint16)  # 255 * 255 + 127 fits
    colour, alpha = layers[..., :-1], layers[..., -1:]
    if keep:
        shown = np.where(alpha > 0, colour, background)
        did = ["colours of what is wholly transparent made the background's"] * bool((shown != colour).any())
        return np.concatenate([shown, alpha], 2).astype(np.uint8), 256, did
    if (alpha == 255).all():
        return colour.astype(np.uint8), 256, ["alpha channel, opaque everywhere, dropped"]
    below = np.array(background[:1] if grey else background, np.uint16)
    mixed = (colour * alpha + below * (255 - alpha) + 127) // 255
    return mixed.astype(np.uint8), 256, ["transparency composited over the background"]


def _prepared(
    pixels: np.ndarray, levels: int, did: list[str], prepare: Prepare, kind: str, stored: tuple[int, int]
) -> Picture:
    """Crop, convert and resize as asked, and record each where it changed something."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    if prepare.crop and height != width:
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
        did.append("centre square cut out")
    elif prepare.size and height != width:
        raise Refused("ASPECT", f"{width} x {height} pixels are no square to resize")
    if levels == 2 and (prepare.channels or prepare.size):
        pixels, levels = pixels * np.uint8(255), 256
        did.append("two levels spread to 0 and 255")
    if prepare.channels == 1 and pixels.shape[2] == 3:
        pixels = ((pixels @ LUMA + 0x8000) >> 16).astype(pixels.dtype)[..., None]
        did.append("RGB made grey (ITU-R 601 luma)")
    elif prepare.channels in (3, 4) and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
        did.append("grey repeated as RGB")
    if prepare.channels == 4 and pixels.shape[2] == 3:
        pixels = np.dstack([pixels, np.full_like(pixels[..., :1], levels - 1)])
        did.append("opaque, and said to be")
    if prepare.size and side != prepare.size:
        if side * 4 < prepare.size and not prepare.upscale:
            raise Refused("TOO_SMALL", f"{side} pixels a side are under a quarter of {prepare.size}")
        pixels = _resized(pixels, prepare.size, prepare.colour)
        did.append(f"{'enlarged' if side < prepare.size else 'reduced'} to {prepare.size} x {prepare.size}")
    return Picture(np.ascontiguousarray(pixels.transpose(2, 0, 1)), levels, tuple(did), kind, stored)


def _resized(pixels: np.ndarray, side: int, background: tuple[int, int, int]) -> np.ndarray:
    """(side, side, C) with a Hamming window, whose weights are all positive: nothing can overshoot.

    Of four channels the last is the opacity, by which the others are weighted: what is transparent colours nothing.
    """

    def small(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(plane.astype(np.float32))
        return np.asarray(image.resize((side, side), Image.Resampling.HAMMING))

    if pixels.shape[2] < 4:
        return np.rint(np.dstack([small(plane) for plane in np.moveaxis(pixels, 2, 0)])).astype(pixels.dtype)
    *planes, weight = np.moveaxis(pixels.astype(np.float32), 2, 0)
    opacity = small(weight)
    shown = np.rint(opacity) > 0
    below = np.maximum(opacity, 0.5)
    colours = [np.where(shown, small(p * weight) / below, b) for p, b in zip(planes, background, strict=True)]
    return np.rint(np.dstack([*colours, opacity])).astype(pixels.dtype)
