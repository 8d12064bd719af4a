"""What is left out of a folder of images: output of this package; and folders that two sources could read."""

import json
import os

import numpy as np
import pytest
from bad_inputs import encoded
from test_webdataset import PIXELS, png, tar

from undiffuse.cli.check import write_contact_sheet
from undiffuse.data.sources.registry import load
from undiffuse.errors import DataError
from undiffuse.model.config import Config
from undiffuse.report.animation import animate
from undiffuse.report.figures import image_strip
from undiffuse.report.sample_folder import SampleFolder, write_samples
from undiffuse.runtime.own_output import PICTURE_MARK, is_marked_picture, save_described, save_picture
from undiffuse.training.run_folder import Run

RNG = np.random.default_rng(0)


@pytest.fixture
def photos(tmp_path):
    """Twenty images in two classes."""
    folder = tmp_path / "photos"
    for i in range(20):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(RNG.integers(0, 256, (5, 5, 3), np.uint8), "PNG"))
    return folder


def facts(folder):
    data = load(folder)
    return data.names, data.classes, data.labels.tolist(), data.fingerprint


def run_folder(photos):
    run = Run(photos / "runs" / "photos")
    with run.exclusive():
        run.open(Config(), load(photos / "a"))
    (run.pictures / "samples.png").write_bytes(encoded(np.zeros((40, 40), np.uint8), "PNG"))


def stopped_run(photos):
    with Run(photos / "runs" / "photos").exclusive():
        pass


def samples(photos):
    values = RNG.integers(0, 256, (3, 3, 5, 5), np.uint8)
    write_samples(photos / "a" / "new", values, 256, {"seed": 1})
    write_samples(photos / "samples", values, 256, {"seed": 1})


def unfinished_samples(photos):
    folder = SampleFolder(photos / "samples", {"seed": 1}, (3, 5, 5), 256)
    with folder.open(range(4), lambda message: None):
        folder.add(0, RNG.integers(0, 256, (3, 3, 5, 5), np.uint8))


def sheet(photos):
    for name in ("sheet.png", "sheet.jpg", "a/sheet.webp", "sheet.TIFF"):
        write_contact_sheet(load(photos), photos / name)
    (photos / "sheets").mkdir()
    (photos / "sheet.jpg").rename(photos / "sheets" / "sheet.jpg")


def strip_and_animation(photos):
    save_picture(image_strip(RNG.integers(0, 256, (2, 2, 3, 5, 5), np.uint8), "ab", 256), photos / "strip.png")
    animate(photos / "a.gif", [RNG.integers(0, 256, (4, 3, 5, 5), np.uint8) for _ in range(3)], 256)


@pytest.mark.parametrize(
    ("write", "note"),
    [
        (run_folder, "1 output of undiffuse left out: runs/photos"),
        (stopped_run, "1 output of undiffuse left out: runs/photos"),
        (samples, "2 outputs of undiffuse left out: a/new, samples"),
        (unfinished_samples, "1 output of undiffuse left out: samples"),
        (sheet, "4 outputs of undiffuse left out: a/sheet.webp, sheet.TIFF, sheet.png, ..."),
        (strip_and_animation, "2 outputs of undiffuse left out: a.gif, strip.png"),
    ],
)
def test_own_output_does_not_change_the_data(photos, write, note):
    before = facts(photos)
    write(photos)
    assert facts(photos) == before
    assert note in load(photos).notes


def test_a_sample_folder_that_is_named_is_read(tmp_path):
    values = RNG.integers(0, 256, (3, 3, 5, 5), np.uint8)
    write_samples(tmp_path / "new", values, 256, {"seed": 1})
    data = load(tmp_path / "new")
    np.testing.assert_array_equal(data.values, values)
    assert "1 output of undiffuse left out: grid.png" in data.notes


def test_a_run_that_is_named_has_no_items(photos):
    """Its pictures are none, and the advice to delete its checkpoints, a class without images, was a bad one."""
    run_folder(photos)
    with pytest.raises(DataError, match=r"error\[NO_IMAGES\] .*2 outputs of undiffuse left out: checkpoints, pictures"):
        load(photos / "runs" / "photos")


def test_records_of_other_programs_are_no_mark(photos):
    before = facts(photos)
    for name, content in (("run.json", {"config": 1}), ("manifest.json", {"key": "x"}), ("state.json", {"open": 1})):
        (photos / "a" / name).write_text(json.dumps(content))
        (photos / "b" / name).write_text("[1]")
    (photos / "state.json").write_text("{}")
    (photos / "a" / "parts").mkdir()
    assert facts(photos) == before


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".gif"])
def test_pictures_are_marked(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    save_picture(image_strip(RNG.integers(0, 256, (9, 9, 3, 64, 64), np.uint8), "abcdefghi", 256), path)
    assert is_marked_picture(path)
    assert not is_marked_picture(tmp_path / f"none{suffix}")
    save_described(image_strip(np.zeros((1, 2, 1, 5, 5)), "a", 256), described := tmp_path / "described.png", "Zeros")
    assert is_marked_picture(described)
    path.write_bytes(path.read_bytes().replace(PICTURE_MARK.encode(), b"other" * 3 + b"xx"))
    assert not is_marked_picture(path)


SHARD = [(f"{i}.png", png(PIXELS[i])) for i in range(5)]


def test_images_beside_shards_are_not_left_out_in_silence(photos):
    tar(photos / "backup.tar", SHARD)
    with pytest.raises(DataError) as caught:
        load(photos)
    assert str(caught.value).startswith(
        f"error[AMBIGUOUS] {photos}: contains a WebDataset and also 20 image files, and which are the data is unclear. "
        "Name the file or folder that is the data"
    )
    assert len(load(photos / "backup.tar")) == 5
    assert len(load(photos / "a")) == 10


def test_our_sheet_beside_shards_is_no_data(tmp_path):
    tar(tmp_path / "in" / "x.tar", SHARD)
    fingerprint = load(tmp_path / "in").fingerprint
    write_contact_sheet(load(tmp_path / "in"), tmp_path / "in" / "sheet.png")
    assert load(tmp_path / "in").fingerprint == fingerprint


def test_two_markers_in_one_folder(photos):
    (photos / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="contains a folder of the library datasets and also 20 image files"):
        load(photos)
    tar(photos / "x.tar", SHARD)
    with pytest.raises(DataError, match="library datasets and also a WebDataset and 20 image files"):
        load(photos)


def test_shards_that_are_no_files(tmp_path):
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a.png").write_bytes(png(PIXELS[0]))
    assert len(load(tmp_path)) == 1
    os.mkfifo(tmp_path / "y.tar")
    (tmp_path / "x.tar" / "a.png").unlink()
    with pytest.raises(DataError, match=r"error\[NOT_A_REGULAR_FILE\] .*y.tar"):
        load(tmp_path)
