"""Decode the bytes of an image file: strict, from an allow-list of formats, with a record of every change."""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from undiffuse.errors import ConfigError
from undiffuse.runtime.file_errors import FileError

MAX_PIXELS = 64_000_000
FORMATS = {"PNG": ".png .apng", "JPEG": ".jpg .jpeg .jpe .jfif", "WEBP": ".webp", "BMP": ".bmp .dib"}
FORMATS |= {"TIFF": ".tif .tiff", "GIF": ".gif"}
REFUSED_SUFFIXES = frozenset({".svg", ".psd", ".eps", ".fpx", ".pdf", ".ico", ".heic", ".heif", ".avif", ".jp2"})
SUFFIXES = REFUSED_SUFFIXES | {suffix for suffixes in FORMATS.values() for suffix in suffixes.split()}

_ALLOWED_MAGIC = [(b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xff\xd8\xff", "JPEG"), (b"GIF8", "GIF"), (b"BM", "BMP")]
_ALLOWED_MAGIC += [(magic, "TIFF") for magic in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")]
_REFUSED_MAGIC = [(b"8BPS", "PSD"), (b"%PDF", "PDF"), (b"%!PS", "EPS"), (b"\xc5\xd0\xd3\xc6", "EPS")]
_REFUSED_MAGIC += [(b"\0\0\1\0", "ICO"), (b"\xd0\xcf\x11\xe0", "FPX"), (b"\0\0\0\x0cjP", "JPEG 2000")]

LUMA = np.array([19595, 38470, 7471], np.uint32)
"""Weights of red, green and blue in grey, times 65536 [ITU-R BT.601]; products with 16-bit values fit."""


@dataclass(frozen=True)
class ImageOptions:
    """Changes to every image apart from decoding; by default only compositing over white.

    size        resize square images to this many pixels per side
    crop        crop to the centre square first
    channels    convert to 1 (grey), 3 (RGB) or 4 (RGBA)
    background  colour behind transparent pixels, a name or "#rrggbb"
    frames      "first" or "all" of a file with several frames or pages
    upscale     allow enlargement to more than four times an image's side
    """

    size: int | None = None
    crop: bool = False
    channels: int | None = None
    background: str = "white"
    frames: str | None = None
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and (type(self.size) is not int or not 1 <= self.size <= 8000):
            raise ConfigError(
                "OPTION", "size", f"{self.size!r} is not a side in pixels", "Give a number from 1 to 8000"
            )
        if self.channels not in (None, 1, 3, 4):
            fix = "Give 1 (grey), 3 (RGB) or 4 (RGBA)"
            raise ConfigError("OPTION", "channels", f"{self.channels!r} is not 1, 3 or 4", fix)
        if self.frames not in (None, "first", "all"):
            raise ConfigError("OPTION", "frames", f"{self.frames!r} is unknown", "Give first or all")
        _ = self.colour

    @property
    def colour(self) -> tuple[int, int, int]:
        """``background`` as red, green, blue; `ConfigError` unless it is an opaque colour."""
        try:
            colour = ImageColor.getrgb(self.background)
        except ValueError:
            colour = ()
        if len(colour) != 3:
            fix = 'Give an opaque colour, such as "white" or "#ffffff"'
            raise ConfigError("OPTION", "background", f"{self.background!r} is not an opaque colour", fix)
        return colour


class DecodedImage(NamedTuple):
    pixels: np.ndarray  # (C, H, W) uint8 or uint16
    num_values: int  # 2, 256 or 65536
    changes: tuple[str, ...]  # one phrase per change, for the notes of the data set
    format: str  # of the file, a key of FORMATS
    size_on_disk: tuple[int, int]  # width and height of the file's image


def decode_image(data: bytes, suffix: str, options: ImageOptions) -> DecodedImage:
    """The first image in ``data``, upright, opaque unless 4 channels are requested.

    A ``suffix`` that does not match the content is only noted. Raises `FileError` for everything that is not one
    complete image of an allowed format (several images, if ``options.frames`` is set).
    """
    return decode_frames(data, suffix, options)[0]


def decode_frames(data: bytes, suffix: str, options: ImageOptions) -> list[DecodedImage]:
    """The images in ``data`` as `decode_image` returns them: one, or every frame or page with ``frames="all"``."""
    file_format = detect_format(data)
    changes = [] if suffix.lower() in FORMATS[file_format].split() else [f"{file_format} with another file extension"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            with Image.open(BytesIO(data), formats=[file_format]) as image:
                count = _check_header(image, data, file_format, options.frames)
                _check_complete(data, file_format)
                frames = range(count if options.frames == "all" else 1)
                return [_frame(image, data, file_format, i, count, changes, options) for i in frames]
    except (FileError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FileError("TOO_MANY_PIXELS", str(error).split(",")[0]) from error
    except Exception as error:  # decoders raise exceptions of many types
        _check_complete(data, file_format)
        text = "its header is invalid" if isinstance(error, UnidentifiedImageError) else str(error)
        if "MAX_TEXT" in text or "too large for" in text:
            cause = "its text or profile blocks are larger than allowed"
            raise FileError("TOO_LARGE_METADATA", cause) from error
        raise FileError("TRUNCATED" if "truncated" in text.lower() else "CORRUPT", text.rstrip(".")) from error


def _frame(
    image: Image.Image,
    data: bytes,
    file_format: str,
    index: int,
    count: int,
    changes: list[str],
    options: ImageOptions,
) -> DecodedImage:
    """Frame ``index`` of ``count`` of an open image."""
    if index:
        image.seek(index)
    was_turned = getattr(image, "tag_v2", {}).get(0x0112, 1) != 1  # Pillow rotates TIFFs while it loads them
    image.load()
    _check_values(image)
    changes = [*changes]
    changes += [f"{'first' if options.frames == 'first' else 'one'} of several frames or pages"] * (count > 1)
    changes += ["first image of a multi-picture JPEG"] * (image.format == "MPO")
    changes += ["colour profile ignored"] * ("icc_profile" in image.info)
    changes += ["CMYK converted to RGB without a colour profile"] * (image.mode == "CMYK")
    changes += ["rotated upright by its EXIF orientation"] * (was_turned or image.getexif().get(0x0112, 1) != 1)
    pixels, num_values, change = _pixels(ImageOps.exif_transpose(image), options.colour, options.channels == 4)
    if file_format == "PNG" and _is_deep_colour(data):
        pixels, num_values = pixels.astype(np.uint16) << 8 | _low_bytes(data), 65536
    if change is not None:
        changes.append(change)
    return _prepared(pixels, num_values, changes, options, file_format, image.size)


def _is_deep_colour(png: bytes) -> bool:
    return png[24:26] == b"\x10\2"  # 16 bits, RGB


def _low_bytes(png: bytes) -> np.ndarray:
    """(H, W, 3) uint8: low bytes of 16-bit colours. Pillow drops them, so it decodes the colours with swapped bytes."""
    with Image.open(BytesIO(png), formats=["PNG"]) as image:
        image.tile = [image.tile[0]._replace(args="RGB;16L")]
        return np.asarray(ImageOps.exif_transpose(image))


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


def _check_header(image: Image.Image, data: bytes, file_format: str, frames: str | None) -> int:
    """The number of frames or pages (1 for multi-picture JPEGs); raises `FileError` for unsupported images."""
    count = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    decoded = count if frames == "all" else 1
    if image.width * image.height * decoded > MAX_PIXELS:
        times = f"{decoded} times " if decoded > 1 else ""
        cause = f"{times}{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}"
        raise FileError("TOO_MANY_PIXELS", cause)
    if count > 1 and frames is None:
        raise FileError(*("MULTIPAGE", f"{count} pages") if file_format == "TIFF" else ("ANIMATED", f"{count} frames"))
    is_deep = (
        data[24] == 16 if file_format == "PNG" else file_format == "TIFF" and ";16" in str(getattr(image, "tile", ""))
    )
    is_complete = image.mode.startswith("I;16") or (file_format == "PNG" and image.mode == "RGB" and count == 1)
    if image.mode == "I" or (is_deep and not is_complete):
        raise FileError("UNSUPPORTED_DEPTH", "more than 8 bits in several channels, or 32-bit integers")
    if is_deep and image.has_transparency_data:
        raise FileError("UNSUPPORTED_DEPTH", "16 bits with transparency")
    is_supported = image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "F") or image.mode.startswith("I;16")
    # Only Adobe's marker tells whether 255 is full ink or none.
    is_adobe_cmyk = (image.mode, file_format, "adobe" in image.info) == ("CMYK", "JPEG", True)
    if not is_supported and not is_adobe_cmyk:
        raise FileError("UNSUPPORTED_COLOUR", f"its colour mode is {image.mode}")
    return count


def _check_complete(data: bytes, file_format: str) -> None:
    """Raise `FileError` for a JPEG or PNG without its end, and for a PNG block with a wrong checksum."""
    if file_format == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise FileError("TRUNCATED", f"the JPEG's end is missing after {len(data):,} bytes")
    offset, name = 8, b""
    while file_format == "PNG" and name != b"IEND":
        length = int.from_bytes(data[offset : offset + 4])
        if (missing := offset + 12 + length - len(data)) > 0:
            raise FileError("TRUNCATED", f"at least {missing:,} bytes are missing after {len(data):,}")
        name = data[offset + 4 : offset + 8]
        checksum = zlib.crc32(memoryview(data)[offset + 4 : offset + 8 + length])
        if struct.pack(">I", checksum) != data[offset + 8 + length :][:4]:
            raise FileError("CORRUPT", f"wrong checksum in block {name.decode('latin1')}")
        offset += 12 + length


def _check_values(image: Image.Image) -> None:
    if image.mode == "F":
        if count := int((~np.isfinite(np.asarray(image))).sum()):
            raise FileError("NON_FINITE", f"{count} pixels are NaN or infinite")
        raise FileError("NEEDS_RANGE", "its pixels are floating-point numbers of unknown range")


def _pixels(
    image: Image.Image, background: tuple[int, int, int], keep_alpha: bool
) -> tuple[np.ndarray, int, str | None]:
    """(pixels (H, W, C), num_values, the change of transparency if there is one), with palettes resolved.

    Transparency is composited over ``background``. With ``keep_alpha`` it is the fourth channel, and fully transparent
    pixels get the background's colour.
    """
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)[..., None], 65536, None
    if not image.has_transparency_data:
        if image.mode == "1":
            return np.asarray(image).astype(np.uint8)[..., None], 2, None
        opaque = np.asarray(image.convert("RGB") if image.mode in ("P", "PA", "CMYK") else image)
        return opaque.reshape(*opaque.shape[:2], -1), 256, None
    is_grey = image.mode in ("L", "LA") and len(set(background)) == 1 and not keep_alpha
    layers = np.asarray(image.convert("LA" if is_grey else "RGBA")).astype(np.uint16)  # 255 * 255 + 127 fits
    colour, alpha = layers[..., :-1], layers[..., -1:]
    if keep_alpha:
        visible = np.where(alpha > 0, colour, background)
        change = "fully transparent pixels given the background's colour" if (visible != colour).any() else None
        return np.concatenate([visible, alpha], 2).astype(np.uint8), 256, change
    if (alpha == 255).all():
        return colour.astype(np.uint8), 256, "opaque alpha channel dropped"
    behind = np.array(background[:1] if is_grey else background, np.uint16)
    mixed = (colour * alpha + behind * (255 - alpha) + 127) // 255
    return mixed.astype(np.uint8), 256, "transparency composited over the background"


def _prepared(
    pixels: np.ndarray,
    num_values: int,
    changes: list[str],
    options: ImageOptions,
    file_format: str,
    size_on_disk: tuple[int, int],
) -> DecodedImage:
    """Crop, convert and resize (H, W, C) pixels by the ``options``, and record each change."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    if options.crop and height != width:
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
        changes.append("cropped to the centre square")
    elif options.size and height != width:
        raise FileError("ASPECT", f"{width} x {height} pixels are not square, so they cannot be resized")
    if num_values == 2 and (options.channels or options.size):
        pixels, num_values = pixels * np.uint8(255), 256
        changes.append("two values expanded to 0 and 255")
    if options.channels == 1 and pixels.shape[2] == 3:
        pixels = ((pixels @ LUMA + 0x8000) >> 16).astype(pixels.dtype)[..., None]
        changes.append("RGB converted to grey (ITU-R 601 luma)")
    elif options.channels in (3, 4) and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
        changes.append("grey repeated as RGB")
    if options.channels == 4 and pixels.shape[2] == 3:
        pixels = np.dstack([pixels, np.full_like(pixels[..., :1], num_values - 1)])
        changes.append("opaque alpha channel added")
    if options.size and side != options.size:
        if side * 4 < options.size and not options.upscale:
            raise FileError("TOO_SMALL", f"{side} pixels per side are under a quarter of {options.size}")
        pixels = _resized(pixels, options.size, options.colour)
        changes.append(f"{'enlarged' if side < options.size else 'reduced'} to {options.size} x {options.size}")
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return DecodedImage(channels_first, num_values, tuple(changes), file_format, size_on_disk)


def _resized(pixels: np.ndarray, side: int, background: tuple[int, int, int]) -> np.ndarray:
    """(side, side, C), resampled with a Hamming window: its weights are positive, so values cannot overshoot.

    The fourth of four channels is the opacity. It weights the colours, so that transparent pixels do not affect them.
    """

    def resample(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(plane.astype(np.float32))
        return np.asarray(image.resize((side, side), Image.Resampling.HAMMING))

    if pixels.shape[2] < 4:
        return np.rint(np.dstack([resample(plane) for plane in np.moveaxis(pixels, 2, 0)])).astype(pixels.dtype)
    *planes, weight = np.moveaxis(pixels.astype(np.float32), 2, 0)
    opacity = resample(weight)
    is_visible = np.rint(opacity) > 0
    divisor = np.maximum(opacity, 0.5)
    colours = [
        np.where(is_visible, resample(plane * weight) / divisor, behind)
        for plane, behind in zip(planes, background, strict=True)
    ]
    return np.rint(np.dstack([*colours, opacity])).astype(pixels.dtype)
