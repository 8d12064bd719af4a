"""Images that other programs write: TIFF tags that change the meaning, bytes after a JPEG's end, broken metadata.

The files are written here byte by byte, by the formats' specifications.
"""

import io
import struct
import zlib

import numpy as np
import pytest
from bad_inputs import JPEG, encoded, exif, flipped, png, tiff
from PIL import Image

from undiffuse.data.image_decoding import ImageOptions, decode_frames, decode_image
from undiffuse.data.image_structure import read_jpeg
from undiffuse.runtime.file_errors import FileError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (24, 40, 3), np.uint8)
SMOOTH = (np.mgrid[:48, :64].sum(0)[..., None] + [0, 40, 90]).astype(np.uint8)


def decode(data, suffix=".tif", **options):
    return decode_image(data, suffix, ImageOptions(**options))


def code(data, suffix=".tif"):
    with pytest.raises(FileError) as caught:
        decode(data, suffix)
    return caught.value.code


def packed_bits(values, bits):
    """Rows of (H, W) samples of ``bits`` bits, most significant first, each padded to whole bytes."""
    rows = ((values[..., None].astype(np.int64) >> np.arange(bits)[::-1]) & 1).reshape(len(values), -1)
    return np.packbits(rows.astype(np.uint8), axis=1).tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_tiffs(order, deflate, bits, white_is_zero):
    """Right values or a refusal: 0 is black in the result, whatever it is in the file."""
    values = RNG.integers(0, 2**bits, (5, 7))
    values[0, :2] = 0, 2**bits - 1
    raw = values.astype(f"{order}u2").tobytes() if bits == 16 else packed_bits(values, bits)
    data = tiff(raw, 7, 5, bits, order=order, deflate=deflate, t262=0 if white_is_zero else 1)
    if (bits == 12 and (white_is_zero or order == ">")) or (bits == 16 and white_is_zero and order == ">"):
        assert code(data) == "UNSUPPORTED_DEPTH"  # Pillow has no decoder
        return
    image = decode(data)
    meant = 2**bits - 1 - values if white_is_zero else values
    if 1 < bits < 8:
        meant = meant * 255 // (2**bits - 1)  # 0 .. 3 and 0 .. 15 become 0 .. 255, exactly
    np.testing.assert_array_equal(image.pixels[0], meant)
    assert image.num_values == (2**bits if bits in (1, 12, 16) else 256)


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("samples", [1, 3])
def test_signed_tiffs_are_refused(bits, samples):
    raw = RNG.integers(-50, 50, (4, 4, samples)).astype(f"<i{bits // 8}").tobytes()
    interpretation = {"t262": 2 if samples == 3 else 1}
    data = tiff(raw, 4, 4, bits, samples=samples, t339=[2] * samples, **interpretation)
    assert code(data) == "UNSUPPORTED_DEPTH"


def test_a_tiff_that_does_not_say_what_zero_is():
    assert code(tiff(bytes(range(16)), 4, 4, 8, t262=None)) == "UNSUPPORTED_COLOUR"


def test_twelve_bits_with_options():
    values = RNG.integers(0, 4096, (8, 8))
    data = tiff(packed_bits(values, 12), 8, 8, 12)
    image = decode(data, channels=4, size=4)
    assert (image.pixels.shape, image.num_values, image.pixels.dtype) == ((4, 4, 4), 4096, np.uint16)
    assert (image.pixels[3] == 4095).all()


@pytest.mark.parametrize("tag", [306, 270, 34665, 33432])
def test_unreadable_tiff_metadata_are_ignored(tag):
    """A text whose place is beyond the end of the file."""
    values = np.arange(16, dtype=np.uint8)
    data = tiff(values.tobytes(), 4, 4, 8, **{f"t{tag}": (2, 99, struct.pack("<I", 1 << 20))})
    image = decode(data)
    assert image.pixels.ravel().tolist() == values.tolist()
    assert image.changes == ("metadata that cannot be read ignored",)


@pytest.mark.parametrize("tag", [258, 262, 273, 274, 317, 320, 339])
def test_unreadable_tiff_tags_that_matter_are_not(tag):
    data = tiff(bytes(range(16)), 4, 4, 8, **{f"t{tag}": (3, 99, struct.pack("<I", 1 << 20))})
    assert code(data) in ("CORRUPT", "TRUNCATED")


def jpegs():
    progressive = {"progressive": True}
    return [
        pytest.param(encoded(SMOOTH, "JPEG", quality=90, **options), id=name)
        for name, options in {
            "baseline": {},
            "no subsampling": {"subsampling": 0},
            "restarts": {"restart_marker_rows": 1},
            "progressive": progressive,
            "optimized": {"optimize": True, "comment": b"\xff\xd9\xff\xda in a comment"},
        }.items()
    ] + [pytest.param(encoded(SMOOTH[..., 0], "JPEG"), id="grey")]


MP4 = b"\0\0\0\x18ftypmp42" + RNG.integers(0, 256, 20_000, np.uint8).tobytes() + b"\xff\xda\0\3 \xff\xd8\xff\xe0"


@pytest.mark.parametrize("data", jpegs())
@pytest.mark.parametrize("after", [b"\0", b"\xff", b"\xff\xda\xff", MP4, JPEG, JPEG[:300], JPEG[:-2]])
def test_bytes_after_a_jpeg_are_ignored(data, after):
    expected = decode(data, ".jpg")
    image = decode(data + after, ".jpg")
    np.testing.assert_array_equal(image.pixels, expected.pixels)
    assert expected.changes == ()
    assert image.changes == ("bytes after its end ignored",)


def test_an_image_without_a_suffix_has_no_other_file_extension():
    """As in a table, whose rows have no names of files."""
    assert decode(encoded(RGB, "PNG"), "").changes == ()
    assert decode(encoded(RGB, "PNG"), ".jpg").changes == ("PNG with another file extension",)


def test_bytes_after_a_png_are_noted():
    assert decode(encoded(RGB, "PNG") + b"more", ".png").changes == ("bytes after its end ignored",)


@pytest.mark.parametrize("data", jpegs())
@pytest.mark.parametrize("after", [b"", MP4, JPEG, b"\0" * 900], ids=["nothing", "film", "image", "zeros"])
def test_a_cut_jpeg_is_refused_whatever_follows(data, after):
    jpeg = read_jpeg(data)
    first = next(start for marker, start, _ in jpeg.segments if marker == 0xDA) + 20
    for end in range(first, jpeg.end - 2, max(1, (jpeg.end - first) // 60)):
        assert code(data[:end] + after, ".jpg") in ("TRUNCATED", "CORRUPT"), end


@pytest.mark.parametrize("data", jpegs())
def test_a_jpeg_that_is_cut_and_closed_again_is_refused(data):
    """Within a scan, up to 24 bytes before its end, so that at least a block is missing."""
    jpeg = read_jpeg(data)
    marks = [(start, end) for marker, start, end in jpeg.segments if marker == 0xDA]
    start, end = max(marks, key=lambda mark: mark[1] - mark[0])
    last = end == marks[-1][1]
    for cut in range(start + 24, end - 24, max(1, (end - start) // 60)):
        if data[cut - 1] == 0xFF:
            continue
        shorter = data[:cut] + (b"\xff\xd9" if last else data[end:])
        assert code(shorter, ".jpg") == "TRUNCATED", (cut, start, end)


def test_grey_corners_are_accepted():
    grey = np.full((32, 32, 3), 128, np.uint8)
    for options in ({}, {"progressive": True}, {"subsampling": 0}):
        assert (decode(encoded(grey, "JPEG", **options), ".jpg").pixels == 128).all()
    inks = Image.fromarray(SMOOTH).convert("CMYK")
    assert decode(encoded(inks, "JPEG"), ".jpg").pixels.shape == (3, 48, 64)


def test_a_jpeg_without_one_of_its_components():
    """Three scans of a component each; the last is left out."""
    data = encoded(SMOOTH, "JPEG", progressive=True)
    jpeg = read_jpeg(data)
    scans = [(s, e) for marker, s, e in jpeg.segments if marker == 0xDA]
    header = [data[s:e] for marker, s, e in jpeg.segments if s < scans[0][0]]
    one = next(data[s:e] for s, e in scans if data[s + 4] == 1)
    assert code(data[:2] + b"".join(header) + one + b"\xff\xd9", ".jpg") == "TRUNCATED"


def broken_exif():
    whole = exif(6, broken=True)
    return {
        "tag": whole,
        "cut": exif(6)[:-9],
        "count": exif(6)[:14] + b"\xff\xff" + exif(6)[16:],
        "order": b"Exif\0\0XX*\0\x08\0\0\0\1\0" + bytes(16),
        "place": b"Exif\0\0II*\0" + b"\xff" * 4 + bytes(20),
        "type": exif(6)[:18] + b"\xee" + exif(6)[19:],
        "empty": b"Exif\0\0",
    }


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", broken_exif())
def test_broken_exif_does_not_cost_the_image(form, name):
    image = encoded(RGB, form, exif=broken_exif()[name], **({"lossless": True} if form == "WEBP" else {}))
    expected = encoded(RGB, form, **({"lossless": True} if form == "WEBP" else {}))
    suffix = f".{form.lower()}"
    decoded, plain = decode(image, suffix), decode(expected, suffix)
    if "rotated upright by its EXIF orientation" in decoded.changes:  # it could be read
        assert name in ("tag", "count")
        return
    np.testing.assert_array_equal(decoded.pixels, plain.pixels)
    assert set(decoded.changes) <= {"metadata that cannot be read ignored"}


@pytest.mark.parametrize("orientation", [0, 1, 9, 500])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_meaningless_orientations_are_not_noted(orientation, form):
    tags = {"tiffinfo": {274: orientation}} if form == "TIFF" else {"exif": exif(orientation)}
    image = decode(encoded(RGB, form, **tags), f".{form.lower()}")
    assert image.changes == ()
    np.testing.assert_array_equal(image.pixels, decode(encoded(RGB, form), f".{form.lower()}").pixels)


ROW = zlib.compress(b"\0" + bytes(range(9)))
PNG_BLOCKS = {
    "key": (b"tEXt", b"\xff\xfe\x80\0text"),
    "no key": (b"tEXt", b"no separator"),
    "empty": (b"tEXt", b""),
    "method": (b"zTXt", b"a\0\7text"),
    "stream": (b"zTXt", b"a\0\0no stream"),
    "international": (b"iTXt", b"a\0"),
    "international method": (b"iTXt", b"a\0\1\7en\0key\0text"),
    "not utf-8": (b"iTXt", b"a\0\0\0\xff\0\xff\0\xff\xff"),
    "profile": (b"iCCP", b"a"),
    "profile method": (b"iCCP", b"a\0\7x"),
    "gamma": (b"gAMA", b"\1"),
    "chroma": (b"cHRM", b"\1"),
    "resolution": (b"pHYs", b"\1"),
    "intent": (b"sRGB", b""),
    "exif": (b"eXIf", b"x"),
    "time": (b"tIME", b""),
}


@pytest.mark.parametrize("name", PNG_BLOCKS)
def test_odd_png_blocks_do_not_cost_the_image(name):
    image = decode(png(3, 1, 8, 2, PNG_BLOCKS[name], (b"IDAT", ROW)), ".png")
    assert image.pixels[:, 0].T.ravel().tolist() == list(range(9))
    assert set(image.changes) <= {"metadata that cannot be read ignored", "colour profile ignored"}


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 8, 16])
@pytest.mark.parametrize("colour", [0, 2])
def test_a_png_whose_data_end_before_the_last_row(interlaced, bits, colour):
    """The compressed stream itself is whole, and so are all checksums."""
    if bits == 1 and colour == 2:
        return
    width, height, channels = 13, 11, 3 if colour == 2 else 1
    starts = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = []
    for x, y, across, down in starts if interlaced else [(0, 0, 1, 1)]:
        columns = len(range(x, width, across))
        size = (columns * channels * bits + 7) // 8
        rows += (
            [b"\0" + RNG.integers(1, 200, size, np.uint8).tobytes() for _ in range(y, height, down)] if columns else []
        )

    def image(content):
        head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, int(interlaced))
        blocks = [(b"IHDR", head), (b"IDAT", zlib.compress(content)), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in blocks
        )

    whole = b"".join(rows)
    assert decode(image(whole), ".png").pixels.shape == (channels, height, width)
    assert decode(image(bytes(len(whole))), ".png").pixels.max() == 0
    for count in range(1, len(rows)):
        assert code(image(b"".join(rows[:count])), ".png") == "TRUNCATED", count


@pytest.mark.parametrize("tags", [{"t278": 4}, {"t278": 1}, {"t322": 16, "t323": 4}])
def test_a_tiff_without_its_last_strips(tags):
    assert code(tiff(bytes(range(64)), 8, 8, 8, **tags)) in ("TRUNCATED", "CORRUPT")
    assert decode(tiff(bytes(range(64)), 8, 8, 8, t278=None)).pixels[0, 7, 7] == 63


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(60, 600), (600, 60)])
def test_a_rotated_tiff_has_the_strips_of_its_stored_height(width, height, orientation):
    values, size = np.random.default_rng(0).integers(1, 256, (height, width), dtype=np.uint8), 10 * width
    upright = decode(tiff(values.tobytes(), width, height, 8, t274=orientation)).pixels

    def strips(count):
        offsets = [8 + size * i for i in range(count)]
        return tiff(values.tobytes(), width, height, 8, t274=orientation, t278=10, t273=offsets, t279=[size] * count)

    np.testing.assert_array_equal(decode(strips(height // 10)).pixels, upright)
    assert code(strips(height // 10 - 2)) == "TRUNCATED"


@pytest.mark.parametrize("mode", ["LAB", "CMYK", "I"])
def test_each_page_of_a_tiff_has_a_supported_mode(mode):
    first = Image.new("L" if mode == "I" else "RGB", (8, 8), 7)
    stream = io.BytesIO()
    first.save(stream, "TIFF", save_all=True, append_images=[Image.new(mode, (8, 8))])
    with pytest.raises(FileError) as caught:
        decode_frames(stream.getvalue(), ".tif", ImageOptions(frames="all"))
    assert caught.value.code in ("UNSUPPORTED_COLOUR", "UNSUPPORTED_DEPTH")


def test_errors_are_not_in_the_words_of_python():
    """Damaged headers of every format: a code and words of this package or of the decoder."""
    words = ("NoneType", "object at", "argument", "unpack", "range", "tuple", "codec", "attribute", "iterable")
    for form in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"):
        data = encoded(RGB[:6, :6], form)
        for at in range(8, min(len(data), 160)):
            for changed in (flipped(data, at), data[:at] + b"\xff\xff" + data[at + 2 :]):
                reason = ""
                try:
                    decode_frames(changed, f".{form.lower()}", ImageOptions())
                except FileError as error:
                    reason = error.reason
                assert not any(word in reason for word in words), (form, at, reason)


def test_a_cut_in_the_last_block_is_the_limit():
    """What docs/data.md states: chroma of the last block alone is not missed."""
    stream = io.BytesIO()
    Image.fromarray(SMOOTH).save(stream, "JPEG", quality=90)
    data = stream.getvalue()
    decode(data[:-3] + b"\xff\xd9", ".jpg")
