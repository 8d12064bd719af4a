"""Every row of `bad_inputs` through the library and the command line, and cases that need more than a row."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import resource
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from bad_inputs import ELSEWHERE, IMAGES, PNG, RGB, ROWS, Row, deep_png, encoded, file, ycck
from children import NOBODY, in_child
from PIL import Image
from safetensors.torch import save_file
from tiny_run import global_batch

from undiffuse.cli import main
from undiffuse.cli.messages import error_line
from undiffuse.data import from_array as arrays
from undiffuse.data import lazy_array
from undiffuse.data.sources import image_folder
from undiffuse.data.sources.registry import load
from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import ConfigError, DataError
from undiffuse.model import checkpoint
from undiffuse.model.config import ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.runtime import tensor_file
from undiffuse.runtime.file_errors import BadFilesError

MAX_SECONDS, MAX_BYTES = 10.0, 1 << 29
FLAGS = {"crop": "--crop", "upscale": "--allow-upscale"}


@pytest.fixture
def folder(monkeypatch):
    """The working directory: a folder that every user may read."""
    folder = Path(tempfile.mkdtemp(prefix="bad-"))
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    yield folder
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def load_result(target: Path, row: Row) -> list[str]:
    """[code, message, message of the command line], or ["", notes, ""]."""
    try:
        data = load(target, **row.options)
    except (DataError, ConfigError) as error:
        return [error.code, str(error), error_line(error, check_command(target, row))]
    return ["", "\n".join(data.notes), ""]


def check_command(target: Path, row: Row) -> list[str]:
    flags = []
    for name, value in row.options.items():
        flags += [FLAGS[name]] if name in FLAGS else [f"--{name.replace('_', '-')}"]
        if name not in FLAGS:
            flags += [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    return ["check", os.fspath(target), *flags]


def check_result(target: Path, row: Row) -> list:
    """[exit code, standard output, standard error] of ``undiffuse check``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(check_command(target, row))
    return [code, out.getvalue(), err.getvalue()]


def results(row: Row, target: Path) -> list:
    """Both results, the seconds they took, and the growth of the process's peak memory in bytes."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    both = [load_result(target, row), check_result(target, row)]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return [*both, time.monotonic() - start, grown * 1024]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_bad_inputs(row, folder):
    target = row.make(folder)
    result = in_child(lambda: results(row, target), user=NOBODY) if row.as_user else results(row, target)
    (code, text, line), (exit_code, out, err), seconds, grown = result
    if not row.codes:
        assert (code, exit_code, err) == ("", 0, ""), result
        assert row.text in text
        assert not row.text or f"note: {row.text}" in out or row.text in out
    else:
        assert code in row.codes.split(), text
        assert row.text in text
        path = folder if row.file is None else folder / row.file
        assert text.startswith(f"error[{code}] {path if row.file != '' else ''}"), text
        assert text.isprintable()
        assert exit_code == (2 if code == "NOT_A_DIRECTORY" else 3)
        assert err.splitlines()[-1] == line
        assert not re.search(r"\b(size|crop|channels|frames|layout|upscale)=", line), "no Python arguments"
        assert len(err.splitlines()) < 5 or row.number == 49
        assert "Traceback" not in out + err
        assert "the canary ran" not in out + err
    assert seconds < MAX_SECONDS
    assert grown < MAX_BYTES


def test_all_problems_are_reported_at_once(folder):
    bad = [row for row in IMAGES if row.codes and not row.options and not row.codes.startswith("MIXED")]
    for row in bad:
        row.make(folder)
    with pytest.raises(BadFilesError, match=rf"and {len(bad) - 1} more: \d+ ") as caught:
        load(folder)
    codes = {problem.path.name: problem.code for problem in caught.value.problems}
    assert len(codes) == len(bad) >= 40
    assert all(codes[row.name] in row.codes.split() for row in bad)


def test_every_number_has_a_row_or_a_test():
    numbers = {row.number for row in ROWS} | set(ELSEWHERE)
    assert numbers == set(range(1, max(64, *numbers) + 1))
    assert not {row.number for row in ROWS} & set(ELSEWHERE)


def test_sixteen_bits_are_scaled_exactly(folder):
    """19, 20: x = 2 v/65535 − 1 for grey and for each colour, rotated or not."""
    values = np.random.default_rng(0).integers(0, 65536, (6, 7, 3)).astype(np.uint16)
    values[0, :2] = [[0, 1, 255], [256, 65534, 65535]]
    for channels in (1, 3):
        file("a.png", deep_png(values[..., :channels]), folder)
        data = load(folder)
        assert (data.values.dtype, data.num_values) == (np.uint16, 65536)
        np.testing.assert_array_equal(data.values[0], values[..., :channels].transpose(2, 0, 1))
        x = IntegerLevels(65536).to_model(torch.from_numpy(data.values)).double().numpy()
        np.testing.assert_allclose(1 + x, 2 / 65535 * data.values, rtol=1e-6, atol=2e-7)
    grey = load(folder, channels=1).values[0, 0]
    assert np.abs(grey - values @ [0.299, 0.587, 0.114]).max() < 1
    assert load(folder, crop=True, size=3).values.dtype == np.uint16


@pytest.mark.parametrize("transform", [0, 2])
def test_inks_are_converted_to_colours(folder, transform):
    """26: (1 − C)(1 − K) of the stored inks."""
    y, x = np.mgrid[:32, :32]
    inks = np.stack([4 * x, 4 * y, 2 * (x + y), 2 * x], -1).astype(np.uint8)
    data = encoded(Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0)
    if transform:  # the same inks, stored as luma and chromas
        colours = np.asarray(Image.fromarray(inks[..., :3]).convert("YCbCr"))
        stored = np.dstack([255 - colours, inks[..., 3]])
        data = encoded(Image.fromarray(stored, "CMYK"), "JPEG", quality=100)
        at = data.index(b"Adobe") + 11
        data = data[:at] + b"\2" + data[at + 1 :]
    file("a.jpg", data, folder)
    values = load(folder).values[0].astype(int)
    expected = (255 - inks[..., :3].astype(int)) * (255 - inks[..., 3:].astype(int)) / 255
    assert np.abs(values - expected.transpose(2, 0, 1)).mean() < 2
    assert ycck().count(b"Adobe\0d\0\0\0\0\2") == 1


def test_inks_without_a_marker_are_refused(folder):
    """26: without Adobe's marker it is unknown whether 255 is full ink or none."""
    data = encoded(Image.new("CMYK", (8, 8)), "JPEG")
    at = data.index(b"\xff\xee")
    file("a.jpg", data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :], folder)
    with pytest.raises(BadFilesError, match="UNSUPPORTED_COLOUR"):
        load(folder)


def test_frames_become_items(folder):
    """12, 13: in their order, with the label of their file."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    images = [Image.fromarray(p) for p in pixels]
    file("a/a.png", encoded(images[0], "PNG", save_all=True, append_images=images[1:4]), folder)
    file("b/b.tif", encoded(images[4], "TIFF"), folder)
    data = load(folder, frames="all")
    np.testing.assert_array_equal(data.values, pixels.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [0, 0, 0, 0, 1]
    assert data.names == (*["a/a.png"] * 4, "b/b.tif")
    assert len(load(folder, frames="first")) == 2
    with pytest.raises(ConfigError, match="OPTION"):
        load(folder, frames="last")


@pytest.mark.parametrize(
    "change",
    [Path.unlink, lambda p: os.truncate(p, 100), lambda p: p.write_bytes(PNG + b"more")],
    ids=["deleted", "truncated", "longer"],
)
def test_files_that_change_before_they_are_read(folder, monkeypatch, change):
    """51: between the scan and the reading."""
    scan_folder = image_folder.scan_folder

    def scan(root):
        result = scan_folder(root)
        change(root / "a.png")
        return result

    monkeypatch.setattr(image_folder, "scan_folder", scan)
    file("a.png", PNG, folder)
    with pytest.raises(BadFilesError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"error[CHANGED_DURING_RUN] {folder}/a.png: ")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_arrays_that_change_during_training(folder, monkeypatch, order, dtype):
    """51: also an array of many pages that is truncated, which would kill a process that maps it into memory."""
    monkeypatch.setattr(arrays, "MAX_CONVERTED_BYTES", 0)
    path, settings = folder / "a.npy", TrainConfig(batch=8)
    values = np.asarray(np.arange(1 << 18).reshape(64, 4096) % 251, dtype, order=order)

    def messages(change) -> list[str]:
        """The errors of a batch and of a slice after a ``change``; a batch before it succeeds."""
        np.save(path, values)
        data = load(path)
        assert len(global_batch(data, np.arange(64), settings, 0).values) == 8
        with monkeypatch.context() as patch:
            change(patch)
            errors = []
            for read in (lambda: global_batch(data, np.arange(64), settings, 1), lambda: data.values[60:]):
                with pytest.raises(DataError) as caught:
                    read()
                errors.append(str(caught.value))
            return errors

    def truncate_in_read(patch):
        empty = np.empty  # called between the check of the file and the read
        patch.setattr(np, "empty", lambda *args: os.truncate(path, 5000) or empty(*args))

    def touch_in_read(patch):
        empty = np.empty
        patch.setattr(np, "empty", lambda *args: os.utime(path, ns=(1, 1)) or empty(*args))

    changes = [lambda _: os.truncate(path, 5000), lambda _: os.utime(path, ns=(1, 1)), lambda _: path.unlink()]
    changes += [lambda _: (path.unlink(), np.save(path, values))]
    changes += [truncate_in_read, touch_in_read] * (order == "C")
    errors = in_child(lambda: [error for change in changes for error in messages(change)])
    assert len(errors) == 2 * len(changes)
    for message in errors:
        assert message.startswith(f"error[CHANGED_DURING_RUN] {path}: was changed, replaced or deleted")
    np.save(path, values)
    data = load(path)
    failure = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(lazy_array.FileStamp, "of", Mock(side_effect=failure))
    with pytest.raises(DataError, match=rf"^error\[UNREADABLE\] {path}: cannot be read \(Input/output error\)"):
        _ = data.values[0]


def _rewrite(path: Path, change, **metadata: str) -> None:
    """Replace the tensors of a checkpoint by ``change(tensors)``, and update its metadata."""
    tensors, old_metadata = tensor_file.read_tensors(path)
    old_metadata.pop("sha256")
    tensor_file.write_tensors(path, change(tensors), old_metadata | metadata)


def _map(path: Path, function) -> None:
    """Replace each tensor of a checkpoint by ``function(tensor)``."""
    _rewrite(path, lambda tensors: {name: function(tensor) for name, tensor in tensors.items()})


def _describe(path: Path, **changed) -> None:
    """Change the description of the model in a checkpoint."""
    metadata = tensor_file.read_tensors(path)[1]
    _rewrite(path, dict, model=json.dumps(json.loads(metadata["model"]) | changed))


NETWORK = {"kind": "mlp", "width": 4, "depth": 1}
CHECKPOINTS = {
    "truncated": (lambda p: os.truncate(p, p.stat().st_size - 9), "DAMAGED", ""),
    "flipped": (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x7f"), "DAMAGED", "its own sha256"),
    "an image": (lambda p: p.write_bytes(PNG), "DAMAGED", ""),
    "missing": (lambda p: p.unlink(), "NO_MODEL", "no model.safetensors"),
    "other weights": (lambda p: save_file({"w": torch.ones(2)}, p), "NOT_OURS", "not written by undiffuse"),
    "newer": (lambda p: _rewrite(p, dict, undiffuse="99"), "FORMAT", "it has format 99"),
    "a classifier": (lambda p: _rewrite(p, dict, classifier="{}"), "KIND", "this is a classifier"),
    "missing tensor": (lambda p: _rewrite(p, lambda t: dict(list(t.items())[1:])), "TENSOR", "is missing"),
    "extra tensor": (lambda p: _rewrite(p, lambda t: t | {"more": torch.ones(1)}), "TENSOR", "'more'"),
    "other shapes": (lambda p: _map(p, lambda t: t[None]), "TENSOR", "has the shape (1,"),
    "other types": (lambda p: _map(p, torch.Tensor.half), "TENSOR", "float16, not"),
    "compiled": (
        lambda p: _rewrite(p, lambda t: {f"_orig_mod.{name}": v for name, v in t.items()}),
        "TENSOR",
        "'_orig_mod.",
    ),
    **{
        f"items of {shape}": (partial(_describe, item_shape=shape), "DESCRIPTION", "not the shape of an item")
        for shape in ([0], [2**62], [2**200, 3], [-1], [2.0], [True])
    },
    "not finite": (lambda p: _map(p, lambda t: t * torch.nan), "NON_FINITE", "the tensor"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bad_checkpoints(name, tmp_path, capsys):
    """64: the message names the file and the tensor. Half-written folders and older files are in tests/crash."""
    change, code, text = CHECKPOINTS[name]
    path = tmp_path / "model.safetensors"
    checkpoint.save(Diffusion(ModelConfig(network=NETWORK, chain_length=4), (2,), IntegerLevels(5)), path)
    change(path)
    assert main(["inspect", str(tmp_path)]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"error[{code}] {tmp_path}")
    assert text in err


def test_bad_files_among_many(folder, capsys):
    """By default all are reported before any training, the first twenty by name; with skip each one is recorded."""
    images = folder / "d"
    for i in range(200):
        noise = np.random.default_rng(i).integers(0, 256, (4, 4), np.uint8)
        file(f"d/{i:04}.png", encoded(noise, "PNG"), folder)
    file("d/0100.png", encoded(RGB, "PNG")[:-20], folder)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        '[model]\nnetwork = {kind = "unet", widths = [8], blocks = 1, attention = []}\nchain_length = 4\n'
        'schedule = {name = "linear_log_snr", high = 6.0}\n[train]\nbatch = 8\nprecision = "float32"\npreviews = 1\n'
    )
    train = ["train", str(images), "--out", str(folder / "run"), "--steps", "1", "--config", str(recipe)]
    train += ["--device", "cpu"]
    assert main(train) == 3
    line = capsys.readouterr().err
    assert line.startswith(f"error[TRUNCATED] {images}/0100.png: ")
    assert line.endswith("Fetch or export the file again, or give --on-bad skip to leave it out.\n")
    assert not (folder / "run").exists()
    for i in range(30):
        file(f"d/bad{i:02}.png", b"text", folder)
    assert main(train) == 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[:20]] == ["TRUNCATED", *["NOT_AN_IMAGE"] * 19]
    assert lines[20] == "  and 11 more"
    assert lines[21].startswith(f"error[TRUNCATED] {images}/0100.png: ")
    assert "(and 30 more: 30 NOT_AN_IMAGE)" in lines[21]
    assert lines[21].endswith("or give --on-bad skip to leave these files out.")
    assert len(lines) == 22

    file("d/other.png", encoded(np.zeros((5, 5), np.uint8), "PNG"), folder)
    assert main([*train, "--on-bad", "skip"]) == 0
    output = capsys.readouterr().out
    assert "note: 32 of 231 files skipped: 30 NOT_AN_IMAGE, 1 TRUNCATED, 1 MIXED_SIZES" in output
    assert f"{folder}/run/skipped.json" in output
    skipped = json.loads((folder / "run" / "skipped.json").read_text())
    assert [problem["code"] for problem in skipped] == ["TRUNCATED", *["NOT_AN_IMAGE"] * 30, "MIXED_SIZES"]
    assert skipped[0]["path"] == f"{images}/0100.png"
    assert "bytes are missing" in skipped[0]["reason"]
    assert main(["inspect", str(folder / "run")]) == 0
    assert "32 of 231 files skipped" in capsys.readouterr().out
    assert main(["check", str(images), "--on-bad", "skip", "--json", "--out", str(folder / "sheet.png")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["items"], facts["skipped"], facts["sizes"]) == (199, skipped, {"4 x 4": 199})
    assert (folder / "sheet.png").is_file()
    with pytest.raises(ConfigError, match="OPTION"):
        load(images, on_bad="ignore")


def test_evaluate_records_skipped_files(folder, capsys):
    file("d/a.png", encoded(RGB, "PNG"), folder)
    file("d/b.png", b"text", folder)
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
    model = Diffusion(ModelConfig(network=network, chain_length=4), (3, 5, 5), IntegerLevels(256), {"num_values": 256})
    (folder / "run").mkdir()
    checkpoint.save(model, folder / "run" / "model.safetensors")
    evaluate = ["evaluate", str(folder / "run"), str(folder / "d"), "--on-bad", "skip", "--minutes", "0.01"]
    assert main([*evaluate, "--estimate", "discrete", "--device", "cpu"]) == 0
    assert "skipped: 1 file, listed in " in capsys.readouterr().out
    assert json.loads((folder / "run" / "evaluation-skipped.json").read_text())[0]["code"] == "NOT_AN_IMAGE"


def test_no_valid_file_is_left(folder):
    file("a.png", b"text", folder)
    with pytest.raises(BadFilesError, match="NOT_AN_IMAGE"):
        load(folder, on_bad="skip")
