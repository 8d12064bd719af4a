"""Packed data are the same data, in one file that stays on the disk."""

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from undiffuse.cli import main
from undiffuse.data import BadFiles, Dataset, arrays, folder, load
from undiffuse.data.pack import packing, told
from undiffuse.data.rows import Rows
from undiffuse.errors import ConfigError, DataError, ResourceError


def pack(source, out, **options):
    with packing(out) as packed:
        data = load(source, place=packed.place, **options)
        packed.write(data, out)
    return data


def same(data, packed):
    for name in (
        "name",
        "levels",
        "classes",
        "test_from",
        "value_range",
        "columns",
        "names",
        "fingerprint",
        "item_shape",
    ):
        assert getattr(data, name) == getattr(packed, name), name
    assert packed.notes == data.notes
    for name in ("labels", "cond", "mask"):
        np.testing.assert_array_equal(getattr(data, name), getattr(packed, name))
    assert isinstance(packed.values, Rows)


@pytest.fixture
def images(tmp_path):
    """A folder of 3 + 3 images, one of which cannot be read, in two classes."""
    for i in range(6):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 5, 3)).astype(np.uint8)).save(path)
    return tmp_path / "in"


def test_a_folder_without_ever_being_in_memory(images, tmp_path, monkeypatch):
    whole = load(images)
    monkeypatch.setattr(folder, "in_memory", None)
    packed = pack(images, tmp_path / "out.npy")
    monkeypatch.undo()
    assert packed.classes == ("a", "b")
    assert packed.names == ("a/0.png", "a/2.png", "a/4.png", "b/1.png", "b/3.png", "b/5.png")
    same(whole, load(tmp_path / "out.npy"))
    assert sorted(os.listdir(tmp_path)) == ["in", "out.npy", "out.told.safetensors"]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), whole.values)


def test_fewer_images_than_files(images, tmp_path):
    (images / "a" / "2.png").write_bytes(b"no image")
    with pytest.raises(BadFiles):
        pack(images, tmp_path / "out.npy")
    assert os.listdir(tmp_path) == ["in"]
    pack(images, tmp_path / "out.npy", on_bad="skip")
    same(load(images, on_bad="skip"), load(tmp_path / "out.npy"))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(images / "a" / "9.png")
    pack(images, tmp_path / "other.npy", on_bad="skip")  # read twice, since one differs from the most
    assert len(load(tmp_path / "other.npy")) == 5


def test_arrays_of_every_kind(tmp_path, monkeypatch):
    r = np.random.default_rng(0)
    sources = {
        "levels.npy": (r.integers(0, 17, (9, 1, 2, 3)), {"levels": 17}),
        "deep.npy": (r.integers(0, 65536, (9, 1, 2, 3)).astype(np.uint16), {}),
        "series.npy": (r.random((9, 7, 2)), {"layout": "NLC", "value_range": (0.0, 1.0)}),
        "volume.npy": (r.random((9, 1, 2, 3, 4)), {}),
        "vector.npy": (r.random((9, 4)), {}),
    }
    monkeypatch.setattr(arrays, "COPIED", 0)
    for name, (values, options) in sources.items():
        np.save(tmp_path / name, values)
        pack(tmp_path / name, tmp_path / f"packed-{name}", **options)
        same(load(tmp_path / name, **options), load(tmp_path / f"packed-{name}"))
    labels, cond = np.arange(9) % 3, r.random((9, 2, 3)).astype(np.float32)
    np.savez(tmp_path / "told.npz", x=r.random((9, 4)), y=labels, cond=cond, mask=r.random((9, 2)) < 0.5)
    pack(tmp_path / "told.npz", tmp_path / "told.npy")
    same(load(tmp_path / "told.npz"), load(tmp_path / "told.npy"))
    (tmp_path / "table.csv").write_text("a,b,label\n1,2,x\n3,4,y\n")
    pack(tmp_path / "table.csv", tmp_path / "table.npy")
    same(load(tmp_path / "table.csv"), load(tmp_path / "table.npy"))


def test_an_official_test_part_stays_one(tmp_path):
    data = Dataset("x", np.zeros((4, 2), np.uint8), 256, test_from=3)
    with packing(tmp_path / "x.npy") as packed:
        packed.write(data, tmp_path / "x.npy")
    same(data, load(tmp_path / "x.npy"))


def test_what_cannot_be_packed(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    for name in ("out.npz", "x.npy"):
        with pytest.raises(ConfigError, match="OPTION"):
            pack(tmp_path / "x.npy", tmp_path / name)
    with pytest.raises(ResourceError, match=r"FOLDER.*cannot be written \(No such file"):
        pack(tmp_path / "x.npy", tmp_path / "none" / "out.npy")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"error\[DISK\] .*: 152 bytes cannot be had \(No space left"):
        pack(tmp_path / "x.npy", tmp_path / "out.npy")
    assert os.listdir(tmp_path) == ["x.npy"]


@pytest.mark.parametrize(
    "about",
    [
        None,
        "[]",
        "{",
        "{}",
        {"shape": [3, 3]},
        {"shape": [1] * 6},
        {"levels": "many"},
        {"classes": 5},
        {"value_range": [1]},
        "[" * 10_000,
        {"labels": np.zeros(2, np.int64)},
        {"labels": np.zeros(3)},
        {"names": np.frombuffer(b"a\0b", np.uint8)},
    ],
)
def test_what_is_told_must_fit(tmp_path, about):
    np.save(tmp_path / "in.npy", np.zeros((3, 2), np.uint8))
    pack(tmp_path / "in.npy", tmp_path / "x.npy")
    plain = {"name": "x", "shape": [3, 2], "levels": 256, "classes": [], "notes": [], "test_from": None}
    plain |= {"value_range": None, "columns": []}
    beside = {}
    if isinstance(about, dict):
        beside = {name: value for name, value in about.items() if isinstance(value, np.ndarray)}
        about = json.dumps(plain | {name: value for name, value in about.items() if name not in beside})
    save_file(beside, told(tmp_path / "x.npy"), {} if about is None else {"about": about})
    with pytest.raises(DataError) as caught:
        load(tmp_path / "x.npy")
    assert str(caught.value).startswith(("error[BAD_HEADER] ", "error[SIZE_MISMATCH] ", "error[RANGE]"))
    told(tmp_path / "x.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"error\[BAD_HEADER\] .*told.safetensors: does not say what was packed"):
        load(tmp_path / "x.npy")


def test_the_command(images, tmp_path, capsys):
    out = tmp_path / "x.npy"
    (images / "a" / "2.png").write_bytes(b"no image")
    assert main(["pack", str(images), str(out), "--on-bad", "skip", "--channels", "1"]) == 0
    said = capsys.readouterr().out
    assert "packed: 5 items" in said
    assert "2 classes from sub-folders" in said
    assert json.loads((tmp_path / "x.skipped.json").read_text())[0]["code"] == "NOT_AN_IMAGE"
    same(load(images, channels=1, on_bad="skip"), load(out))
    assert main(["check", str(out), "--levels", "4"]) == 2
    assert "a packed array has no use for it" in capsys.readouterr().err
