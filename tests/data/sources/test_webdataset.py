"""Images in tar files and in Arrow tables equal the image files, and are read from there at each access."""

import functools
import io
import json
import operator
import os
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import global_batch

from undiffuse.data import encoded_images
from undiffuse.data.image_decoding import decode_image
from undiffuse.data.lazy_array import LazyArray
from undiffuse.data.sources import image_folder, webdataset
from undiffuse.data.sources.registry import load
from undiffuse.errors import ConfigError, DataError
from undiffuse.model.config import TrainConfig
from undiffuse.runtime.file_errors import BadFilesError
from undiffuse.training.batches import Batches, values_of

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
    """Seven images in two shards, of which the second is written first, and the same images as files."""
    members = [[(f"a/{i:04d}.png", png(PIXELS[i])), (f"a/{i:04d}.cls", str(10 - i % 2).encode())] for i in range(7)]
    tar(tmp_path / "in" / "b.tar", functools.reduce(operator.iadd, members[4:], []))
    tar(tmp_path / "in" / "a.tar", functools.reduce(operator.iadd, members[:4], []))
    for i, pixels in enumerate(PIXELS):
        folder = tmp_path / "files" / ("ten" if i % 2 == 0 else "nine")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "in"


def test_images_of_shards_in_order(shards):
    data = load(shards)
    assert isinstance(data.values, LazyArray)
    np.testing.assert_array_equal(data.values[:], np.moveaxis(PIXELS, -1, 1))
    assert (data.name, data.num_values, data.classes, data.labels.tolist()) == (
        "in",
        256,
        ("9", "10"),
        [1, 0] * 3 + [1],
    )
    assert "2 shards" in data.notes
    assert data.names == tuple(f"{'a' if i < 4 else 'b'}.tar/a/{i:04d}.png" for i in range(7))
    from_files = image_folder.load(shards.parent / "files")
    assert sorted(data.digests) == sorted(from_files.digests)
    first = load(shards / "a.tar")
    assert (len(first), first.name, first.names[3]) == (4, "a", "a/0003.png")
    grey = load(shards, channels=1, size=None)
    assert grey.item_shape == (1, 6, 5)
    (shards / "more.txt").write_text("x")
    assert load(shards).notes[-1] == "1 file ignored (not shards)"


def test_batches_of_shards_are_reproducible(shards):
    data, settings = load(shards), TrainConfig(batch=3, seed=1)
    with Batches(data, np.arange(7), settings, time.perf_counter, values_of(data)) as batch:
        tensors = [batch(step).values for step in range(5)]
        assert batch.pending == {}  # decoding is not thread-safe
    with Batches(data, np.arange(7), settings, time.perf_counter, values_of(data)) as batch:
        assert torch.equal(batch(3).values, tensors[3])
    again = global_batch(load(shards), np.arange(7), settings, 4).values
    assert torch.equal(again, tensors[4])


@pytest.mark.parametrize(
    ("label_members", "classes"),
    [
        ([("{}.cls", b"cat\n"), ("{}.cls", b"dog")], ("cat", "dog")),
        ([("{}.json", b'{"label": 3}'), ("{}.json", b'{"label": 12}')], ("3", "12")),
        ([("{}.json", b'{"label": 3, "text": "' + b"x" * 70_000 + b'"}')] * 2, ("3",)),
        ([("{}.json", b'{"label": 3.0}'), ("{}.json", b'{"label": 12.0}')], ("3", "12")),
        ([("{}.json", b'{"label": null}'), ("{}.json", b"[1]")], ()),
        ([("{}.seg.png.txt", b"x"), ("{}.txt", b"x")], ()),
    ],
)
def test_classes(tmp_path, label_members, classes):
    members = [
        [(f"{i}.PNG", png(PIXELS[i])), (label_members[i % 2][0].format(i), label_members[i % 2][1])][:: 1 - i % 3]
        for i in range(0, 4, 3)
    ]
    data = load(tar(tmp_path / "x.tar", functools.reduce(operator.iadd, members, [])))
    assert data.classes == classes
    assert (data.labels is None) == (not classes)
    assert len(data) == 2
    counts = ", ".join(f"{name} ({2 // len(classes)})" for name in classes)
    listed = f"{'1 class' if len(classes) == 1 else '2 classes'} from members of the shards: {counts}"
    assert (listed in data.notes) == bool(classes)


@pytest.mark.parametrize(
    ("members", "code", "cause"),
    [
        ([], "NO_IMAGES", "its 1 tar files contain no image"),
        ([("a.txt", b"x"), (".png", b"x"), ("b", b"x")], "NO_IMAGES", "contain no image"),
        ([("a.png", b""), ("b.png", b""), ("a.cls", b"1")], "BAD_ARCHIVE", "the members of a are not adjacent"),
        ([("d/a.png", b""), ("d/a.jpg", b"")], "BAD_ARCHIVE", "d/a has two images"),
        ([("a.png", b""), ("a.cls", b"\xff")], "LABELS", "a.cls cannot be read"),
        ([("a.png", b""), ("a.json", b"[" * 20000)], "LABELS", "a.json cannot be read"),
        ([("a.png", b""), ("a.json", b'{"label": 3.5}')], "LABELS", "the label in a.json is neither a text nor"),
        ([("a.png", b""), ("a.json", b'{"label": [3]}')], "LABELS", "the label in a.json is neither a text nor"),
        ([("a.png", b""), ("a.json", b'{"label": true}')], "LABELS", "the label in a.json is neither a text nor"),
        (
            [("a.png", png(PIXELS[0])), ("a.cls", b"1"), ("b.png", png(PIXELS[1]))],
            "LABELS",
            "1 of 2 images have no label",
        ),
        ([("a.png", png(PIXELS[0])), ("a.cls", b"\n")], "LABELS", "1 labels are empty, the first that of item 0"),
        ([("a.png", b"no image")], "NOT_AN_IMAGE", ""),
        ([("a.png", png(PIXELS[0])), ("b.png", png(PIXELS[0][:3]))], "MIXED_SIZES", "from 5 x 3 to 5 x 6 pixels"),
    ],
)
def test_invalid_shards(tmp_path, members, code, cause):
    with pytest.raises(DataError) as caught:
        load(tar(tmp_path / "x.tar", members))
    assert caught.value.code == code
    assert cause in caught.value.cause


def test_files_that_are_not_uncompressed_tar_files(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"nothing" * 200)
    with pytest.raises(DataError, match=r"error\[BAD_ARCHIVE\] .*x.tar: is not an uncompressed tar file"):
        load(tmp_path / "x.tar")
    tar(tmp_path / "y.tar", [("a.png", png(PIXELS[0]))], "w:gz")
    with pytest.raises(DataError, match="BAD_ARCHIVE"):
        load(tmp_path / "y.tar")


def test_bad_images_are_all_reported_or_skipped(tmp_path):
    members = [(f"{i}.png", png(PIXELS[i])) for i in range(5)]
    members[1] = ("1.png", b"no image")
    members[2] = ("2.png", png(PIXELS[2][..., 0]))
    members[3] = ("3.png", png(PIXELS[2][:4]))
    path = tar(tmp_path / "x.tar", members)
    with pytest.raises(BadFilesError) as caught:
        load(path)
    assert [str(problem.path) for problem in caught.value.problems] == [f"{path}/1.png"]
    data = load(path, on_bad="skip")
    assert sorted(problem.path.name for problem in data.report.skipped) == ["1.png", "2.png", "3.png"]
    np.testing.assert_array_equal(data.values[:], np.moveaxis(PIXELS[[0, 4]], -1, 1))
    assert "3 of 5 images skipped: 2 MIXED_SIZES, 1 NOT_AN_IMAGE" in data.notes
    assert data.item_names(np.array([1, 0])).tolist() == ["4.png", "0.png"]
    with pytest.raises(ConfigError, match="on_bad"):
        load(path, on_bad="ignore")
    with pytest.raises(ConfigError, match="frames"):
        load(path, frames="all")


def test_shards_that_change(shards):
    data = load(shards)
    content, stamp = (shards / "a.tar").read_bytes(), (shards / "a.tar").stat()
    (shards / "a.tar").write_bytes(content[:512] + b"\0" * (len(content) - 512))
    with pytest.raises(DataError, match=r"error\[CHANGED_DURING_RUN\] .*a.tar"):
        _ = data.values[np.array([0])]
    with pytest.raises(DataError, match="CHANGED_DURING_RUN"):
        data.report.check_unchanged()
    tar(shards / "a.tar", [("a/0000.png", png(PIXELS[0][:5]))])
    assert (shards / "a.tar").stat().st_size == stamp.st_size
    os.utime(shards / "a.tar", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(DataError, match="CHANGED_DURING_RUN"):
        _ = data.values[:1]


def test_shards_that_change_while_they_are_read(shards, monkeypatch):
    data = load(shards)

    def decode_and_touch(*args):
        os.utime(shards / "a.tar", ns=(1, 1))
        return decode_image(*args)

    monkeypatch.setattr(encoded_images, "decode_image", decode_and_touch)
    with pytest.raises(DataError, match="CHANGED_DURING_RUN"):
        _ = data.values[:1]


def test_the_first_label_of_an_item_counts(tmp_path):
    members = [("a.png", png(PIXELS[0])), ("a.cls", b"first"), ("a.json", b'{"label": "second"}')]
    assert load(tar(tmp_path / "x.tar", members)).classes == ("first",)


@pytest.mark.parametrize("content", [b'{"label": "long"}', b"{"])
def test_a_bad_label_is_an_error_where_labels_are_wanted(tmp_path, monkeypatch, content):
    monkeypatch.setattr(webdataset, "MAX_LABEL_BYTES", 9)
    path = tar(tmp_path / "x.tar", [("a.png", png(PIXELS[0])), ("a.txt", b"one"), ("a.json", content)])
    for options in ({}, {"captions": True, "with_labels": True}):
        with pytest.raises(DataError, match=r"^error\[LABELS\] .*a.json (is larger than 9 bytes|cannot be read)"):
            load(path, **options)
    data = load(path, captions=True)
    assert (data.captions, data.labels) == ((("one",),), None)


def test_a_folder_of_the_library_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra `hub`")
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["b", "a"]), "n": datasets.Value("int32")}
    )
    rows = [{"image": {"bytes": png(PIXELS[i]), "path": None}, "kind": i % 2, "n": i} for i in range(7)]
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    data = load(tmp_path / "saved")
    np.testing.assert_array_equal(data.values[:], np.moveaxis(PIXELS, -1, 1))
    np.testing.assert_array_equal(data.values[np.array([5, 2])], np.moveaxis(PIXELS[[5, 2]], -1, 1))
    assert data.classes == ("b", "a")  # in the order of the column
    assert data.labels.tolist() == [0, 1] * 3 + [0]
    assert "2 classes from the column kind: b (4), a (3)" in data.notes
    few = saved.select([1, 3]).cast_column("kind", datasets.ClassLabel(names=["b", "a"]))
    few.save_to_disk(str(tmp_path / "few"))
    assert load(tmp_path / "few").classes == ("a",)  # no image has the class b
    assert [path.suffix for path in data.report.files] == [".arrow"]
    rows[3]["image"] = None
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "paths"))
    with pytest.raises(BadFilesError, match="row 3: the row contains no image bytes"):
        load(tmp_path / "paths")
    assert load(tmp_path / "paths", on_bad="skip").names == tuple(f"row {i}" for i in (0, 1, 2, 4, 5, 6))
    saved.remove_columns("image").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"error\[NO_IMAGES\] .*has the columns kind, n"):
        load(tmp_path / "none")
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"contains several data sets \(test, train\)"):
        load(tmp_path / "both")
    (tmp_path / "none" / "state.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match=r"error\[BAD_HEADER\] .*none: cannot be read"):
        load(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"undiffuse\[hub\]"):
        load(tmp_path / "saved")


def test_options_of_images(shards):
    with pytest.raises(ConfigError, match="layout: a WebDataset does not take this option"):
        load(shards, layout="NHWC")
    assert load(shards, size=3, crop=True).item_shape == (3, 3, 3)
