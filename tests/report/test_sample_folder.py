"""Sample folders: images are read back value by value, and interrupted folders resume."""

import hashlib
import json
import sys
import threading
import time
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data.sources.registry import load
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.report import sample_folder
from undiffuse.report.sample_folder import SampleFolder, sampler_in_words, write_samples
from undiffuse.runtime import part_store
from undiffuse.runtime.side_files import read_record, write_record
from undiffuse.sampling.sampler import Sampler


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
    names = {*(f"{i:06d}.png" for i in range(7, 12)), "grid.png", "samples.npz"}
    assert manifest.pop("files") == {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in names}
    assert manifest.pop("values") == hashlib.sha256(values.tobytes()).hexdigest()
    assert (len(manifest.pop("key")), len(manifest.pop("sha256"))) == (64, 64)
    assert manifest == {"seed": 3, "first": 7, "n": 5, "finished": True}
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
    columns = ["a", "b, with a comma", "c"]
    samples = SampleFolder(tmp_path, {}, (3,), None, columns)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with samples.open(range(5)):
        samples.add(0, values[:2])
        samples.add(2, values[2:])
        assert samples.finish(range(5)) is None  # the grid of vectors needs matplotlib, a table does not
    table = (tmp_path / "samples.csv").read_bytes()
    data = load(tmp_path / "samples.csv")
    assert data.columns == ("a", "b, with a comma", "c")
    np.testing.assert_array_equal(data.values, values)
    (tmp_path / "samples.csv").unlink()
    again = SampleFolder(tmp_path, {}, (3,), None, columns)
    with again.open(range(5), lambda message: None) as missing:
        assert (again.finished, missing) == (True, [])
    assert (tmp_path / "samples.csv").read_bytes() == table
    with SampleFolder(tmp_path, {"seed": 2}, (3,), None).open(range(5), lambda message: None):
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


def folder_of(folder, plan=None):
    return SampleFolder(folder, {"seed": 1} if plan is None else plan, (1, 1, 1), 17)


def drawn(folder, n, parts=((0, 4), (4, 10)), plan=None):
    """A folder of n samples, of which the missing ones are added in ``parts``; the added samples, and the messages."""
    samples, added, messages = folder_of(folder, plan), [], []
    with samples.open(range(n), messages.append) as missing:
        for start, stop in parts:
            for gap in missing:
                if inside := range(max(start, gap.start), min(stop, gap.stop)):
                    samples.add(inside.start, values_of(inside))
                    added += inside
    return samples, range(n), added, messages


def finished(folder, n=10, plan=None):
    """A finished folder of n samples."""
    samples, items, *_ = drawn(folder, n, plan=plan)
    samples.finish(items)
    return samples


def test_parts_of_any_size_give_the_same_files(tmp_path):
    for name, parts in (("one", [(0, 10)]), ("two", [(0, 3), (3, 10)]), ("reversed", [(6, 10), (2, 6), (0, 2)])):
        samples, items, added, messages = drawn(tmp_path / name, 10, parts)
        assert (sorted(added), messages) == ([*range(10)], [])
        assert samples.finish(items) == tmp_path / name / "grid.png"
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
    assert messages == [f"resuming: 3 samples in {samples.parts}"]
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
    assert not samples.finished
    samples.finish(items, {"seconds": 3})
    assert json.loads(samples.manifest.read_text())["seconds"] == 3
    before = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}
    again, _, added, messages = drawn(tmp_path, 10)
    assert (again.finished, added, messages) == (True, [], [])
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before
    samples.parts.mkdir()
    (samples.parts / "000000000-000000003.safetensors").touch()  # as if interrupted while the parts were removed
    assert drawn(tmp_path, 10)[0].finished
    assert not samples.parts.exists()
    fewer, _, added, messages = drawn(tmp_path, 4)
    assert (added, messages, fewer.finished) == ([], [], True)
    assert {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()} == before


def test_more_samples_are_added_to_those_of_a_finished_folder(tmp_path):
    whole = contents(finished(tmp_path / "whole").folder)
    folder = finished(tmp_path / "few", 4).folder
    for stopped in (True, False):  # the first job of ten is interrupted after three more
        samples, items, added, messages = drawn(folder, 10, [(4, 7)] if stopped else [(0, 10)])
        assert added == [4, 5, 6] if stopped else [7, 8, 9]
        resuming = f"resuming: {4 if stopped else 7} samples in {samples.parts}"
        assert messages == [*([f"kept: the 4 samples of {folder}"] if stopped else []), resuming]
    samples.finish(items)
    assert contents(folder) == whole
    assert not samples.parts.exists()


def test_fewer_samples_leave_the_parts_of_a_longer_job(tmp_path):
    drawn(tmp_path, 10, [(0, 5), (5, 8)])
    few, items, added, messages = drawn(tmp_path, 5)
    assert (added, messages) == ([], [f"resuming: 5 samples in {few.parts}"])
    few.finish(items)
    assert len(np.load(few.array)["x"]) == 5
    assert not (tmp_path / "000005.png").exists()
    assert drawn(tmp_path, 5)[0].finished
    (tmp_path / "samples.npz").unlink()
    rest, items, added, messages = drawn(tmp_path, 10, [(0, 10)])
    assert (added, messages[1:]) == ([0, 1, 2, 3, 4, 8, 9], [f"resuming: 3 samples in {rest.parts}"])
    rest.finish(items)
    assert contents(tmp_path) == contents(finished(tmp_path / "whole").folder)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b""), flip])
def test_harmed_files_are_found_and_made_again(tmp_path, harm):
    """ "These samples exist already" is said of files that are as they were written."""
    whole = contents(finished(tmp_path).folder)
    for names in (["000003.png"], ["grid.png"], ["000000.png", "000009.png", "000005.png", "grid.png"]):
        for name in names:
            harm(tmp_path / name)
        again, _, added, messages = drawn(tmp_path, 10)
        listed = ", ".join(sorted(names)[:3]) + (" and 1 more" if len(names) > 3 else "")
        assert messages == [f"made again, as they were missing or changed: {listed}"]
        assert (again.finished, added) == (True, [])
        assert contents(tmp_path) == whole
    harm(tmp_path / "samples.npz")
    again, items, added, messages = drawn(tmp_path, 10)
    assert messages == [f"starting over: {tmp_path / 'samples.npz'} is missing or changed"]
    assert (again.finished, added) == (False, [*range(10)])
    again.finish(items)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b""), flip])
def test_pictures_are_checked_at_the_end(tmp_path, harm):
    whole = contents(finished(tmp_path / "whole").folder)
    samples, items, *_ = drawn(tmp_path / "harmed", 10)
    for name in ("000002.png", "000009.png"):
        harm(samples.folder / name)
    samples.finish(items)
    assert contents(samples.folder) == whole


def test_a_folder_of_other_files_is_refused(tmp_path):
    """Nothing in it is changed, whatever its files are called, and nothing is added."""
    for name in ("photo.jpg", "000000.png", "grid.png", "manifest.json", "samples.npz", "parts/thesis.tex", "a/b"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
        with pytest.raises(
            ConfigError, match=rf"error\[OUT\] {folder}: .*{name.split('/')[0]}.* Give --out a new folder"
        ):
            drawn(folder, 10)
        with pytest.raises(ConfigError, match="OUT"):
            write_samples(folder, values_of(range(3)), 17, {})
        assert [f for f in folder.rglob("*") if f.is_file()] == [folder / name]
        assert (folder / name).read_text() == "mine"
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="it, or a part of its path, is a file"):
        drawn(tmp_path / "file", 10)


def test_files_beside_ours_are_never_replaced_or_removed(tmp_path):
    samples = finished(tmp_path)
    own = ["000099.png", "notes.txt", "a/grid.png"]
    (tmp_path / "a").mkdir()
    for name in own:
        (tmp_path / name).write_text("mine")
    assert drawn(tmp_path, 10)[0].finished
    with pytest.raises(ConfigError, match=r"it holds 000099\.png, which was not written by this command"):
        drawn(tmp_path, 100)
    assert drawn(tmp_path, 10)[0].finished
    drawn(tmp_path, 20, [(0, 20)], {"seed": 2})  # another plan removes ours
    samples.parts.joinpath("mine.safetensors").write_text("mine")
    folder_of(tmp_path, {"seed": 2}).finish(range(20))
    for name in [*own, "parts/mine.safetensors"]:
        assert (tmp_path / name).read_text() == "mine"


def test_a_damaged_manifest_is_no_record(tmp_path):
    samples = finished(tmp_path)
    whole = samples.manifest.read_bytes()
    for content in (b"no JSON", b"[]", b"{}", b'"x"', b"[" * 100_000, whole.replace(b"000003.png", b"000033.png")):
        samples.manifest.write_bytes(content)
        with pytest.raises(ConfigError, match=r"its manifest\.json is damaged, edited or not ours"):
            drawn(tmp_path, 10)
    samples.manifest.write_bytes(whole)
    assert drawn(tmp_path, 10)[0].finished


def test_a_manifest_names_files_of_its_folder_only(tmp_path):
    """One from elsewhere, made to remove other files."""
    samples = finished(tmp_path / "samples")
    (tmp_path / "thesis.tex").write_text("mine")
    record = read_record(samples.manifest)
    files = {"../thesis.tex": "0", str(tmp_path / "thesis.tex"): "0", "..": "0", "": "0"}
    write_record(samples.manifest, {**record, "files": {**record["files"], **files}})
    drawn(tmp_path / "samples", 10, plan={"seed": 2})
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    assert not (tmp_path / "samples" / "grid.png").exists()


def test_another_plan_replaces_a_finished_folder(tmp_path):
    samples = finished(tmp_path, plan={"seed": 1, "solver": "a"})
    (tmp_path / "000099.png").touch()  # not written by us
    samples, items, _, messages = drawn(tmp_path, 2, [(0, 2)], plan={"seed": 1, "solver": "b"})
    assert messages == [f"starting over: the samples in {tmp_path} differ in solver"]
    names = {"parts", "000000.png", "000001.png", "000099.png", "manifest.json"}
    assert {f.name for f in tmp_path.iterdir()} == names
    samples.finish(items)
    assert drawn(tmp_path, 2, plan={"seed": 1, "solver": "b"})[0].finished


def test_one_process_writes_into_a_folder(tmp_path):
    with folder_of(tmp_path).open(range(10)), pytest.raises(ResourceError, match=r"\[BUSY\].*is writing samples into"):
        drawn(tmp_path, 10, plan={"seed": 2})
    drawn(tmp_path, 10)


def test_two_jobs_that_no_lock_keeps_apart_do_not_mix(tmp_path, monkeypatch):
    """On a file system without locks: the first to finish finds that the folder is not its own any more."""
    monkeypatch.setattr(sample_folder, "lock_folder", lambda *_: nullcontext())
    first, items, *_ = drawn(tmp_path, 10)
    second, _, added, _ = drawn(tmp_path, 10, [(0, 4)], plan={"seed": 2})
    assert added == [0, 1, 2, 3]
    first.add(4, values_of(range(4, 10)))
    with pytest.raises(CheckpointError, match="another job has written into this folder since this one began"):
        first.finish(items)
    with pytest.raises(CheckpointError, match="it belongs to another job"):
        second.finish(items)
    assert not first.array.exists()


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
    with folder_of(tmp_path).open(items, lambda message: None):
        pass
    assert (len(counts), max(counts)) == (50, 0)
    counts.clear()
    samples.finish(items)
    assert (len(counts), max(counts[:50]), max(counts[50:])) == (86, 2, 35)


def test_a_part_is_written_while_the_next_is_drawn(tmp_path, monkeypatch):
    released, written_parts = threading.Event(), []

    def slow(folder, first, values):
        assert released.wait(60)
        written_parts.append(first)

    monkeypatch.setattr(SampleFolder, "add", slow)
    folder = SampleFolder(tmp_path / "new", {"seed": 3}, (2,), None)
    with folder.adding_in_background() as add:
        add(0, np.zeros((2, 2)))  # returns, though the part cannot be written yet
        assert written_parts == []
        released.set()
        add(2, np.zeros((2, 2)))
        assert written_parts[0] == 0  # one part waits, no more
    assert written_parts == [0, 2]


@pytest.mark.parametrize("number", [0, 1], ids=["a part before the last", "the last part"])
def test_an_error_of_a_write_in_the_background_is_raised(tmp_path, monkeypatch, number):
    done = []

    def fails(folder, first, values):
        done.append(first)
        if first == number:
            raise OSError("the disk is full")

    monkeypatch.setattr(SampleFolder, "add", fails)
    folder = SampleFolder(tmp_path / "new", {"seed": 3}, (2,), None)

    def draw():
        with folder.adding_in_background() as add:
            for first in range(2):
                add(first, np.zeros((1, 2)))

    with pytest.raises(OSError, match="the disk is full"):
        draw()
    assert done == list(range(number + 1))


def test_a_block_that_fails_waits_for_its_part(tmp_path, monkeypatch):
    begun, done = threading.Event(), []

    def slow(folder, first, values):
        begun.set()
        time.sleep(0.05)
        done.append(first)

    monkeypatch.setattr(SampleFolder, "add", slow)
    folder = SampleFolder(tmp_path / "new", {"seed": 3}, (2,), None)

    def draw():
        with folder.adding_in_background() as add:
            add(0, np.zeros((1, 2)))
            assert begun.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw()
    assert done == [0]


def test_the_words_of_a_sampler_name_conditions_and_guidance():
    plain = Sampler("ddim", 5, guidance=2.0).to_dict()
    words = "ddim in 5 steps, label 3, all, guidance 2, seed 4"
    assert sampler_in_words({"sampler": plain, "label": ["3", "all"], "seed": 4}) == words
    assert sampler_in_words({"sampler": plain | {"guidance": 1.0}, "seed": 4}) == "ddim in 5 steps, seed 4"
    stages = [plain, Sampler("heun", 3).to_dict()]
    assert (
        sampler_in_words({"stage_samplers": stages, "seed": 0})
        == "ddim in 5 steps, then heun in 3 steps, guidance 2, seed 0"
    )
    assert sampler_in_words({"seed": 4}) is None
