"""Sample folders: images are read back value by value, and interrupted folders resume."""

import hashlib
import json
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data.sources.registry import load
from undiffuse.errors import CheckpointError
from undiffuse.report.sample_folder import SampleFolder, write_samples
from undiffuse.runtime import part_store


def written(folder, values, num_values, first=0):
    return write_samples(folder / "new" / "samples", values, num_values, {"seed": 3}, first)


@pytest.mark.parametrize(
    ("num_values", "dtype", "mode", "white"),
    [
        (2, np.uint8, "L", 255),
        (17, np.uint8, "L", 255),
        (256, np.uint8, "L", 255),
        (1000, np.int32, "I;16", 65535),
        (65536, np.int32, "I;16", 65535),
    ],
)
def test_grey_levels_are_exact(tmp_path, num_values, dtype, mode, white):
    n = min(num_values, 1000)
    values = np.linspace(0, num_values - 1, n).round().astype(dtype).reshape(1, 1, -1, n // 2 if n % 2 == 0 else 1)
    grid = written(tmp_path, values, num_values)
    with Image.open(grid.parent / "000000.png") as picture:
        assert picture.mode == mode
        shown = np.asarray(picture).astype(np.int64)
    assert shown.shape == values.shape[2:]
    assert (shown.min(), shown.max()) == (0, white)
    np.testing.assert_array_equal(shown, np.rint(values[0, 0] * (white / (num_values - 1))))
    np.testing.assert_array_equal(np.rint(shown * ((num_values - 1) / white)), values[0, 0])  # no two values meet
    if num_values in (256, 65536):
        np.testing.assert_array_equal(shown, values[0, 0])


def test_colour_images_the_array_and_the_manifest(tmp_path):
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


def test_colour_images_have_eight_bits(tmp_path):
    values = np.array([0, 32768, 65535], np.int32).reshape(1, 3, 1, 1)
    with Image.open(written(tmp_path, values, 65536).parent / "000000.png") as picture:
        assert picture.getpixel((0, 0)) == (0, 128, 255)


@pytest.mark.parametrize(
    ("values", "num_values"),
    [
        (np.random.default_rng(0).normal(size=(150, 2)).astype(np.float32), None),
        (np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32), None),
        (np.random.default_rng(0).normal(size=(3, 1, 8)).astype(np.float32), None),
        (np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32), None),
        (np.zeros((2, 2, 4, 4), np.uint8), 17),
        (np.zeros((2, 1, 4, 4, 4), np.uint8), 17),
    ],
)
def test_items_that_are_no_images_have_no_image_files(tmp_path, values, num_values):
    grid = written(tmp_path, values, num_values)
    folder = tmp_path / "new" / "samples"
    assert grid == folder / "grid.png"
    assert sorted(f.name for f in folder.iterdir()) == ["grid.png", "manifest.json", "samples.npz"]
    with np.load(folder / "samples.npz") as file:
        np.testing.assert_array_equal(file["x"], values)


def test_vectors_with_named_columns_are_written_as_a_table(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    samples = SampleFolder(tmp_path, {}, None, ["a", "b, with a comma", "c"])
    samples.open()
    samples.add(0, values[:2])
    samples.add(2, values[2:])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert samples.finish(range(5)) is None  # the grid of vectors needs matplotlib, a table does not
    data = load(tmp_path / "samples.csv")
    assert data.columns == ("a", "b, with a comma", "c")
    np.testing.assert_array_equal(data.values, values)
    SampleFolder(tmp_path, {"seed": 2}, None).open(lambda message: None)
    assert not (tmp_path / "samples.csv").exists()


def test_four_channels_are_transparent_images(tmp_path):
    values = np.random.default_rng(0).integers(256, size=(1, 4, 3, 5)).astype(np.uint8)
    with Image.open(written(tmp_path, values, 256).parent / "000000.png") as picture:
        assert picture.mode == "RGBA"
        np.testing.assert_array_equal(np.moveaxis(np.asarray(picture), -1, 0), values[0])


def values_of(items):
    """Images of one pixel that differ from item to item."""
    return np.array([[[[i % 17, i * 7 % 17]]] for i in items], np.uint8)


def contents(folder):
    """The bytes of every file by its name."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "parts"}


def drawn(folder, n, parts=((0, 4), (4, 10)), plan=None):
    """A folder of n samples, of which the missing ones are added in ``parts``; the added samples, and the messages."""
    samples, added, messages = SampleFolder(folder, {"seed": 1} if plan is None else plan, 17), [], []
    samples.open(messages.append)
    for start, stop in parts:
        for gap in samples.missing_items(range(start, stop)):
            samples.add(gap.start, values_of(gap))
            added += gap
    return samples, range(n), added, messages


def test_parts_of_any_size_give_the_same_files(tmp_path):
    for name, parts in (("one", [(0, 10)]), ("two", [(0, 3), (3, 10)]), ("reversed", [(6, 10), (2, 6), (0, 2)])):
        samples, items, added, messages = drawn(tmp_path / name, 10, parts)
        assert (sorted(added), messages) == ([*range(10)], [])
        assert samples.finish(items) == tmp_path / name / "grid.png"
        assert samples.finished(items)
        assert not samples.parts.exists()
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "reversed")
    with np.load(tmp_path / "one" / "samples.npz") as file:
        np.testing.assert_array_equal(file["x"], values_of(range(10)))


def test_an_interrupted_folder_resumes(tmp_path):
    straight = drawn(tmp_path / "straight", 10)
    straight[0].finish(straight[1])
    drawn(tmp_path / "interrupted", 10, [(3, 6)])
    (tmp_path / "interrupted" / "parts" / "000000006-000000009.safetensors.partial").write_bytes(b"half")
    samples, items, added, messages = drawn(tmp_path / "interrupted", 10, [(0, 10)])  # in parts of another size
    assert added == [0, 1, 2, 6, 7, 8, 9]
    assert messages == [f"resuming: 3 samples are in {samples.parts}"]
    samples.finish(items)
    assert contents(tmp_path / "interrupted") == contents(tmp_path / "straight")


@pytest.mark.parametrize("harm", ["cut", "flipped", "of another plan", "renamed"])
def test_a_damaged_part_is_computed_again(tmp_path, harm):
    drawn(tmp_path / "other", 10, plan={"seed": 2})
    drawn(tmp_path / "samples", 10)
    part = tmp_path / "samples" / "parts" / "000000000-000000003.safetensors"
    whole = part.read_bytes()
    other = (tmp_path / "other" / "parts" / part.name).read_bytes()
    renamed = (part.parent / "000000004-000000009.safetensors").read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    part.write_bytes({"cut": whole[:-3], "flipped": flipped, "of another plan": other, "renamed": renamed}[harm])
    samples, items, added, messages = drawn(tmp_path / "samples", 10)
    assert added == [0, 1, 2, 3]
    assert [line.startswith(f"computed again: {part.name}, ") for line in messages] == (
        [True] * (harm in ("cut", "flipped")) + [False]
    )
    samples.finish(items)
    with np.load(samples.array) as file:
        np.testing.assert_array_equal(file["x"], values_of(range(10)))


def test_a_finished_folder(tmp_path):
    samples, items, *_ = drawn(tmp_path, 10)
    assert not samples.finished(items)
    samples.finish(items, {"seconds": 3})
    assert samples.finished(items)
    assert not samples.finished(range(9))
    assert not samples.finished(range(1, 11))
    assert not SampleFolder(tmp_path, {"seed": 2}, 17).finished(items)
    assert json.loads(samples.manifest.read_text())["seconds"] == 3
    samples.parts.mkdir()
    (samples.parts / "000000000-000000003.safetensors").touch()  # as if interrupted while the parts were removed
    assert samples.finished(items)
    samples.remove_parts()
    samples.remove_parts()
    assert not samples.parts.exists()
    samples.array.write_bytes(samples.array.read_bytes() + b"0")
    assert not samples.finished(items)
    samples.array.unlink()
    assert not samples.finished(items)
    fewer, items, added, messages = drawn(tmp_path, 4)  # samples that are no longer wanted are removed
    assert (added, messages) == ([*range(10)], [])
    fewer.finish(items)
    assert len(np.load(fewer.array)["x"]) == 4


def test_another_plan_replaces_a_finished_folder(tmp_path):
    (tmp_path / "000099.png").touch()  # not written by us
    samples, items, *_ = drawn(tmp_path, 10, plan={"seed": 1, "solver": "a"})
    samples.finish(items)
    samples, items, _, messages = drawn(tmp_path, 2, [(0, 2)], plan={"seed": 1, "solver": "b"})
    assert messages == [f"starting over: the samples in {tmp_path} differ in solver"]
    assert {f.name for f in tmp_path.iterdir()} == {"parts", "000000.png", "000001.png", "000099.png"}
    samples.manifest.write_text("no JSON")
    samples.open(messages.append)
    assert len(messages) == 2
    samples.finish(items)
    assert samples.finished(items)


def test_missing_parts_are_an_error_at_the_end(tmp_path):
    samples, items, *_ = drawn(tmp_path, 12)
    with pytest.raises(CheckpointError, match=r"the samples 10 to 11 are missing\. Run the same command again"):
        samples.finish(items)
    assert not samples.array.exists()


def test_missing_samples(tmp_path):
    samples, *_ = drawn(tmp_path, 20, [(2, 4), (4, 6), (9, 12)])
    for items, expected in (
        (range(20), [range(2), range(6, 9), range(12, 20)]),
        (range(3, 10), [range(6, 9)]),
        (range(4, 6), []),
        (range(10, 13), [range(12, 13)]),
        (range(13, 15), [range(13, 15)]),
        (range(1), [range(1)]),
    ):
        assert samples.missing_items(items) == expected


def test_few_parts_at_a_time_are_in_memory(tmp_path, monkeypatch):
    """But for the first, a part is freed before the next is read; the grid reads 144 items."""
    alive, counts = [], []
    real = part_store.read_tensors

    def read(path):
        counts.append(sum(ref() is not None for ref in alive))
        tensors, metadata = real(path)
        own = tensors["x"].numpy().copy()
        alive.append(weakref.ref(own))
        return {"x": torch.from_numpy(own)}, metadata

    samples, items, *_ = drawn(tmp_path, 200, [(i, i + 4) for i in range(0, 200, 4)])
    monkeypatch.setattr(part_store, "read_tensors", read)
    SampleFolder(tmp_path, {"seed": 1}, 17).open(lambda message: None)
    assert (len(counts), max(counts)) == (50, 0)
    counts.clear()
    samples.finish(items)
    assert (len(counts), max(counts[:50]), max(counts[50:])) == (86, 2, 35)
