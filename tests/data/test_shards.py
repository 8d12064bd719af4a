"""Images in tar files and in Arrow tables: the same data as the images themselves, read where they lie."""

import functools
import io
import json
import operator
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.config import TrainConfig
from undiffuse.data import BadFiles, Prepare, load, load_folder
from undiffuse.data.rows import Rows
from undiffuse.errors import ConfigError, DataError
from undiffuse.train.batch import batches, global_batch

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3)).astype(np.uint8)


def png(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, lossless=True)
    return stream.getvalue()


def tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Seven images in two shards, the second first on the disk, and the same as a folder."""
    members = [[(f"a/{i:04d}.png", png(PIXELS[i])), (f"a/{i:04d}.cls", str(10 - i % 2).encode())] for i in range(7)]
    tar(tmp_path / "in" / "b.tar", functools.reduce(operator.iadd, members[4:], []))
    tar(tmp_path / "in" / "a.tar", functools.reduce(operator.iadd, members[:4], []))
    for i, pixels in enumerate(PIXELS):
        place = tmp_path / "files" / ("ten" if i % 2 == 0 else "nine")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path / "in"


def test_shards_are_their_images_in_order(shards):
    data = load(shards)
    assert isinstance(data.values, Rows)
    np.testing.assert_array_equal(data.values[:], np.moveaxis(PIXELS, -1, 1))
    assert (data.name, data.levels, data.classes, data.labels.tolist()) == ("in", 256, ("9", "10"), [1, 0] * 3 + [1])
    assert "2 shards" in data.notes
    assert data.names == tuple(f"{'a' if i < 4 else 'b'}.tar/a/{i:04d}.png" for i in range(7))
    folder = load_folder(shards.parent / "files")
    assert sorted(data.digests) == sorted(folder.digests)
    one = load(shards / "a.tar")
    assert (len(one), one.name, one.names[3]) == (4, "a", "a/0003.png")
    grey = load(shards, channels=1, size=None)
    assert grey.item_shape == (1, 6, 5)
    (shards / "more.txt").write_text("x")
    assert load(shards).notes[-1] == "1 files ignored that are no shards"


def test_any_step_has_its_very_items(shards):
    data, settings = load(shards), TrainConfig(batch=3, seed=1)
    with batches(data, np.arange(7), settings) as batch:
        made = [batch(step)[0] for step in range(5)]
        assert batch.ahead == {}  # decoders run beside nothing else
    with batches(data, np.arange(7), settings) as batch:
        assert torch.equal(batch(3)[0], made[3])
    packed = global_batch(load(shards), np.arange(7), settings, 4)[0]
    assert torch.equal(packed, made[4])


@pytest.mark.parametrize(
    ("beside", "classes"),
    [
        ([("{}.cls", b"cat\n"), ("{}.cls", b"dog")], ("cat", "dog")),
        ([("{}.json", b'{"label": 3}'), ("{}.json", b'{"label": 12}')], ("3", "12")),
        ([("{}.json", b'{"label": 3.5}'), ("{}.json", b"[1]")], ()),
        ([("{}.seg.png.txt", b"x"), ("{}.txt", b"x")], ()),
    ],
)
def test_classes(tmp_path, beside, classes):
    members = [
        [(f"{i}.PNG", png(PIXELS[i])), (beside[i % 2][0].format(i), beside[i % 2][1])][:: 1 - i % 3]
        for i in range(0, 4, 3)
    ]
    data = load(tar(tmp_path / "x.tar", functools.reduce(operator.iadd, members, [])))
    assert data.classes == classes
    assert (data.labels is None) == (not classes)
    assert len(data) == 2


@pytest.mark.parametrize(
    ("members", "code", "words"),
    [
        ([], "NO_IMAGES", "its 1 tar files hold no image"),
        ([("a.txt", b"x"), (".png", b"x"), ("b", b"x")], "NO_IMAGES", "hold no image"),
        ([("a.png", b""), ("b.png", b""), ("a.cls", b"1")], "BAD_ARCHIVE", "the members of a do not follow"),
        ([("d/a.png", b""), ("d/a.jpg", b"")], "BAD_ARCHIVE", "d/a has two images"),
        ([("a.png", b""), ("a.cls", b"\xff")], "LABELS", "a.cls cannot be read"),
        ([("a.png", b""), ("a.json", b"[" * 20000)], "LABELS", "a.json cannot be read"),
        (
            [("a.png", png(PIXELS[0])), ("a.cls", b"1"), ("b.png", png(PIXELS[1]))],
            "LABELS",
            "1 of 2 images have no label",
        ),
        ([("a.png", b"no image")], "NOT_AN_IMAGE", ""),
        ([("a.png", png(PIXELS[0])), ("b.png", png(PIXELS[0][:3]))], "MIXED_SIZES", "5 x 3 pixels"),
    ],
)
def test_shards_that_are_refused(tmp_path, members, code, words):
    with pytest.raises(DataError) as caught:
        load(tar(tmp_path / "x.tar", members))
    assert caught.value.code == code
    assert words in caught.value.cause


def test_no_plain_tar(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nothing" * 200)
    with pytest.raises(DataError, match=r"error\[BAD_ARCHIVE\] .*x.tar: is no plain tar file"):
        load(tmp_path / "x.tar")
    tar(tmp_path / "y.tar", [("a.png", png(PIXELS[0]))], "w:gz")
    with pytest.raises(DataError, match="BAD_ARCHIVE"):
        load(tmp_path / "y.tar")


def test_bad_images_are_all_told_or_left_out(tmp_path):
    members = [(f"{i}.png", png(PIXELS[i])) for i in range(5)]
    members[1] = ("1.png", b"no image")
    members[2] = ("2.png", png(PIXELS[2][..., 0]))
    members[3] = ("3.png", png(PIXELS[2][:4]))
    path = tar(tmp_path / "x.tar", members)
    with pytest.raises(BadFiles) as caught:
        load(path)
    assert [str(problem.path) for problem in caught.value.problems] == [f"{path}/1.png"]
    data = load(path, on_bad="skip")
    assert sorted(problem.path.name for problem in data.seen.skipped) == ["1.png", "2.png", "3.png"]
    np.testing.assert_array_equal(data.values[:], np.moveaxis(PIXELS[[0, 4]], -1, 1))
    assert "3 of 5 images skipped: 2 MIXED_SIZES, 1 NOT_AN_IMAGE" in data.notes
    assert data.called(np.array([1, 0])).tolist() == ["4.png", "0.png"]
    with pytest.raises(ConfigError, match="on_bad"):
        load(path, on_bad="ignore")
    with pytest.raises(ConfigError, match="frames"):
        load(path, frames="all")


def test_shards_that_change_are_noticed(shards):
    data = load(shards)
    whole = (shards / "a.tar").read_bytes()
    (shards / "a.tar").write_bytes(whole[:512] + b"\0" * (len(whole) - 512))
    with pytest.raises(DataError, match=r"error\[CHANGED_DURING_RUN\] .*a.tar"):
        _ = data.values[np.array([0])]
    with pytest.raises(DataError, match="CHANGED_DURING_RUN"):
        data.seen.check()
    tar(shards / "a.tar", [("0.png", png(PIXELS[0][:5]))])
    with pytest.raises(DataError, match="CHANGED_DURING_RUN"):
        _ = data.values[:1]


def test_a_folder_of_the_library_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="it writes the folders that are read; the extra `hub` has it")
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["b", "a"]), "n": datasets.Value("int32")}
    )
    rows = [{"image": {"bytes": png(PIXELS[i]), "path": None}, "kind": i % 2, "n": i} for i in range(7)]
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    data = load(tmp_path / "saved")
    np.testing.assert_array_equal(data.values[:], np.moveaxis(PIXELS, -1, 1))
    np.testing.assert_array_equal(data.values[np.array([5, 2])], np.moveaxis(PIXELS[[5, 2]], -1, 1))
    assert data.classes == ("a", "b")
    assert data.labels.tolist() == [1, 0] * 3 + [1]
    assert [path.suffix for path in data.seen.mapped] == [".arrow"]
    rows[3]["image"] = None
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "paths"))
    with pytest.raises(BadFiles, match="row 3: the row holds no bytes of an image"):
        load(tmp_path / "paths")
    assert load(tmp_path / "paths", on_bad="skip").names == tuple(f"row {i}" for i in (0, 1, 2, 4, 5, 6))
    saved.remove_columns("image").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"error\[NO_IMAGES\] .*has the columns kind, n"):
        load(tmp_path / "none")
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"holds several data sets \(test, train\)"):
        load(tmp_path / "both")
    (tmp_path / "none" / "state.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"error\[BAD_HEADER\] .*none: cannot be read"):
        load(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"undiffuse\[hub\]"):
        load(tmp_path / "saved")


def test_a_folder_of_shards_or_tables_takes_the_options_of_images(shards):
    with pytest.raises(ConfigError, match="layout"):
        load(shards, layout="NHWC")
    assert load(shards, size=3, crop=True).item_shape == (3, 3, 3)
    assert Prepare().frames is None
