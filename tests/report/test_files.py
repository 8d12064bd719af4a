"""What sampling writes: the pictures are read back from disk, value by value."""

import hashlib
import json
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data import load
from undiffuse.errors import CheckpointError
from undiffuse.report import files
from undiffuse.report.files import Album, write_samples


def written(folder, values, levels, first=0):
    return write_samples(folder / "new" / "samples", values, levels, {"seed": 3}, first)


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
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("sha256") == hashlib.sha256((folder / "samples.npz").read_bytes()).hexdigest()
    assert len(manifest.pop("key")) == 64
    assert manifest == {"seed": 3, "first": 7, "n": 5, "items": [7, 8, 9, 10, 11]}
    with Image.open(grid) as picture:
        assert picture.mode == "RGB"


def test_colours_of_many_levels_have_eight_bits(tmp_path):
    values = np.array([0, 32768, 65535], np.int32).reshape(1, 3, 1, 1)
    with Image.open(written(tmp_path, values, 65536).parent / "000000.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        (np.random.default_rng(0).normal(size=(150, 2)).astype(np.float32), None),
        (np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32), None),
        (np.random.default_rng(0).normal(size=(3, 1, 8)).astype(np.float32), None),
        (np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32), None),
        (np.zeros((2, 2, 4, 4), np.uint8), 17),
        (np.zeros((2, 1, 4, 4, 4), np.uint8), 17),
    ],
)
def test_what_is_no_image_has_no_files_of_its_own(tmp_path, values, levels):
    grid = written(tmp_path, values, levels)
    folder = tmp_path / "new" / "samples"
    assert grid == folder / "grid.png"
    assert sorted(f.name for f in folder.iterdir()) == ["grid.png", "manifest.json", "samples.npz"]
    with np.load(folder / "samples.npz") as file:
        np.testing.assert_array_equal(file["x"], values)


def test_vectors_with_named_columns_are_a_table_too(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    album = Album(tmp_path, {}, None, ["a", "b, with a comma", "c"])
    album.begin()
    album.add(0, values[:2])
    album.add(2, values[2:])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert album.finish(range(5)) is None  # a picture needs matplotlib, a table does not
    data = load(tmp_path / "samples.csv")
    assert data.columns == ("a", "b, with a comma", "c")
    np.testing.assert_array_equal(data.values, values)
    Album(tmp_path, {"seed": 2}, None).begin(lambda said: None)
    assert not (tmp_path / "samples.csv").exists()


def test_four_channels_of_levels_are_transparent_images(tmp_path):
    values = np.random.default_rng(0).integers(256, size=(1, 4, 3, 5)).astype(np.uint8)
    with Image.open(written(tmp_path, values, 256).parent / "000000.png") as picture:
        assert picture.mode == "RGBA"
        np.testing.assert_array_equal(np.moveaxis(np.asarray(picture), -1, 0), values[0])


def values_of(items):
    """What item i looks like, of 2 grey pixels."""
    return np.array([[[[i % 17, i * 7 % 17]]] for i in items], np.uint8)


def contents(folder):
    """Every file by its name, without the manifest's own words."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "parts"}


def drawn(folder, n, parts=((0, 4), (4, 10)), plan=None, first=0):
    """An album of n items, added in ``parts``, of which those that are kept are left out; the items that were added."""
    album, added, said = Album(folder, {"seed": 1} if plan is None else plan, 17), [], []
    items = range(first, first + n)
    album.begin(said.append)
    for start, stop in parts:
        for run in album.missing(range(start, stop)):
            album.add(run.start, values_of(run))
            added += run
    return album, items, added, said


def test_parts_of_any_size_make_the_same_files(tmp_path):
    for name, parts in (("one", [(0, 10)]), ("two", [(0, 3), (3, 10)]), ("turned", [(6, 10), (2, 6), (0, 2)])):
        album, items, added, said = drawn(tmp_path / name, 10, parts)
        assert (sorted(added), said) == ([*range(10)], [])
        assert album.finish(items) == tmp_path / name / "grid.png"
        assert album.finished(items)
        assert not album.parts.exists()
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "turned")
    with np.load(tmp_path / "one" / "samples.npz") as file:
        np.testing.assert_array_equal(file["x"], values_of(range(10)))


def test_a_stopped_album_goes_on(tmp_path):
    straight = drawn(tmp_path / "straight", 10)
    straight[0].finish(straight[1])
    drawn(tmp_path / "stopped", 10, [(3, 6)])
    (tmp_path / "stopped" / "parts" / "000000006-000000009.safetensors.partial").write_bytes(b"half")
    album, items, added, said = drawn(tmp_path / "stopped", 10, [(0, 10)])  # in parts of another size
    assert added == [0, 1, 2, 6, 7, 8, 9]
    assert said == [f"goes on: 3 samples are kept in {album.parts}"]
    album.finish(items)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


@pytest.mark.parametrize("harm", ["cut", "flipped", "of another plan"])
def test_a_damaged_part_is_drawn_again(tmp_path, harm):
    drawn(tmp_path / "other", 10, plan={"seed": 2})
    drawn(tmp_path / "album", 10)
    part = tmp_path / "album" / "parts" / "000000000-000000003.safetensors"
    whole = part.read_bytes()
    spoilt = {"cut": whole[:-3], "flipped": whole[:-1] + bytes([whole[-1] ^ 1])}
    part.write_bytes(spoilt.get(harm) or (tmp_path / "other" / "parts" / part.name).read_bytes())
    album, items, added, said = drawn(tmp_path / "album", 10)
    assert added == [0, 1, 2, 3]
    assert [line.startswith(f"drawn again: {part.name}, ") for line in said] == ([True] * (harm in spoilt) + [False])
    album.finish(items)
    with np.load(album.array) as file:
        np.testing.assert_array_equal(file["x"], values_of(range(10)))


def test_a_finished_album(tmp_path):
    album, items, *_ = drawn(tmp_path, 10)
    assert not album.finished(items)
    album.finish(items, {"seconds": 3})
    assert album.finished(items)
    assert not album.finished(range(9))
    assert not album.finished(range(1, 11))
    assert not Album(tmp_path, {"seed": 2}, 17).finished(items)
    assert json.loads(album.manifest.read_text())["seconds"] == 3
    album.parts.mkdir()
    (album.parts / "000000000-000000003.safetensors").touch()  # as if stopped while the parts were removed
    assert album.finished(items)
    album.tidy()
    album.tidy()
    assert not album.parts.exists()
    album.array.write_bytes(album.array.read_bytes() + b"0")
    assert not album.finished(items)
    album.array.unlink()
    assert not album.finished(items)
    fewer, items, added, said = drawn(tmp_path, 4)  # drawn again: what is no longer asked for goes
    assert (added, said) == ([*range(10)], [])
    fewer.finish(items)
    assert len(np.load(fewer.array)["x"]) == 4


def test_another_plan_takes_the_place_of_a_finished_one(tmp_path):
    (tmp_path / "000099.png").touch()  # somebody's own
    album, items, *_ = drawn(tmp_path, 10, plan={"seed": 1, "solver": "a"})
    album.finish(items)
    album, items, _, said = drawn(tmp_path, 2, [(0, 2)], plan={"seed": 1, "solver": "b"})
    assert said == [f"drawn anew: what lies in {tmp_path} differs in solver"]
    assert {f.name for f in tmp_path.iterdir()} == {"parts", "000000.png", "000001.png", "000099.png"}
    album.manifest.write_text("no JSON")
    album.begin(said.append)
    assert len(said) == 2
    album.finish(items)
    assert album.finished(items)


def test_what_is_gone_at_the_end_is_said(tmp_path):
    album, items, *_ = drawn(tmp_path, 12)
    with pytest.raises(CheckpointError, match=r"the samples 10 to 11 are gone\. Run the same command again"):
        album.finish(items)
    assert not album.array.exists()


def test_missing(tmp_path):
    album, *_ = drawn(tmp_path, 20, [(2, 4), (4, 6), (9, 12)])
    for items, expected in (
        (range(20), [range(2), range(6, 9), range(12, 20)]),
        (range(3, 10), [range(6, 9)]),
        (range(4, 6), []),
        (range(10, 13), [range(12, 13)]),
        (range(13, 15), [range(13, 15)]),
        (range(1), [range(1)]),
    ):
        assert album.missing(items) == expected


def test_few_parts_at_a_time_are_in_memory(tmp_path, monkeypatch):
    """However many there are: but for the first, what was read is gone before the next is; the grid reads 144 items."""
    alive, counts = [], []
    real = files.read_tensors

    def read(path):
        counts.append(sum(ref() is not None for ref in alive))
        tensors, told = real(path)
        own = tensors["x"].numpy().copy()
        alive.append(weakref.ref(own))
        return {"x": torch.from_numpy(own)}, told

    album, items, *_ = drawn(tmp_path, 400, [(i, i + 4) for i in range(0, 400, 4)])
    monkeypatch.setattr(files, "read_tensors", read)
    Album(tmp_path, {"seed": 1}, 17).begin(lambda said: None)
    assert (len(counts), max(counts)) == (100, 0)
    counts.clear()
    album.finish(items)
    assert (len(counts), max(counts[:100]), max(counts[100:])) == (136, 2, 35)
