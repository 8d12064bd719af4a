"""Packed data equal the original, and stay on disk."""

import errno
import json
import os
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from undiffuse.cli import main
from undiffuse.data import from_array as arrays
from undiffuse.data.dataset import Dataset
from undiffuse.data.lazy_array import LazyArray
from undiffuse.data.sources import image_folder, packed_array
from undiffuse.data.sources.packed_array import METADATA_KEY, pack_writer, sidecar_path
from undiffuse.data.sources.registry import load
from undiffuse.errors import ConfigError, DataError, ResourceError
from undiffuse.runtime.file_errors import BadFilesError


def pack(source, out, **options):
    with pack_writer(out) as writer:
        data = load(source, allocate=writer.allocate, **options)
        writer.write(data, out)
    return data


FIELDS = ("name", "num_values", "classes", "notes", "test_from", "value_range", "columns", "names", "fingerprint")


def assert_same(data, packed):
    for name in (*FIELDS, "item_shape"):
        assert getattr(data, name) == getattr(packed, name), name
    for name in ("labels", "cond", "mask"):
        np.testing.assert_array_equal(getattr(data, name), getattr(packed, name))
    assert isinstance(packed.values, LazyArray)


@pytest.fixture
def images(tmp_path):
    """A folder of 3 + 3 images in two classes."""
    for i in range(6):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 5, 3)).astype(np.uint8)).save(path)
    return tmp_path / "in"


def test_a_folder_is_never_in_memory(images, tmp_path, monkeypatch):
    data = load(images)
    monkeypatch.setattr(image_folder, "require_memory", Mock(side_effect=AssertionError("allocated in memory")))
    packed = pack(images, tmp_path / "out.npy")
    monkeypatch.undo()
    assert packed.classes == ("a", "b")
    assert packed.names == ("a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png", "b/5.png")
    assert_same(data, load(tmp_path / "out.npy"))
    assert sorted(os.listdir(tmp_path)) == ["in", "out.meta.safetensors", "out.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), data.values)


def test_fewer_images_than_files(images, tmp_path):
    (images / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(BadFilesError):
        pack(images, tmp_path / "out.npy")
    assert os.listdir(tmp_path) == ["in"]
    pack(images, tmp_path / "out.npy", on_bad="skip")
    assert_same(load(images, on_bad="skip"), load(tmp_path / "out.npy"))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(images / "a" / "9.png")
    pack(images, tmp_path / "other.npy", on_bad="skip")  # decoded twice, because one image differs from most
    assert len(load(tmp_path / "other.npy")) == 5


def test_arrays_of_every_kind(tmp_path, monkeypatch):
    r = np.random.default_rng(0)
    sources = {
        "levels.npy": (r.integers(0, 17, (9, 1, 2, 3)), {"num_values": 17}),
        "deep.npy": (r.integers(0, 65536, (9, 1, 2, 3)).astype(np.uint16), {}),
        "series.npy": (r.random((9, 7, 2)), {"layout": "NLC", "value_range": (0.0, 1.0)}),
        "volume.npy": (r.random((9, 1, 2, 3, 4)), {}),
        "vector.npy": (r.random((9, 4)), {}),
    }
    monkeypatch.setattr(arrays, "MAX_CONVERTED_BYTES", 0)
    for name, (values, options) in sources.items():
        np.save(tmp_path / name, values)
        pack(tmp_path / name, tmp_path / f"packed-{name}", **options)
        assert_same(load(tmp_path / name, **options), load(tmp_path / f"packed-{name}"))
    labels, cond = np.arange(9) % 3, r.random((9, 2, 3)).astype(np.float32)
    np.savez(tmp_path / "cond.npz", x=r.random((9, 4)), y=labels, cond=cond, mask=r.random((9, 2)) < 0.5)
    pack(tmp_path / "cond.npz", tmp_path / "packed-cond.npy")
    assert_same(load(tmp_path / "cond.npz"), load(tmp_path / "packed-cond.npy"))
    (tmp_path / "table.csv").write_text("a,b,label\n1,2,x\n3,4,y\n")
    pack(tmp_path / "table.csv", tmp_path / "table.npy")
    assert_same(load(tmp_path / "table.csv"), load(tmp_path / "table.npy"))


def test_an_official_test_part_is_kept(tmp_path):
    data = Dataset("x", np.zeros((4, 2), np.uint8), 256, test_from=3)
    with pack_writer(tmp_path / "x.npy") as writer:
        writer.write(data, tmp_path / "x.npy")
    assert_same(data, load(tmp_path / "x.npy"))


def test_packing_errors(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    for name in ("out.npz", "x.npy"):
        with pytest.raises(ConfigError, match="OPTION"):
            pack(tmp_path / "x.npy", tmp_path / name)
    with pytest.raises(ResourceError, match=r"FOLDER.*cannot be written \(No such file"):
        pack(tmp_path / "x.npy", tmp_path / "none" / "out.npy")

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=full))
    with pytest.raises(ResourceError, match=r"error\[DISK\] .*: 152 bytes are not available \(No space left"):
        pack(tmp_path / "x.npy", tmp_path / "out.npy")
    assert os.listdir(tmp_path) == ["x.npy"]


def test_packing_on_a_system_without_preallocation(images, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    pack(images, tmp_path / "out.npy")
    assert_same(load(images), load(tmp_path / "out.npy"))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(packed_array, "bytes", Mock(side_effect=full), raising=False)
    with pytest.raises(ResourceError, match=r"error\[DISK\] .* bytes are not available \(No space left"):
        pack(images, tmp_path / "other.npy")
    assert sorted(os.listdir(tmp_path)) == ["in", "out.meta.safetensors", "out.npy"]


def test_a_second_file_that_exists_is_not_replaced(images, tmp_path):
    sidecar_path(tmp_path / "out.npy").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"error\[OPTION\] .*out.meta.safetensors: exists already"):
        pack(images, tmp_path / "out.npy")
    assert sidecar_path(tmp_path / "out.npy").read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["in", "out.meta.safetensors"]


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "[]",
        "{",
        "{}",
        {"shape": [3, 3]},
        {"shape": [1] * 6},
        {"num_values": "many"},
        {"classes": 5},
        {"value_range": [1]},
        "[" * 10_000,
        {"labels": np.zeros(2, np.int64)},
        {"labels": np.zeros(3)},
        {"labels": np.array([0, 2, 1]), "classes": ["a", "b"]},
        {"labels": np.array([0, -1, 0]), "classes": ["a"]},
        {"test_from": "1"},
        {"test_from": 10**400},
        {"validation_from": 2, "test_from": 1},
        {"num_values": 10**400},
        {"value_range": [0, 10**400], "num_values": None},
        {"names": np.frombuffer(b"a\0b", np.uint8)},
    ],
)
def test_metadata_must_match_the_array(tmp_path, metadata):
    np.save(tmp_path / "in.npy", np.zeros((3, 2), np.uint8))
    pack(tmp_path / "in.npy", tmp_path / "x.npy")
    valid = {"name": "x", "shape": [3, 2], "num_values": 256, "classes": [], "notes": [], "test_from": None}
    valid |= {"value_range": None, "columns": []}
    arrays = {}
    if isinstance(metadata, dict):
        arrays = {name: value for name, value in metadata.items() if isinstance(value, np.ndarray)}
        metadata = json.dumps(valid | {name: value for name, value in metadata.items() if name not in arrays})
    save_file(arrays, sidecar_path(tmp_path / "x.npy"), {} if metadata is None else {METADATA_KEY: metadata})
    with pytest.raises(DataError) as caught:
        load(tmp_path / "x.npy")
    assert str(caught.value).startswith(("error[BAD_HEADER] ", "error[SIZE_MISMATCH] ", "error[RANGE]"))
    sidecar_path(tmp_path / "x.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"error\[BAD_HEADER\] .*meta.safetensors: does not describe packed data"):
        load(tmp_path / "x.npy")


def test_pack_command(images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "x.npy"
    require_memory = image_folder.require_memory
    monkeypatch.setattr(image_folder, "require_memory", Mock(side_effect=AssertionError("allocated in memory")))
    (images / "a" / "2.png").write_bytes(b"no image")
    assert main(["pack", str(images), str(out), "--on-bad", "skip", "--channels", "1"]) == 0
    monkeypatch.setattr(image_folder, "require_memory", require_memory)
    output = capsys.readouterr().out
    assert "packed: 5 items" in output
    assert "2 classes from sub-folders" in output
    assert json.loads((tmp_path / "x.skipped.json").read_text())[0]["code"] == "NOT_AN_IMAGE"
    assert_same(load(images, channels=1, on_bad="skip"), load(out))
    (tmp_path / "y.skipped.json").write_text("mine")
    assert main(["pack", str(images), str(tmp_path / "y.npy"), "--on-bad", "skip", "--channels", "1"]) == 2
    assert (tmp_path / "y.skipped.json").read_text() == "mine"
    assert "y.skipped.json: exists already. Give OUT.npy another name" in capsys.readouterr().err
    assert main(["check", str(out), "--num-values", "4"]) == 2
    assert "a packed array does not take this option" in capsys.readouterr().err
