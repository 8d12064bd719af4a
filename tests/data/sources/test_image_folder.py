"""Folders of images: formats, depths, transparency, orientation, labels, ignored and refused files."""

import os

import numpy as np
import pytest
from bad_inputs import encoded
from PIL import Image

from undiffuse.data.image_decoding import ImageOptions
from undiffuse.data.sources.registry import load
from undiffuse.errors import ConfigError
from undiffuse.runtime.file_errors import BadFilesError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 5, 3), np.uint8)
GREY = RNG.integers(0, 256, (5, 5), np.uint8)


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def load_one(folder):
    """(pixels (C, H, W), num_values, notes) of the only image in ``folder``."""
    data = load(folder)
    assert len(data) == 1
    return data.values[0], data.num_values, " | ".join(data.notes)


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.webp", "a.JPG", "a.Png", "a.gif"])
def test_six_formats_keep_their_pixels(tmp_path, name):
    pixels = np.full((5, 5, 3), 128, np.uint8) if name in ("a.JPG", "a.gif") else RGB
    save(tmp_path / name, pixels, lossless=True)
    values, num_values, notes = load_one(tmp_path)
    np.testing.assert_array_equal(values, pixels.transpose(2, 0, 1))
    assert num_values == 256
    assert "images:" not in notes


def test_sixteen_bits_are_kept(tmp_path):
    grey = np.array([[0, 1, 255], [256, 40000, 65535]], np.uint16)
    save(tmp_path / "a.png", grey)
    save(tmp_path / "b.tif", grey)
    big = Image.frombytes("I;16B", (3, 2), grey.astype(">u2").tobytes())
    save(tmp_path / "c.tif", big)
    data = load(tmp_path)
    assert (data.num_values, data.values.dtype) == (65536, np.uint16)
    for values in data.values:
        np.testing.assert_array_equal(values[0], grey)


def test_sixteen_bits_are_resized_without_overshoot(tmp_path):
    edge = np.repeat(np.array([0, 65535], np.uint16), 4)[None].repeat(8, 0)
    save(tmp_path / "a.png", edge)
    values = load(tmp_path, size=4).values[0, 0]
    assert (values[:, 0] == 0).all()
    assert (values[:, -1] == 65535).all()
    assert values.dtype == np.uint16


def test_one_bit_images_have_two_values(tmp_path):
    save(tmp_path / "a.png", GREY > 100)
    values, num_values, _ = load_one(tmp_path)
    np.testing.assert_array_equal(values[0], GREY > 100)
    assert num_values == 2
    expanded = load(tmp_path, channels=3)
    np.testing.assert_array_equal(expanded.values[0], np.broadcast_to(255 * (GREY > 100), (3, 5, 5)))
    assert "1 of 1 images: two values expanded to 0 and 255" in expanded.notes


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_are_resolved_exactly(tmp_path, bits):
    index = (GREY.astype(int) % 2**bits).astype(np.uint8)
    image = Image.fromarray(index, "L").convert("L")
    image.putpalette(RNG.integers(0, 256, 3 * 2**bits).tolist())
    colours = np.array(image.getpalette()).reshape(-1, 3)
    save(tmp_path / "a.png", image, bits=bits)
    np.testing.assert_array_equal(load_one(tmp_path)[0], colours[index].transpose(2, 0, 1))


def composited(colour, alpha, below):
    """round(colour alpha/255 + below (1 − alpha/255)), halves rounded up, in exact integers."""
    colour, alpha = colour.astype(int), alpha.astype(int)[..., None]
    return (2 * (colour * alpha + np.array(below) * (255 - alpha)) + 255) // 510


@pytest.mark.parametrize(("background", "below"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_transparency_is_composited(tmp_path, background, below):
    save(tmp_path / "a.png", np.dstack([RGB, GREY]))
    data = load(tmp_path, background=background)
    np.testing.assert_array_equal(data.values[0], composited(RGB, GREY, below).transpose(2, 0, 1))
    assert "1 of 1 images: transparency composited over the background" in data.notes
    assert f"the background is {background}" in data.notes


def test_hidden_colours_are_removed(tmp_path):
    save(tmp_path / "a.png", np.dstack([RGB, np.zeros_like(GREY)]))
    palette = Image.fromarray(GREY % 4).convert("L")
    palette.putpalette([9, 9, 9, 80, 0, 0, 0, 80, 0, 0, 0, 80])
    save(tmp_path / "b.png", palette, transparency=bytes([0, 0, 0, 0]))
    save(tmp_path / "c.gif", palette, transparency=0)
    save(tmp_path / "d.png", RGB, transparency=tuple(RGB[0, 0].tolist()))
    data = load(tmp_path)
    assert (data.values[:2] == 255).all()
    assert (data.values[2][:, GREY % 4 == 0] == 255).all()
    assert (data.values[3][:, 0, 0] == 255).all()
    np.testing.assert_array_equal(data.values[3][:, 1:], RGB.transpose(2, 0, 1)[:, 1:])


def test_grey_with_alpha_stays_grey(tmp_path):
    alpha = RNG.integers(0, 256, (5, 5), np.uint8)
    save(tmp_path / "a.png", Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)]))
    expected = composited(GREY[..., None], alpha, (255,)).transpose(2, 0, 1)
    np.testing.assert_array_equal(load_one(tmp_path)[0], expected)
    assert load(tmp_path, background="red").item_shape == (3, 5, 5)
    save(tmp_path / "a.png", np.dstack([RGB, np.full_like(GREY, 255)]))
    assert "opaque alpha channel dropped" in load_one(tmp_path)[2]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_all_eight_orientations_give_the_same_pixels(tmp_path, suffix):
    upright = RNG.integers(0, 256, (4, 6, 3), np.uint8)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }
    for orientation, pixels in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(tmp_path / f"{orientation}{suffix}", np.ascontiguousarray(pixels), exif=exif, lossless=True)
    data = load(tmp_path)
    for values in data.values:
        np.testing.assert_array_equal(values, upright.transpose(2, 0, 1))
    assert any(note.startswith("7 of 8 images: rotated upright") for note in data.notes)


def test_crop_size_and_channels(tmp_path):
    wide = RNG.integers(0, 256, (4, 8, 3), np.uint8)
    save(tmp_path / "a.png", wide)
    np.testing.assert_array_equal(load(tmp_path, crop=True).values[0], wide[:, 2:6].transpose(2, 0, 1))
    data = load(tmp_path, crop=True, size=2, channels=1)
    assert data.item_shape == (1, 2, 2)
    changes = ["RGB converted to grey (ITU-R 601 luma)", "cropped to the centre square", "reduced to 2 x 2"]
    assert data.notes == (*(f"1 of 1 images: {change}" for change in changes), "there is only one item")
    assert "1 of 1 images: enlarged to 7 x 7" in load(tmp_path, crop=True, size=7).notes
    difference = load(tmp_path, crop=True, channels=1).values[0, 0] - wide[:, 2:6] @ [0.299, 0.587, 0.114]
    assert abs(difference).max() <= 0.51


def test_resizing_keeps_constant_images(tmp_path):
    save(tmp_path / "a.png", np.full((50, 50, 3), (0, 77, 255), np.uint8))
    for size in (7, 25, 90):
        assert (load(tmp_path, size=size).values[0].reshape(3, -1) == np.array([[0], [77], [255]])).all()


def test_sub_folders_are_classes(tmp_path):
    for name in ("b/1.png", "a/2.png", "a/deep/0.png", "c/3.png"):
        save(tmp_path / name, RNG.integers(0, 256, (5, 5, 3), np.uint8))
    (tmp_path / ".git").mkdir()
    data = load(tmp_path)
    assert data.classes == ("a", "b", "c")
    assert data.labels.tolist() == [0, 0, 1, 2]
    assert data.notes == ("1 hidden or system file ignored", "3 classes from sub-folders: a (2), b (1), c (1)")
    save(tmp_path / "loose.png", RGB)
    data = load(tmp_path)
    assert data.labels is None
    assert "no labels: 1 image outside of all sub-folders" in data.notes


@pytest.mark.parametrize("name", ["x.csv", "x.npy"])
def test_the_name_of_a_folder_is_free(tmp_path, name):
    save(tmp_path / name / "a.png", RGB)
    assert load(tmp_path / name).item_shape == (3, 5, 5)


def test_one_sub_folder_is_not_a_class(tmp_path):
    save(tmp_path / "images" / "a.png", RGB)
    data = load(tmp_path)
    assert data.labels is None
    assert "no labels: all images are in one sub-folder" in data.notes


def test_ignored_files_are_counted(tmp_path):
    save(tmp_path / "a.png", RGB)
    save(tmp_path / "A.PNG", RGB)  # 50: names that differ only in case
    save(tmp_path / "b.jpg", RGB, format="PNG")  # 9: the content determines the format
    (tmp_path / "x.jpg").mkdir()  # 47
    for name in ("._a.jpg", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"junk")
    (tmp_path / "image").write_bytes(b"")
    (tmp_path / "read\nme.txt").write_bytes(b"")
    data = load(tmp_path)
    assert len(data) == 3
    assert data.notes == (
        "2 files ignored (no image file extension): image, read\\nme.txt",
        "3 hidden or system files ignored",
        "1 of 3 images: PNG with another file extension",
        "2 of 3 items repeat another one exactly",
    )


def test_unusual_names(tmp_path):
    names = ["\u00e9.png", "e\u0301.png", "\u202egnp.png", "new\nline.png", "l" * 251 + ".png"]
    raw = [os.fsencode(name) for name in names] + [b"\xff\xfe.png"]
    for name in raw:
        save(tmp_path / "0.png", RGB)
        os.rename(tmp_path / "0.png", os.path.join(os.fsencode(tmp_path), name))
    data = load(tmp_path)
    assert len(data) == len(raw)
    for name in raw:
        os.truncate(os.path.join(os.fsencode(tmp_path), name), 0)
    with pytest.raises(BadFilesError) as caught:
        load(tmp_path)
    for problem in caught.value.problems:
        assert str(BadFilesError([problem])).isprintable()


def test_cycles_of_links_end(tmp_path):
    save(tmp_path / "a" / "0.png", RGB)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a")
    links = [tmp_path / f"{i}link" for i in range(8)]  # visited after a, whatever the order on disk
    for link in links:
        link.symlink_to(tmp_path / "a")
    save(tmp_path / "b" / "0.png", RGB)
    with pytest.raises(BadFilesError) as caught:
        load(tmp_path)
    assert [problem[:2] for problem in caught.value.problems] == [(link, "EMPTY_CLASS") for link in links]
    for link in links:
        link.unlink()
    assert load(tmp_path).classes == ("a", "b")


@pytest.mark.parametrize("missing", [1, 2])
def test_a_jpeg_without_its_end_is_refused(tmp_path, missing):
    """Pillow alone accepts about one in twenty."""
    for seed in range(100):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
        (tmp_path / f"{seed}.jpg").write_bytes(encoded(pixels, "JPEG")[:-missing])
    with pytest.raises(BadFilesError) as caught:
        load(tmp_path)
    assert [problem.code for problem in caught.value.problems] == ["TRUNCATED"] * 100


@pytest.mark.parametrize(
    ("second", "code"),
    [
        (np.zeros((5, 6, 3), np.uint8), "MIXED_SIZES"),
        (np.zeros((5, 5), np.uint8), "MIXED_CHANNELS"),
        (np.zeros((5, 5), np.uint16), "MIXED_CHANNELS"),
    ],
)
def test_mixed_images(tmp_path, second, code):
    for name in ("a.png", "b.png"):
        save(tmp_path / name, RGB)
    path = save(tmp_path / "0.png", second)
    with pytest.raises(BadFilesError) as caught:
        load(tmp_path)
    assert caught.value.code == code
    assert [problem[:2] for problem in caught.value.problems] == [(path, code)]
    assert "in 2, such as a.png" in str(caught.value)


def test_images_of_several_kinds_keep_the_majority_of_each_property(tmp_path):
    for name in "abcd":
        save(tmp_path / f"{name}.png", GREY)
    for name, pixels in (("channels", RGB), ("depth", GREY.astype(np.uint16)), ("size", GREY[:3])):
        save(tmp_path / f"{name}.png", pixels)
    data = load(tmp_path, on_bad="skip")
    assert data.names == ("a.png", "b.png", "c.png", "d.png")
    assert [(problem.path.stem, problem.code) for problem in data.report.skipped] == [
        ("size", "MIXED_SIZES"),
        ("channels", "MIXED_CHANNELS"),
        ("depth", "MIXED_DEPTH"),
    ]


def test_very_large_files_are_not_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as stream:
        stream.truncate(513 << 20)
    with pytest.raises(BadFilesError, match=r"^error\[TOO_LARGE\]"):
        load(tmp_path)


def test_first_image_of_a_multi_picture_jpeg(tmp_path):
    second = Image.fromarray(RGB[::-1])
    save(tmp_path / "a.jpg", RGB, format="MPO", save_all=True, append_images=[second])
    save(tmp_path / "b" / "b.jpg", RGB)
    data = load(tmp_path)
    np.testing.assert_array_equal(data.values[0], data.values[1])
    assert "1 of 2 images: first image of a multi-picture JPEG" in data.notes


def test_a_broken_link_is_reported_once(tmp_path):
    save(tmp_path / "a" / "0.png", RGB)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").symlink_to("nothing")
    with pytest.raises(BadFilesError) as caught:
        load(tmp_path)
    assert [problem.code for problem in caught.value.problems] == ["BROKEN_LINK"]


def test_mixed_depths(tmp_path):
    save(tmp_path / "a.png", GREY)
    save(tmp_path / "b.png", GREY > 9)
    with pytest.raises(BadFilesError, match=r"^error\[MIXED_DEPTH\]"):
        load(tmp_path)
    assert load(tmp_path, channels=1).num_values == 256


def test_shapes_that_cannot_be_resized(tmp_path):
    save(tmp_path / "a.png", np.zeros((1, 500), np.uint8))
    save(tmp_path / "b.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(BadFilesError) as caught:
        load(tmp_path, size=9)
    assert [problem.code for problem in caught.value.problems] == ["ASPECT", "TOO_SMALL"]


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"size": 2.0}, {"channels": 2}, {"background": "whiteish"}, {"background": "#11223344"}]
)
def test_invalid_options(options):
    with pytest.raises(ConfigError, match=r"^error\[OPTION\]"):
        ImageOptions(**options)


def test_colour_profiles_are_ignored_with_a_note(tmp_path):
    save(tmp_path / "a.png", RGB, icc_profile=b"broken")
    values, _, notes = load_one(tmp_path)
    np.testing.assert_array_equal(values, RGB.transpose(2, 0, 1))
    assert "1 of 1 images: colour profile ignored" in notes
