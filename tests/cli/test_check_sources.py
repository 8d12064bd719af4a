"""``undiffuse check`` for every kind of source, with a contact sheet."""

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
from undiffuse.data import from_array as arrays
from undiffuse.data.sources.builtin import FASHION_FILES

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 5, 3)).astype(np.uint8)


def images(folder):
    (folder / "d").mkdir()
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / "d" / f"{i}.png")
    return [folder / "d"]


def classes(folder):
    images(folder)
    for i in range(6):
        (folder / "e" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "d" / f"{i}.png", folder / "e" / "ab"[i % 2])
    return [folder / "e"]


def shards(folder):
    (source,) = images(folder)
    with tarfile.open(folder / "x.tar", "w") as archive:
        for path in sorted(source.iterdir()):
            archive.add(path, path.name)
    return [folder / "x.tar"]


def hf_datasets(folder):
    datasets = pytest.importorskip("datasets", reason="needs the extra `hub`")
    rows = []
    for pixels in PIXELS:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder / "saved"))
    return [folder / "saved"]


def npy(folder):
    np.save(folder / "x.npy", np.moveaxis(PIXELS, -1, 1))
    return [folder / "x.npy"]


def float_array(folder):
    np.save(folder / "x.npy", PIXELS.astype(np.float64))
    return [folder / "x.npy", "--layout", "NHWC"]


def packed(folder):
    assert main(["pack", str(*images(folder)), str(folder / "x.npy")]) == 0
    return [folder / "x.npy"]


def npz(folder):
    np.savez(folder / "x.npz", images=np.moveaxis(PIXELS, -1, 1), labels=np.arange(6) % 2)
    return [folder / "x.npz"]


def table(folder):
    (folder / "x.csv").write_text("a,b,c\n" + "".join(f"{i},{i * i},{i % 3}\n" for i in range(6)))
    return [folder / "x.csv"]


def fashion_mnist(folder):
    parts = (PIXELS[:4, ..., 0], np.arange(4), PIXELS[4:, ..., 0], np.arange(2))
    for name, values in zip(FASHION_FILES, parts, strict=True):
        head = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
        (folder / name).write_bytes(gzip.compress(head + values.astype(np.uint8).tobytes()))
        FASHION_FILES[name] = hashlib.sha256(head + values.astype(np.uint8).tobytes()).hexdigest()
    return ["fashion-mnist", "--folder", folder]


BYTES = {float_array: 4 * 6 * 25 * 3, table: 72, fashion_mnist: 6 * 25}
"""Bytes of the values where they differ from 6 RGB images of 5 x 5 bytes."""


@pytest.mark.parametrize(
    "make", [images, classes, shards, hf_datasets, npy, float_array, packed, npz, table, fashion_mnist]
)
def test_every_source(tmp_path, monkeypatch, call, make):
    monkeypatch.setattr(arrays, "MAX_CONVERTED_BYTES", 0)
    for name, sha in FASHION_FILES.items():
        monkeypatch.setitem(FASHION_FILES, name, sha)
    arguments = make(tmp_path)
    code, out, err = call("check", *arguments, "--json", "--out", tmp_path / "sheet.PNG")
    assert (code, err.splitlines()[-1]) == (0, f"contact sheet of 6 evenly spaced items: {tmp_path}/sheet.PNG")
    facts = json.loads(out)
    assert facts["items"] == 6
    assert facts["bytes"] == BYTES.get(make, 6 * 25 * 3)
    with Image.open(tmp_path / "sheet.PNG") as sheet:
        assert sheet.width > 30
    assert call("check", *arguments).code == 0


@pytest.mark.parametrize("name", ["x.xyz", "x", "x.npy", "x.pdf", "x.bmp", "x.dib"])
def test_the_name_of_the_sheet_is_checked_first(tmp_path, call, name):
    code, _, err = call("check", tmp_path / "none", "--out", tmp_path / name)
    assert code == 2
    cause = f"'{name}' does not end in .png, .jpg, .webp, .tif or .gif"
    assert err == f"error[OPTION] --out: {cause}. Give a name that ends in .png.\n"
