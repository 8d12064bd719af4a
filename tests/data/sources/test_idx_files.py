"""Idx files, written here byte by byte: images, labels, parts, and bad inputs."""

import gzip
import os
import struct

import numpy as np
import pytest

from undiffuse.data.sources.builtin import FASHION_FOLDER
from undiffuse.data.sources.registry import load
from undiffuse.errors import ConfigError, DataError, ResourceError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (30, 4, 5), np.uint8)
LABELS = RNG.permutation(np.arange(30) % 3 + 1).astype(np.uint8)


def idx(array, kind=8):
    order = array if array.dtype.itemsize == 1 else array.astype(array.dtype.newbyteorder(">"))
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + order.tobytes()


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("suffix", ["-images-idx3-ubyte", "-images-idx3-ubyte.gz", "-images.idx3-ubyte"])
def test_a_file_and_the_labels_beside_it(tmp_path, suffix):
    path = write(tmp_path / f"train{suffix}", idx(IMAGES))
    assert load(path).labels is None
    labels = suffix.replace("images", "labels").replace("idx3", "idx1")
    write(tmp_path / f"train{labels}", idx(LABELS))
    data = load(path)
    np.testing.assert_array_equal(data.values[:, 0], IMAGES)
    np.testing.assert_array_equal(data.labels, LABELS - 1)
    assert (data.name, data.num_values, data.classes, data.test_from) == ("train-images", 256, ("1", "2", "3"), None)
    assert data.notes[0] == f"labels from train{labels}"


def test_a_folder_of_training_and_test_files(tmp_path):
    """As torchvision leaves it: each file twice, compressed and not."""
    for name, part in (("train", slice(20)), ("t10k", slice(20, None))):
        for gz in ("", ".gz"):
            write(tmp_path / f"{name}-images-idx3-ubyte{gz}", idx(IMAGES[part]))
            write(tmp_path / f"{name}-labels-idx1-ubyte{gz}", idx(LABELS[part]))
    data = load(tmp_path)
    np.testing.assert_array_equal(data.values[:, 0], IMAGES)
    np.testing.assert_array_equal(data.labels, LABELS - 1)
    assert data.split().test.tolist() == list(range(20, 30))
    assert (data.name, data.test_from) == (tmp_path.name, 20)


@pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_installed_fashion_mnist():
    data, built_in = load(FASHION_FOLDER), load("fashion-mnist")
    assert (data.fingerprint, data.test_from) == (built_in.fingerprint, built_in.test_from)


@pytest.mark.parametrize(
    ("dtype", "kind", "options"),
    [
        (np.int16, 11, {}),
        (np.int32, 12, {}),
        (np.float32, 13, {"value_range": (0.0, 300.0)}),
        (np.float64, 14, {}),
        (np.uint8, 8, {"layout": "NCL"}),
    ],
)
def test_types(tmp_path, dtype, kind, options):
    data = load(write(tmp_path / "x-idx3-ubyte", idx(IMAGES.astype(dtype), kind)), **options)
    np.testing.assert_array_equal(data.values, IMAGES if "layout" in options else IMAGES[:, None])


def test_vectors_and_volumes(tmp_path):
    assert load(write(tmp_path / "a-idx2-ubyte", idx(IMAGES[0]))).item_shape == (5,)
    assert load(write(tmp_path / "a-idx4-ubyte", idx(IMAGES[:, None]))).item_shape == (1, 4, 5)


WHOLE = idx(IMAGES)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "EMPTY_FILE"),
        (b"\0\0\x08", "BAD_HEADER"),
        (b"\0\0\x08\0", "BAD_HEADER"),
        (b"\0\0\x08\xff" + bytes(2000), "BAD_HEADER"),
        (b"\0\0\x07\1" + bytes(8), "BAD_HEADER"),
        (b"\1" + WHOLE[1:], "BAD_HEADER"),
        (WHOLE[:9], "TRUNCATED"),
        (WHOLE[:-1], "TRUNCATED"),
        (WHOLE + b"x", "SIZE_MISMATCH"),
        (b"\0\0\x0e\x03" + b"\xff" * 12, "TRUNCATED"),
        (idx(LABELS), "SHAPE"),
        (idx(IMAGES[:0]), "SHAPE"),
        (idx(IMAGES.astype(np.int8), 9), "RANGE"),
        (idx(np.full((1, 2, 2), np.nan, np.float32), 13), "NON_FINITE"),
    ],
)
def test_bad_files(tmp_path, content, code):
    for name in ("a-images-idx3-ubyte", "a-images-idx3-ubyte.gz"):
        path = write(tmp_path / name, content)
        with pytest.raises(DataError) as caught:
            load(path)
        assert str(caught.value).startswith(f"error[{code}] {path}: ")


def test_bad_compressed_files(tmp_path):
    path = tmp_path / "a-images-idx3-ubyte.gz"
    whole = gzip.compress(WHOLE)
    for content in (whole[:-20], whole[:12], whole[:-8] + b"\0" * 8, whole[:40] + b"\xff" * 9 + whole[49:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="CORRUPT"):
            load(path)
    bomb = b"\0\0\x08\x03" + struct.pack(">3I", 1 << 31, 1 << 31, 4)
    path.write_bytes(gzip.compress(bomb + bytes(100)))
    with pytest.raises(DataError, match="TRUNCATED"):
        load(path)


def test_a_promise_beyond_memory(tmp_path, monkeypatch):
    def refuse(size, *_):
        raise ResourceError("MEMORY", "x", str(size), "y")

    monkeypatch.setattr("undiffuse.data.sources.idx_files.require_memory", refuse)
    with pytest.raises(ResourceError, match="600"):
        load(write(tmp_path / "a-images-idx3-ubyte", WHOLE))


def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a-images-idx3-ubyte")
    for source in (tmp_path, tmp_path / "a-images-idx3-ubyte"):
        with pytest.raises(DataError, match="NOT_A_REGULAR_FILE"):
            load(source)


def test_folders_that_are_unclear(tmp_path):
    write(tmp_path / "balanced-train-images-idx3-ubyte", WHOLE)
    (tmp_path / "sheet.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"contains an idx file .* and also 1 image file"):
        load(tmp_path)
    (tmp_path / "sheet.png").unlink()
    write(tmp_path / "letters-train-images-idx3-ubyte", WHOLE)
    with pytest.raises(DataError, match=r"several data sets \(balanced-train-images, letters-train-images\)"):
        load(tmp_path)
    (tmp_path / "letters-train-images-idx3-ubyte").unlink()
    write(tmp_path / "test-images-idx3-ubyte", idx(IMAGES[:, :3]))
    with pytest.raises(DataError, match=r"uint8 \(30, 4, 5\) and uint8 \(30, 3, 5\)"):
        load(tmp_path)


def test_labels_that_do_not_fit(tmp_path):
    path = write(tmp_path / "a-images-idx3-ubyte", WHOLE)
    for labels in (idx(LABELS[:-1]), idx(IMAGES), idx(LABELS.astype(np.float32), 13)):
        write(tmp_path / "a-labels-idx1-ubyte", labels)
        with pytest.raises(DataError, match="LABELS"):
            load(path)
    with pytest.raises(ConfigError, match="OPTION"):
        load(path, size=4)
