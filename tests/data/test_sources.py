"""`load`: built-in data sets, unknown names, and the options of each source."""

import gzip
import hashlib
import inspect
import os
import struct
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from undiffuse.data.image_decoding import ImageOptions
from undiffuse.data.sources.builtin import BUILTIN, FASHION_FILES, FASHION_FOLDER, TOYS
from undiffuse.data.sources.registry import OPTIONS, SOURCES, load, option_words
from undiffuse.data.transform import IntegerLevels, transform_for
from undiffuse.errors import ConfigError, DataError


def test_digits():
    data = load("digits")
    assert (data.values.shape, data.values.dtype, data.num_values) == ((1797, 1, 8, 8), np.uint8, 17)
    assert (data.values.min(), data.values.max(), len(data.classes)) == (0, 16, 10)
    assert data.values[0, 0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert data.labels[:10].tolist() == list(range(10))
    assert transform_for(data) == IntegerLevels(17)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"^error\[MISSING_PACKAGE\] digits: .*pip install 'undiffuse\[data\]'"):
        load("digits")


@pytest.mark.parametrize("name", TOYS)
def test_toy_densities_are_reproducible(name):
    data = load(name)
    assert (data.values.shape, data.values.dtype, data.num_values) == ((10_000, 2), np.float32, None)
    assert data.fingerprint == load(name).fingerprint
    mean, std = data.moments(data.split().train)
    assert np.abs(mean).max() < 0.6
    assert 0.4 < min(std) < max(std) < 1.6
    assert len(data.classes) == (0 if data.labels is None else len(np.unique(data.labels)))


def test_toy_densities():
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
    arrays = [
        rng.integers(0, n, s, np.uint8) for s, n in (((30, 4, 5), 256), ((30,), 10), ((10, 4, 5), 256), ((10,), 10))
    ]
    for name, array in zip(FASHION_FILES, arrays, strict=True):
        write_idx(folder, name, array)
    return arrays


def test_fashion_mnist_from_a_folder(tmp_path, monkeypatch):
    train, train_labels, test, test_labels = fake_fashion(tmp_path)
    for name in FASHION_FILES:
        sha = hashlib.sha256(gzip.decompress((tmp_path / name).read_bytes())).hexdigest()
        monkeypatch.setitem(FASHION_FILES, name, sha)
    data = load("fashion-mnist", folder=tmp_path)
    np.testing.assert_array_equal(data.values[:, 0], np.concatenate([train, test]))
    np.testing.assert_array_equal(data.labels, np.concatenate([train_labels, test_labels]))
    assert data.split().test.tolist() == list(range(30, 40))


def test_files_that_are_not_fashion_mnist(tmp_path):
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
def test_installed_fashion_mnist():
    data = load("fashion-mnist")
    assert data.values.shape == (70_000, 1, 28, 28)
    assert np.bincount(data.labels).tolist() == [7000] * 10
    split = data.split()
    assert len(split.test) == 10_000
    assert len(split.train) + len(split.validation) == 60_000
    assert len(split.validation) == pytest.approx(6000, abs=300)
    assert not any("repeat" in note for note in data.notes)


@pytest.mark.parametrize(
    ("source", "code", "text"),
    [
        ("moons", "UNKNOWN_DATA", "Did you mean two-moons"),
        ("fashionmnist", "UNKNOWN_DATA", "Did you mean fashion-mnist"),
        ("qqqqqq", "UNKNOWN_DATA", "Built in are " + ", ".join(BUILTIN)),
        ("./digits", "NOT_A_DIRECTORY", "no such file or folder"),
        ("nothing.npy", "NOT_A_DIRECTORY", "no such"),
        ("https://example.org/images.zip", "NOT_A_DIRECTORY", "no such"),
    ],
)
def test_unknown_sources(source, code, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert caught.value.code == code
    assert text in str(caught.value)


@pytest.mark.parametrize("source", ["qqqqqq", "nothing.npy"])
def test_unknown_sources_list_every_kind_of_data(source):
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert all(row.title in caught.value.fix for row in SOURCES)


def test_long_paths():
    with pytest.raises(DataError, match=r"^error\[PATH_TOO_LONG\]"):
        load("a/" * 2500)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("digits", {"size": 8}, "size: a built-in data set does not take this option. Its options are folder,"),
        ("digits", {"folder": "x"}, "folder: digits does not take this option. Leave it out."),
        (".", {"folder": "x"}, "folder: a folder of images does not take this option. Its options are size, crop,"),
        (".", {"num_values": 2}, "num_values: a folder of images does not take this option."),
        ("a.npy", {"size": 4}, "size: an array file does not take this option. Its options are layout, num_values,"),
        ("a.csv", {"layout": "ND"}, "layout: a table does not take this option. Its options are label_column,"),
    ],
)
def test_options_that_a_source_does_not_take(source, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", np.arange(6.0).reshape(3, 2) / 7)
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError) as caught:
        load(source, **options)
    assert str(caught.value).startswith(f"error[OPTION] {message}")


def test_options_that_are_not_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    data = load("digits", **{option.name: option.default for option in OPTIONS.values()})
    assert data.notes == ("digits is the built-in data set; the file or folder of that name is ./digits",)


def test_the_table_matches_the_loaders():
    """Each option of a row is a keyword of its loader, or a field of `ImageOptions`."""
    images = {field.name for field in fields(ImageOptions)}
    for row in SOURCES:
        parameters = inspect.signature(row.module().load).parameters
        accepted = set(parameters) | (images if "image_options" in parameters else set())
        applied = {"text_encoder"} if "captions" in parameters else set()  # by `load`, to the data of any source
        named = accepted - {"source", "allocate", "image_options"}
        assert {option.name for option in row.options} == named | applied, row.title
        assert row.allocates == ("allocate" in parameters)


def test_a_folder_without_read_permission_is_reported_by_the_last_source(tmp_path, monkeypatch):
    """As another user would see it: the tests may run as one whom permissions do not bind."""

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"PERMISSION"):
        load(tmp_path)


def test_an_option_of_two_numbers_is_two_words():
    for pair in ((0.0, 1.0), [0.0, 1.0]):
        assert option_words({"value_range": pair, "crop": True}) == ["--value-range", "0.0", "1.0", "--crop"]
