"""``undiffuse check`` of every kind of source, with a contact sheet."""

import gzip
import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from undiffuse.cli import main
from undiffuse.data import arrays
from undiffuse.data.builtin import FASHION_FILES

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3)).astype(np.uint8)


def images(place):
    (place / "d").mkdir()
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(place / "d" / f"{i}.png")
    return [place / "d"]


def classes(place):
    images(place)
    for i in range(6):
        (place / "e" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.move(place / "d" / f"{i}.png", place / "e" / "ab"[i % 2])
    return [place / "e"]


def shards(place):
    (folder,) = images(place)
    with tarfile.open(place / "x.tar", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name)
    return [place / "x.tar"]


def hub(place):
    datasets = pytest.importorskip("datasets", reason="it writes the folders that are read; the extra `hub` has it")
    rows = []
    for pixels in PIXELS:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(place / "saved"))
    return [place / "saved"]


def npy(place):
    np.save(place / "x.npy", np.moveaxis(PIXELS, -1, 1))
    return [place / "x.npy"]


def another_type(place):
    np.save(place / "x.npy", PIXELS.astype(np.float64))
    return [place / "x.npy", "--layout", "NHWC"]


def packed(place):
    assert main(["pack", str(*images(place)), str(place / "x.npy")]) == 0
    return [place / "x.npy"]


def npz(place):
    np.savez(place / "x.npz", images=np.moveaxis(PIXELS, -1, 1), labels=np.arange(6) % 2)
    return [place / "x.npz"]


def table(place):
    (place / "x.csv").write_text("a,b,c\n" + "".join(f"{i},{i * i},{i % 3}\n" for i in range(6)))
    return [place / "x.csv"]


def idx(place):
    parts = (PIXELS[:4, ..., 0], np.arange(4), PIXELS[4:, ..., 0], np.arange(2))
    for name, values in zip(FASHION_FILES, parts, strict=True):
        head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
        (place / name).write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))
        FASHION_FILES[name] = hashlib.sha256(head + values.astype(np.uint8).tobytes()).hexdigest()
    return ["fashion-mnist", "--folder", place]


@pytest.mark.parametrize("make", [images, classes, shards, hub, npy, another_type, packed, npz, table, idx])
def test_of_every_source(tmp_path, monkeypatch, capsys, make):
    monkeypatch.setattr(arrays, "COPIED", 0)
    for name, sha in FASHION_FILES.items():
        monkeypatch.setitem(FASHION_FILES, name, sha)
    given = list(map(str, make(tmp_path)))
    capsys.readouterr()
    assert main(["check", *given, "--json", "--out", str(tmp_path / "sheet.PNG")]) == 0
    said = capsys.readouterr()
    facts, size = json.loads(said.out), 4 if make is another_type else 1
    assert said.err == ""
    assert facts["items"] == 6
    assert facts["bytes"] == (72 if make is table else 6 * 25 * size * (1 if make is idx else 3))
    with Image.open(tmp_path / "sheet.PNG") as sheet:
        assert sheet.width > 30
    assert main(["check", *given]) == 0


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.npy", "x.pdf"])
def test_a_sheet_that_is_no_picture_is_refused_first(tmp_path, capsys, name):
    assert main(["check", str(tmp_path / "none"), "--out", str(tmp_path / name)]) == 2
    said = capsys.readouterr()
    assert said.err == f"error[OPTION] --out: '{name}' is no name of a picture. Give one that ends in .png.\n"
