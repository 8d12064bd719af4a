"""Every row of `bad_inputs` through the library and the command line, if need be as one who may not read all."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_inputs import ELSEWHERE, IMAGES, PNG, RGB, ROWS, Row, deep_png, encoded, file, ycck
from children import NOBODY, in_child
from PIL import Image

from undiffuse import checkpoint
from undiffuse.cli import main
from undiffuse.codec import Pixels
from undiffuse.config import ModelConfig, TrainConfig
from undiffuse.data import BadFiles, arrays, load, rows
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError, DataError
from undiffuse.train.batch import global_batch

SECONDS, MEMORY = 5.0, 1 << 29
FLAGS = {"crop": "--crop", "upscale": "--allow-upscale"}


@pytest.fixture
def place(monkeypatch):
    """A folder that everybody may read, in which the test works."""
    folder = Path(tempfile.mkdtemp(prefix="bad-"))
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    yield folder
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def by_library(target: Path, row: Row) -> list[str]:
    """[code, message], or ["", notes]."""
    try:
        data = load(target, **row.options)
    except (DataError, ConfigError) as error:
        return [error.code, str(error)]
    return ["", "\n".join(data.notes)]


def by_command(target: Path, row: Row) -> list:
    """[exit code, standard output, standard error]."""
    flags = []
    for name, value in row.options.items():
        flags += [FLAGS[name]] if name in FLAGS else [f"--{name.replace('_', '-')}"]
        if name not in FLAGS:
            flags += [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["check", os.fspath(target), *flags])
    return [code, out.getvalue(), err.getvalue()]


def tried(row: Row, target: Path) -> list:
    """What both say, the seconds that took and the bytes by which the most memory ever used has grown."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = [by_library(target, row), by_command(target, row)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return [*said, time.monotonic() - began, grown * 1024]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bad_inputs(row, place):
    target = row.make(place)
    said = in_child(lambda: tried(row, target), user=NOBODY) if row.nobody else tried(row, target)
    (code, text), (exit_code, out, err), seconds, grown = said
    if not row.codes:
        assert (code, exit_code, err) == ("", 0, ""), said
        assert row.words in text
        assert not row.words or f"note: {row.words}" in out or row.words in out
    else:
        assert code in row.codes.split(), text
        assert row.words in text
        where = place if row.file is None else place / row.file
        assert text.startswith(f"error[{code}] {where if row.file != '' else ''}"), text
        assert text.isprintable()
        assert exit_code == (2 if code == "NOT_A_DIRECTORY" else 3)
        assert err.splitlines()[-1] == text
        assert len(err.splitlines()) < 5 or row.number == 49
        assert "Traceback" not in out + err
        assert "the canary ran" not in out + err
    assert seconds < 2 * SECONDS
    assert grown < MEMORY


def test_every_problem_is_told_at_once(place):
    bad = [row for row in IMAGES if row.codes and not row.options and not row.codes.startswith("MIXED")]
    for row in bad:
        row.make(place)
    with pytest.raises(BadFiles, match=rf"and {len(bad) - 1} more: \d+ ") as caught:
        load(place)
    found = {problem.path.name: problem.code for problem in caught.value.problems}
    assert len(found) == len(bad) >= 40
    assert all(found[row.name] in row.codes.split() for row in bad)


def test_every_number_has_a_row():
    assert {row.number for row in ROWS} | set(ELSEWHERE) == set(range(1, 65))
    assert not {row.number for row in ROWS} & set(ELSEWHERE)


def test_sixteen_bits_are_scaled_exactly(place):
    """19, 20: what the network sees is 2 v / 65535 − 1, of grey and of each colour, turned upright or not."""
    values = np.random.default_rng(0).integers(0, 65536, (6, 7, 3)).astype(np.uint16)
    values[0, :2] = [[0, 1, 255], [256, 65534, 65535]]
    for channels in (1, 3):
        file("a.png", deep_png(values[..., :channels]), place)
        data = load(place)
        assert (data.values.dtype, data.levels) == (np.uint16, 65536)
        np.testing.assert_array_equal(data.values[0], values[..., :channels].transpose(2, 0, 1))
        seen = Pixels(65536).encode(torch.from_numpy(data.values)).double().numpy()
        np.testing.assert_allclose(1 + seen, 2 / 65535 * data.values, rtol=1e-6, atol=2e-7)
    grey = load(place, channels=1).values[0, 0]
    assert np.abs(grey - values @ [0.299, 0.587, 0.114]).max() < 1
    assert load(place, crop=True, size=3).values.dtype == np.uint16


@pytest.mark.parametrize("transform", [0, 2])
def test_inks_become_colours(place, transform):
    """26: (1 − C)(1 − K) of each of the inks that were stored, by the formula and not by the decoder."""
    y, x = np.mgrid[:32, :32]
    inks = np.stack([4 * x, 4 * y, 2 * (x + y), 2 * x], -1).astype(np.uint8)
    data = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    if transform:  # the same inks, given as luma and chromas
        colours = np.asarray(Image.fromarray(inks[..., :3]).convert("YCbCr"))
        stored = np.dstack([255 - colours, inks[..., 3]])
        data = encoded(Image.fromarray(stored, "CMYK"), "JPEG", quality=100)
        at = data.index(b"Adobe") + 11
        data = data[:at] + b"\2" + data[at + 1 :]
    file("a.jpg", data, place)
    values = load(place).values[0].astype(int)
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(values - expected.transpose(2, 0, 1)).mean() < 2
    assert ycck().count(b"Adobe\0d\0\0\0\0\2") == 1


def test_inks_without_a_mark_are_refused(place):
    """26: without Adobe's mark nobody knows whether 255 is all of an ink or none."""
    data = encoded(Image.new("CMYK", (8, 8)), "JPEG")
    at = data.index(b"\xff\xee")
    file("a.jpg", data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :], place)
    with pytest.raises(BadFiles, match="UNSUPPORTED_COLOUR"):
        load(place)


def test_frames_are_pictures_of_their_own(place):
    """12, 13: all frames are items, in their order, with the label of their file."""
    pictures = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    images = [Image.fromarray(p) for p in pictures]
    file("a/a.png", encoded(images[0], "PNG", save_all=True, append_images=images[1:4]), place)
    file("b/b.tif", encoded(images[4], "TIFF"), place)
    data = load(place, frames="all")
    np.testing.assert_array_equal(data.values, pictures.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 0, 0, 0, 1]
    assert data.names == (*["a/a.png"] * 4, "b/b.tif")
    assert len(load(place, frames="first")) == 2
    with pytest.raises(ConfigError, match="OPTION"):
        load(place, frames="last")


def test_files_that_change(place, monkeypatch):
    """51: between the listing and the reading."""
    from undiffuse.data import folder

    whole = folder._scan

    def changed(change):
        def scan(root):
            found = whole(root)
            change(root / "a.png")
            return found

        monkeypatch.setattr(folder, "_scan", scan)
        file("a.png", PNG, place)
        with pytest.raises(BadFiles) as caught:
            load(place)
        assert str(caught.value).startswith(f"error[CHANGED_DURING_RUN] {place}/a.png: ")

    for change in (Path.unlink, lambda p: os.truncate(p, 100), lambda p: p.write_bytes(PNG + b"more")):
        changed(change)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["uint8", "float64"])
def test_an_array_that_changes_while_it_is_trained_on(place, monkeypatch, order, kind):
    """51: also one of many pages that is cut short, which would kill a process that had it mapped."""
    monkeypatch.setattr(arrays, "COPIED", 0)
    path, settings = place / "a.npy", TrainConfig(batch=8)
    values = np.asarray(np.arange(1 << 20).reshape(256, 4096) % 251, kind, order=order)

    def told(change) -> list[str]:
        """What is said of the array after a ``change``, and that it was trained on before."""
        np.save(path, values)
        data = load(path)
        assert len(global_batch(data, np.arange(256), settings, 0)[0]) == 8
        with monkeypatch.context() as patch:
            change(patch)
            said = []
            for read in (lambda: global_batch(data, np.arange(256), settings, 1), lambda: data.values[250:]):
                with pytest.raises(DataError) as caught:
                    read()
                said.append(str(caught.value))
            return said

    def while_read(patch):
        real = os.preadv
        patch.setattr(os, "preadv", lambda *of: os.truncate(path, 5000) or real(*of))

    def touched_while_read(patch):
        real = os.preadv
        patch.setattr(os, "preadv", lambda *of: os.utime(path, ns=(1, 1)) or real(*of))

    changes = [lambda _: os.truncate(path, 5000), lambda _: os.utime(path, ns=(1, 1)), lambda _: path.unlink()]
    changes += [lambda _: (path.unlink(), np.save(path, values))]
    changes += [while_read, touched_while_read] * (order == "C")
    for change in changes:
        for said in in_child(lambda change=change: told(change)):
            assert said.startswith(f"error[CHANGED_DURING_RUN] {path}: was changed, replaced or deleted")
    np.save(path, values)
    data = load(path)
    monkeypatch.setattr(rows.Stamp, "of", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(DataError, match=rf"^error\[UNREADABLE\] {path}: cannot be read \(Input/output error\)"):
        _ = data.values[0]


NETWORK = {"kind": "mlp", "width": 4, "depth": 1}


def _renamed(path: Path, change) -> None:
    held, about = checkpoint.read_tensors(path)
    about.pop("sha256")
    checkpoint.write_tensors(path, change(held), about)


CHECKPOINTS = {
    "truncated": (lambda p: os.truncate(p, p.stat().st_size - 9), "DAMAGED", ""),
    "flipped": (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x7f"), "DAMAGED", "its own sha256"),
    "an image": (lambda p: p.write_bytes(PNG), "DAMAGED", ""),
    "missing": (lambda p: p.unlink(), "NO_MODEL", "no model.safetensors"),
    "other weights": (lambda p: _foreign(p, {"decoder.weight": torch.ones(2)}), "NOT_OURS", "not written by undiffuse"),
    "newer": (lambda p: _about(p, undiffuse="99"), "FORMAT", "it has format 99"),
    "a classifier": (lambda p: _about(p, classifier="{}"), "KIND", "this is a classifier"),
    "missing tensor": (lambda p: _renamed(p, lambda t: dict(list(t.items())[1:])), "TENSOR", "is missing"),
    "extra tensor": (lambda p: _renamed(p, lambda t: t | {"more": torch.ones(1)}), "TENSOR", "'more' does not belong"),
    "other shapes": (
        lambda p: _renamed(p, lambda t: {n: v[None] for n, v in t.items()}),
        "TENSOR",
        "has the shape (1,",
    ),
    "other types": (lambda p: _renamed(p, lambda t: {n: v.half() for n, v in t.items()}), "TENSOR", "float16, not"),
    "compiled": (lambda p: _renamed(p, lambda t: {f"_orig_mod.{n}": v for n, v in t.items()}), "TENSOR", "'_orig_mod."),
    "not finite": (
        lambda p: _renamed(p, lambda t: {n: v * torch.nan for n, v in t.items()}),
        "NON_FINITE",
        "the tensor",
    ),
}


def _foreign(path: Path, held: dict) -> None:
    from safetensors.torch import save_file

    save_file(held, path)


def _about(path: Path, **more: str) -> None:
    held, about = checkpoint.read_tensors(path)
    about.pop("sha256")
    checkpoint.write_tensors(path, held, about | more)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(name, tmp_path, capsys):
    """64: each with the file's and the tensor's name; half-written folders and older ones are in tests/crash."""
    change, code, words = CHECKPOINTS[name]
    checkpoint.save(Diffusion(ModelConfig(network=NETWORK, steps=4), (2,), Pixels(5)), tmp_path / "model.safetensors")
    change(tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"error[{code}] {tmp_path}")
    assert words in err


def test_one_bad_file_among_a_thousand(place, capsys):
    """Strict: all are told before step 0, the first twenty by name. With skip: none is left out in silence."""
    folder = place / "d"
    good = encoded(RGB, "PNG")
    for i in range(1000):
        noise = np.random.default_rng(i).integers(0, 256, (4, 4), np.uint8)
        file(f"d/{i:04}.png", encoded(noise, "PNG"), place)
    file("d/0500.png", good[:-20], place)
    recipe = place / "recipe.toml"
    recipe.write_text(
        '[model]\nnetwork = {kind = "unet", widths = [8], blocks = 1, attention = []}\nsteps = 4\n'
        'schedule = {name = "linear_log_snr", high = 6.0}\n[train]\nbatch = 8\nprecision = "float32"\npreviews = 1\n'
    )
    arguments = ["train", str(folder), "--out", str(place / "run"), "--steps", "1", "--config", str(recipe)]
    arguments += ["--device", "cpu"]
    assert main(arguments) == 3
    assert capsys.readouterr().err.startswith(f"error[TRUNCATED] {folder}/0500.png: ")
    assert not (place / "run").exists()
    for i in range(30):
        file(f"d/bad{i:02}.png", b"text", place)
    assert main(arguments) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[:20]] == ["TRUNCATED", *["NOT_AN_IMAGE"] * 19]
    assert lines[20:22] == ["  and 11 more", "  --on-bad skip leaves out each file that cannot be taken"]
    assert lines[22].startswith(f"error[TRUNCATED] {folder}/0500.png: ")
    assert "(and 30 more: 30 NOT_AN_IMAGE)" in lines[22]
    assert len(lines) == 23

    file("d/other.png", encoded(np.zeros((5, 5), np.uint8), "PNG"), place)
    assert main([*arguments, "--on-bad", "skip"]) == 0
    said = capsys.readouterr().out
    assert "note: 32 of 1031 files skipped: 30 NOT_AN_IMAGE, 1 TRUNCATED, 1 MIXED_SIZES" in said
    assert f"skipped files are listed in {place}/run/skipped.json" in said
    skipped = json.loads((place / "run" / "skipped.json").read_text())
    assert [one["code"] for one in skipped] == ["TRUNCATED", *["NOT_AN_IMAGE"] * 30, "MIXED_SIZES"]
    assert skipped[0]["path"] == f"{folder}/0500.png"
    assert "bytes are missing" in skipped[0]["reason"]
    assert main(["inspect", str(place / "run")]) == 0
    assert "32 of 1031 files skipped" in capsys.readouterr().out
    assert main(["check", str(folder), "--on-bad", "skip", "--json", "--out", str(place / "sheet.png")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["items"], facts["skipped"], facts["sizes"]) == (999, skipped, {"4 x 4": 999})
    assert (place / "sheet.png").is_file()
    evaluate = ["evaluate", str(place / "run"), str(folder), "--on-bad", "skip", "--items", "2", "--draws", "1"]
    assert main([*evaluate, "--estimate", "discrete", "--device", "cpu"]) == 0
    assert "32 files were skipped: " in capsys.readouterr().out
    assert json.loads((place / "run" / "evaluation-skipped.json").read_text()) == skipped
    with pytest.raises(ConfigError, match="OPTION"):
        load(folder, on_bad="ignore")


def test_nothing_is_left(place):
    file("a.png", b"text", place)
    with pytest.raises(BadFiles, match="NOT_AN_IMAGE"):
        load(place, on_bad="skip")
