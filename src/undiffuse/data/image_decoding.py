"""Decode the bytes of an image file: strict, from an allow-list of formats, with a record of every change."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageOps, TiffImagePlugin, UnidentifiedImageError

from undiffuse.data.decoding_threads import warnings_as_errors
from undiffuse.data.image_formats import FORMATS, detect_format
from undiffuse.data.image_structure import Jpeg, check_complete, check_png_rows, continued, read_jpeg, without_metadata
from undiffuse.errors import ConfigError
from undiffuse.runtime.file_errors import FileError

logging.getLogger("PIL").addHandler(logging.NullHandler())  # its errors become ours: none goes to standard error
MAX_PIXELS = 64_000_000
TURNED = range(2, 9)
"""Orientations [Exif 2.3, tag 0x0112] other than upright; other numbers have no meaning."""
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
            fix = "Give a number from 1 to 8000"
            raise ConfigError("OPTION", "size", f"{self.size!r} is not a side in pixels", fix)
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
    num_values: int  # 2, 256, 65536, or 4096 for 12 bits
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
    known = not suffix or suffix.lower() in FORMATS[file_format].split()
    changes = [] if known else [f"{file_format} with another file extension"]
    try:
        return _decode(data, file_format, changes, options)
    except (FileError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FileError("TOO_MANY_PIXELS", str(error).split(",")[0]) from error
    except Exception as error:  # decoders raise exceptions of many types
        check_complete(data, file_format)
        if "MAX_TEXT" in str(error) or "too large for" in str(error):
            cause = "its text or profile blocks are larger than allowed"
            raise FileError("TOO_LARGE_METADATA", cause) from error
        with suppress(Exception):
            if (plain := without_metadata(data, file_format)) != data:
                return _decode(plain, file_format, [*changes, "metadata that cannot be read ignored"], options)
        raise _decoding_error(error, data, file_format) from error


def _decode(data: bytes, file_format: str, changes: list[str], options: ImageOptions) -> list[DecodedImage]:
    """`decode_frames` with Pillow's exceptions, and its warnings as exceptions."""
    with warnings_as_errors(), Image.open(BytesIO(data), formats=[file_format]) as image:
        count = _check_header(image, data, file_format, options.frames)
        jpeg = read_jpeg(data) if file_format == "JPEG" else None
        rest = len(data) - jpeg.end if jpeg else check_complete(data, file_format)
        if rest and image.format != "MPO":
            changes = [*changes, "bytes after its end ignored"]
        if jpeg:
            _check_scans(image, data, jpeg)
        frames = range(count if options.frames == "all" else 1)
        return [_frame(image, data, file_format, i, count, changes, options) for i in frames]


def _decoding_error(error: Exception, data: bytes, file_format: str) -> FileError:
    """The `FileError` for an exception of a decoder, without the words of Python's own exceptions."""
    text = str(error).rstrip(".") if isinstance(error, OSError | SyntaxError | Warning) else "it cannot be decoded"
    if isinstance(error, UnidentifiedImageError):
        text = "its header is invalid"
        try:
            if file_format == "TIFF":
                TiffImagePlugin.TiffImageFile(BytesIO(data))
        except SyntaxError as reason:
            if "unknown pixel mode" in str(reason):
                return FileError("UNSUPPORTED_DEPTH", "its samples have a type or a number of bits that is not read")
        except Exception:  # its header is invalid
            pass
    return FileError("TRUNCATED" if "truncated" in text.lower() else "CORRUPT", text)


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
        _check_mode(image, data, file_format, count)
    is_white_zero, depth = _tiff_samples(image) if file_format == "TIFF" else (False, 16)
    was_turned = getattr(image, "tag_v2", {}).get(0x0112, 1) in TURNED  # Pillow rotates TIFFs while it loads them
    stored = np.asarray(image)
    _check_values(image)
    if file_format == "PNG" and index == 0 and (image.info.get("interlace") or not stored[-1].any()):
        check_png_rows(data)  # missing rows are decoded as zeros
    changes = [*changes]
    changes += [f"{'first' if options.frames == 'first' else 'one'} of several frames or pages"] * (count > 1)
    changes += ["first image of a multi-picture JPEG"] * (image.format == "MPO")
    changes += ["colour profile ignored"] * ("icc_profile" in image.info)
    changes += ["CMYK converted to RGB without a colour profile"] * (image.mode == "CMYK")
    is_turned = image.getexif().get(0x0112, 1) in TURNED
    changes += ["rotated upright by its EXIF orientation"] * (was_turned or is_turned)
    upright = ImageOps.exif_transpose(image) if is_turned else image
    stored = np.asarray(upright) if is_turned else stored
    pixels, num_values, change = _pixels(upright, stored, options.colour, options.channels == 4)
    if num_values == 65536 and depth < 16:
        num_values = 1 << depth
    if num_values > 256 and is_white_zero:  # Pillow inverts the others
        pixels = np.uint16(num_values - 1) - pixels
    if file_format == "PNG" and _is_deep_colour(data):
        pixels, num_values = pixels.astype(np.uint16) << 8 | _low_bytes(data), 65536
    if change is not None:
        changes.append(change)
    return _prepared(pixels, num_values, changes, options, file_format, image.size)


def _tiff_samples(image: Image.Image) -> tuple[bool, int]:
    """(whether 0 is white, bits per sample).

    Raises `FileError` for signed samples, for missing strips, and if it is not stated what 0 means.
    """
    tags = getattr(image, "tag_v2", {})
    if 2 in tags.get(339, ()):
        raise FileError("UNSUPPORTED_DEPTH", "its samples are signed", "Save the values as an array in a .npy file")
    if 262 not in tags:
        raise FileError("UNSUPPORTED_COLOUR", "it does not state whether 0 is black or white")
    width, height = tags.get(256, image.width), tags.get(257, image.height)  # as stored, not as rotated
    across, down = tags.get(322, width), tags.get(323) or tags.get(278) or height
    blocks = -(-width // across) * -(-height // min(down, height))
    blocks *= tags.get(277, 1) if tags.get(284, 1) == 2 else 1
    if (there := len(tags.get(324, tags.get(273, ())))) < blocks:  # missing ones are decoded as zeros
        raise FileError("TRUNCATED", f"{blocks - there} of its {blocks} strips or tiles are missing")
    return tags[262] == 0, tags.get(258, (1,))[0]


def _check_scans(image: Image.Image, data: bytes, jpeg: Jpeg) -> None:
    """Raise `FileError` (TRUNCATED) if a scan of a JPEG ends before its last pixels, although the file goes on.

    Decoders fill missing blocks with grey 128. A file that may be such a one (its last pixel is that grey, or it has
    several scans or inks) is decoded again with more data in each scan: a complete image stays the same.
    """
    corner = image.getpixel((image.width - 1, image.height - 1))
    is_plain = len(jpeg.scan_ends) == 1 and image.mode != "CMYK"
    if jpeg.is_arithmetic or (is_plain and corner not in (128, (128, 128, 128))):
        return
    with Image.open(BytesIO(continued(data, jpeg)), formats=["JPEG"]) as other:
        if not np.array_equal(np.asarray(image), np.asarray(other)):
            raise FileError("TRUNCATED", "the JPEG's data end before its last pixels")


def _is_deep_colour(png: bytes) -> bool:
    return png[24:26] == b"\x10\2"  # 16 bits, RGB


def _low_bytes(png: bytes) -> np.ndarray:
    """(H, W, 3) uint8: low bytes of 16-bit colours. Pillow drops them, so it decodes the colours with swapped bytes."""
    with Image.open(BytesIO(png), formats=["PNG"]) as image:
        image.tile = [image.tile[0]._replace(args="RGB;16L")]
        return np.asarray(ImageOps.exif_transpose(image))


def _check_header(image: Image.Image, data: bytes, file_format: str, frames: str | None) -> int:
    """The number of frames or pages (1 for multi-picture JPEGs); raises `FileError` for unsupported images."""
    count = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    decoded = count if frames == "all" else 1
    if image.width * image.height * decoded > MAX_PIXELS:
        times = f"{decoded} times " if decoded > 1 else ""
        raise FileError("TOO_MANY_PIXELS", f"{times}{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    if count > 1 and frames is None:
        raise FileError(*("MULTIPAGE", f"{count} pages") if file_format == "TIFF" else ("ANIMATED", f"{count} frames"))
    _check_mode(image, data, file_format, count)
    return count


def _check_mode(image: Image.Image, data: bytes, file_format: str, count: int) -> None:
    """Raise `FileError` if this one of the ``count`` images has a depth or a colour mode that is not supported."""
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
    if not is_supported and (image.mode, file_format, "adobe" in image.info) != ("CMYK", "JPEG", True):
        raise FileError("UNSUPPORTED_COLOUR", f"its colour mode is {image.mode}")


def _check_values(image: Image.Image) -> None:
    if image.mode == "F":
        if count := int((~np.isfinite(np.asarray(image))).sum()):
            raise FileError("NON_FINITE", f"{count} pixels are NaN or infinite")
        raise FileError("NEEDS_RANGE", "its pixels are floating-point numbers of unknown range")


def _pixels(
    image: Image.Image, stored: np.ndarray, background: tuple[int, int, int], keep_alpha: bool
) -> tuple[np.ndarray, int, str | None]:
    """(pixels (H, W, C), num_values, the change of transparency if there is one), with palettes resolved.

    ``stored`` are the values of the ``image`` in its own mode.

    Transparency is composited over ``background``. With ``keep_alpha`` it is the fourth channel, and fully transparent
    pixels get the background's colour.
    """
    if image.mode.startswith("I;16"):
        return stored.astype(np.uint16)[..., None], 65536, None
    if not image.has_transparency_data:
        if image.mode == "1":
            return stored.astype(np.uint8)[..., None], 2, None
        opaque = np.asarray(image.convert("RGB")) if image.mode in ("P", "PA", "CMYK") else stored
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
