"""What sampling writes: the pictures are read back from disk, value by value."""

import json

import numpy as np
import pytest
from PIL import Image

from undiffuse.report.files import write_samples


def written(folder, values, levels, first=0):
    manifest = {"seed": 3, "items": list(range(first, first + len(values)))}
    return write_samples(folder / "new" / "samples", values, levels, manifest)


@pytest.mark.parametrize(
    ("levels", "dtype", "mode", "white"),
    [
        (2, np.uint8, "L", 255),
        (17, np.uint8, "L", 255),
        (256, np.uint8, "L", 255),
        (1000, np.int32, "I;16", 65535),
        (65536, np.int32, "I;16", 65535),
    ],
)
def test_grey_levels_are_exact(tmp_path, levels, dtype, mode, white):
    n = min(levels, 1000)
    values = np.linspace(0, levels - 1, n).round().astype(dtype).reshape(1, 1, -1, n // 2 if n % 2 == 0 else 1)
    grid = written(tmp_path, values, levels)
    with Image.open(grid.parent / "000000.png") as picture:
        assert picture.mode == mode
        shown = np.asarray(picture).astype(np.int64)
    assert shown.shape == values.shape[2:]
    assert (shown.min(), shown.max()) == (0, white)
    np.testing.assert_array_equal(shown, np.rint(values[0, 0] * (white / (levels - 1))))
    np.testing.assert_array_equal(np.rint(shown * ((levels - 1) / white)), values[0, 0])  # no two levels meet
    if levels in (256, 65536):
        np.testing.assert_array_equal(shown, values[0, 0])


def test_colours_names_and_all_of_them_in_one_file(tmp_path):
    values = np.random.default_rng(0).integers(256, size=(5, 3, 4, 6)).astype(np.uint8)
    grid = written(tmp_path, values, 256, first=7)
    folder = grid.parent
    assert sorted(f.name for f in folder.iterdir()) == [
        *(f"{i:06d}.png" for i in range(7, 12)),
        "grid.png",
        "manifest.json",
        "samples.npz",
    ]
    for i in range(5):
        with Image.open(folder / f"{7 + i:06d}.png") as picture:
            assert picture.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(picture), values[i].transpose(1, 2, 0))
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["x"], values)
        assert file["x"].dtype == np.uint8
    assert json.loads((folder / "manifest.json").read_text()) == {"seed": 3, "items": [7, 8, 9, 10, 11]}
    with Image.open(grid) as picture:
        assert picture.mode == "RGB"


def test_colours_of_many_levels_have_eight_bits(tmp_path):
    values = np.array([0, 32768, 65535], np.int32).reshape(1, 3, 1, 1)
    with Image.open(written(tmp_path, values, 65536).parent / "000000.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize(
    ("values", "levels", "drawn"),
    [
        (np.random.default_rng(0).normal(size=(150, 2)).astype(np.float32), None, True),
        (np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32), None, False),  # no picture of these
        (np.random.default_rng(0).normal(size=(3, 1, 8)).astype(np.float32), None, True),
        (np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32), None, True),
        (np.zeros((2, 2, 4, 4), np.uint8), 17, True),
        (np.zeros((2, 1, 4, 4, 4), np.uint8), 17, True),
    ],
)
def test_what_is_no_image_has_no_files_of_its_own(tmp_path, values, levels, drawn):
    grid = written(tmp_path, values, levels)
    folder = tmp_path / "new" / "samples"
    assert grid == (folder / "grid.png" if drawn else None)
    names = ["grid.png"] * drawn + ["manifest.json", "samples.npz"]
    assert sorted(f.name for f in folder.iterdir()) == names
    with np.load(folder / "samples.npz") as file:
        np.testing.assert_array_equal(file["x"], values)
