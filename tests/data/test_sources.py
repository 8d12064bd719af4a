import gzip
import hashlib
import struct
import sys

import numpy as np
import pytest

from undiffuse.codec import Pixels, codec_for
from undiffuse.data import BUILTIN, load
from undiffuse.data.builtin import FASHION_FILES, FASHION_FOLDER, TOYS
from undiffuse.errors import ConfigError, DataError


def test_digits():
    data = load("digits")
    assert (data.values.shape, data.values.dtype, data.levels) == ((1797, 1, 8, 8), np.uint8, 17)
    assert (data.values.min(), data.values.max(), len(data.classes)) == (0, 16, 10)
    assert data.values[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert data.labels[:10].tolist() == list(range(10))
    assert codec_for(data) == Pixels(17)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"^error\[MISSING_PACKAGE\] digits: .*pip install 'undiffuse\[data\]'"):
        load("digits")


@pytest.mark.parametrize("name", TOYS)
def test_toy_densities_are_always_the_same_points(name):
    data = load(name)
    assert (data.values.shape, data.values.dtype, data.levels) == ((10_000, 2), np.float32, None)
    assert data.fingerprint == load(name).fingerprint
    mean, std = data.moments(data.split().train)
    assert np.abs(mean).max() < 0.6
    assert 0.4 < min(std) < max(std) < 1.6
    assert len(data.classes) == (0 if data.labels is None else len(np.unique(data.labels)))


def test_toy_densities_are_where_they_should_be():
    radius = np.linalg.norm(load("eight-gaussians").values, axis=1)
    assert radius.mean() == pytest.approx(2 + 0.2**2 / 4, abs=0.01)
    board = load("checkerboard").values
    assert (np.floor(board).sum(1) % 2 == 0).all()
    assert abs(board).max() <= 2
    moons = load("two-moons")
    centre = np.stack([moons.labels, moons.labels / 2], 1)
    assert np.linalg.norm(moons.values - centre, axis=1).std() == pytest.approx(0.06, rel=0.05)


def write_idx(folder, name, array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(folder / name, "wb") as stream:
        stream.write(head + array.tobytes())


def fake_fashion(folder):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, s, np.uint8) for s in ((30, 4, 5), (30,), (10, 4, 5), (10,))]
    for name, array in zip(FASHION_FILES, arrays, strict=True):
        write_idx(folder, name, array)
    return arrays


def test_fashion_mnist_is_read_from_a_folder(tmp_path, monkeypatch):

    train, train_labels, test, test_labels = fake_fashion(tmp_path)
    for name in FASHION_FILES:
        sha = hashlib.sha256(gzip.decompress((tmp_path / name).read_bytes())).hexdigest()
        monkeypatch.setitem(FASHION_FILES, name, sha)
    data = load("fashion-mnist", folder=tmp_path)
    np.testing.assert_array_equal(data.values[:, 0], np.concatenate([train, test]))
    np.testing.assert_array_equal(data.labels, np.concatenate([train_labels, test_labels]))
    assert data.split().test.tolist() == list(range(30, 40))


def test_what_is_not_fashion_mnist(tmp_path):
    with pytest.raises(DataError, match=r"^error\[MISSING_DATA\] .*dataset-fashion-mnist, or give a folder"):
        load("fashion-mnist", folder=tmp_path)
    fake_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    with pytest.raises(DataError, match=rf"^error\[WRONG_DATA\] {path}: .*c59f468a"):
        load("fashion-mnist", folder=tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=rf"^error\[CORRUPT\] {path}: "):
        load("fashion-mnist", folder=tmp_path)


@pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_itself():
    data = load("fashion-mnist")
    assert data.values.shape == (70_000, 1, 28, 28)
    assert np.bincount(data.labels).tolist() == [7000] * 10
    split = data.split()
    assert len(split.test) == 10_000
    assert len(split.train) + len(split.validation) == 60_000
    assert len(split.validation) == pytest.approx(6000, abs=300)
    assert not any("repeat" in note for note in data.notes)


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("moons", "UNKNOWN_DATA", "Did you mean two-moons"),
        ("fashionmnist", "UNKNOWN_DATA", "Did you mean fashion-mnist"),
        ("qqqqqq", "UNKNOWN_DATA", "Built in are " + ", ".join(BUILTIN)),
        ("./digits", "NOT_A_DIRECTORY", "no such file or folder"),
        ("nothing.npy", "NOT_A_DIRECTORY", "no such"),
        ("https://example.org/images.zip", "NOT_A_DIRECTORY", "no such"),
    ],
)
def test_names_that_are_nothing(source, code, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert caught.value.code == code
    assert words in str(caught.value)


def test_paths_that_are_too_long():
    with pytest.raises(DataError, match=r"^error\[PATH_TOO_LONG\]"):
        load("a/" * 2500)


@pytest.mark.parametrize(
    ("source", "options"),
    [("digits", {"size": 8}), ("digits", {"folder": "x"}), ("x", {"folder": "x"}), (".", {"levels": 2})],
)
def test_options_without_a_use(source, options):
    with pytest.raises(ConfigError, match=r"^error\[OPTION\]"):
        load(source, **options)


def test_options_that_were_not_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    data = load("digits", size=None, crop=False)
    assert data.notes[-1] == "a folder called digits is here too; ./digits would mean that one"
    np.save("a.npy", np.arange(6.0).reshape(3, 2) / 7)
    with pytest.raises(ConfigError, match=r"^error\[OPTION\] size"):
        load("a.npy", size=4)
