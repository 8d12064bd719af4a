"""A run remembers its data: commands about a run need no DATA, and prepare images as training did."""

import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image
from test_cli import RECIPE

from undiffuse.data.single import load_image
from undiffuse.data.sources.registry import load as load_data
from undiffuse.errors import ConfigError, DataError
from undiffuse.model import presets
from undiffuse.model.checkpoint import load
from undiffuse.model.config import read
from undiffuse.training.diffusion_task import fit_diffusion
from undiffuse.training.run_folder import Run

OPTIONS = ("--size", 8, "--crop", "--channels", 1, "--on-bad", "skip")
QUICK = ("--items", 4, "--mc-samples", 2, "--estimate", "discrete")
HELD_OUT = 0.3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of photographs of two sizes, one of them torn, with a run of them that was begun beside it."""
    from undiffuse.cli import main

    folder = tmp_path_factory.mktemp("own")
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(90):
        pixels = random.integers(256, size=(12, 10 + 2 * (i % 2), 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{i:02d}.png")
    (folder / "photos" / "torn.png").write_bytes(b"\x89PNG")
    (folder / "recipe.toml").write_text(RECIPE.replace("held_out = 0.2", f"held_out = {HELD_OUT}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = [*OPTIONS, "--config", "recipe.toml", "--steps", 2, "--device", "cpu"]
        assert main([str(a) for a in ("train", "photos", *options)]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands run in another folder than the one in which training ran."""
    monkeypatch.chdir(tmp_path)


def test_the_record_names_source_and_options(place):
    record = Run(place / "runs" / "photos").record["data"]
    assert record["source"] == str(place / "photos")
    assert record["options"] == {"size": 8, "crop": True, "channels": 1, "on_bad": "skip"}
    assert "source" not in load(place / "runs" / "photos").info  # a path says nothing on another machine
    data = Run(place / "runs" / "photos").load_data()
    assert (len(data), data.fingerprint) == (90, record["fingerprint"])


@pytest.mark.parametrize("model", ["", "model.safetensors"])
def test_evaluate_needs_no_data(place, call, model, tmp_path):
    said = call("evaluate", place / "runs" / "photos" / model, *QUICK, "--out", tmp_path)
    assert (said.code, said.err) == (0, "")
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert summary["part"] == "held out for testing"
    assert summary["fingerprint"] == Run(place / "runs" / "photos").record["data"]["fingerprint"]


def test_ema_and_advise_need_no_data(place, call, tmp_path):
    run = place / "runs" / "photos"
    said = call(
        "ema", run, "--best", "--items", 2, "--mc-samples", 1, "--length", 0.05, "--out", tmp_path / "x.safetensors"
    )
    assert (said.code, said.err) == (0, "")
    assert "photos, held out for validation" in said.out
    said = call("advise", run, "--calls", 2, "--items", 8, "--fine", 8, "--samples", 20)
    assert (said.code, said.err) == (0, "")
    assert "compared with held-out items" in said.out


def test_compare_reads_the_data_and_the_held_out_share_of_the_run(place, call, tmp_path):
    run, samples = place / "runs" / "photos", tmp_path / "samples"
    assert call("sample", run, "--n", 20, "--steps", 2, "--out", samples).code == 0
    flags = ["--metric", "kernel", "--json"]
    for arguments in ([samples], [samples / "samples.npz", "--run", run], [samples, place / "photos", *OPTIONS]):
        said = call("compare", *arguments, *flags)
        assert said.code == 0
        assert "of 90 images: cropped" in said.err
        assert json.loads(said.out)["held_out"] == HELD_OUT
    said = call("compare", samples, *flags, "--held-out", 0.1)
    assert said.err == f"error[HELD_OUT] --held-out 0.1: {run} held out {HELD_OUT} of these data. Leave it out.\n"
    other = call("compare", samples, place / "photos", "--size", 8, *OPTIONS[2:], "--background", "black", *flags)
    assert json.loads(other.out)["held_out"] == HELD_OUT  # the option changes nothing here: the fingerprint counts
    said = call("compare", samples / "samples.npz", *flags)
    assert (said.code, said.err[:13]) == (2, "error[USAGE] ")


@pytest.mark.parametrize("command", ["evaluate", "ema"])
def test_data_that_have_changed_are_an_error(place, call, command, tmp_path):
    shutil.copytree(place, tmp_path / "moved")
    run = tmp_path / "moved" / "runs" / "photos"
    record = Run(run).record
    record["data"]["source"] = str(tmp_path / "moved" / "photos")
    Run(run)._write(record)
    (tmp_path / "moved" / "photos" / "00.png").unlink()
    more = ["--best"] if command == "ema" else []
    said = call(command, run, *more)
    assert said.code == 3
    assert said.err.startswith(f"error[CHANGED] {tmp_path}/moved/photos: these data have changed since the run began: ")
    assert "90 items then, 89 now" in said.err
    (tmp_path / "moved" / "photos").rename(tmp_path / "moved" / "pictures")
    said = call(command, run, *more)
    cause = "the data that the run was trained on are not there. Name DATA after RUN."
    assert said.err == f"error[NOT_FOUND] {tmp_path}/moved/photos: {cause}\n"


def test_options_without_data_and_runs_without_a_source(place, call, tmp_path):
    said = call("evaluate", place / "runs" / "photos", "--size", 16)
    assert said.err.startswith("error[USAGE] --size: it is an option of DATA")
    shutil.copy(place / "runs" / "photos" / "model.safetensors", tmp_path)
    said = call("evaluate", tmp_path)
    assert said.err == f"error[NO_SOURCE] {tmp_path}: no run.json in this folder records the data. Name DATA.\n"
    data = load_data(place / "photos", size=8, crop=True, channels=1, on_bad="skip").with_origin("", {})
    Run(tmp_path / "run").open(read(place / "recipe.toml", presets.get("digits")), data)
    with pytest.raises(ConfigError, match="they were an array in Python"):
        Run(tmp_path / "run").load_data()


def test_the_last_place_of_the_same_data_is_kept(place, tmp_path):
    data = load_data("two-moons")
    config = presets.get("vector")
    Run(tmp_path / "run").open(config, data.with_origin("", {}))
    Run(tmp_path / "run").open(config, data)
    Run(tmp_path / "run").open(config, data.with_origin("", {}))  # an array in memory has no place
    assert Run(tmp_path / "run").record["data"]["source"] == "two-moons"
    assert Run(tmp_path / "run").load_data().fingerprint == data.fingerprint


def test_paths_and_numbers_of_options_are_plain(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).uniform(-1, 1, (9, 1, 4, 4)).astype(np.float32))
    monkeypatch.chdir(tmp_path)
    data = load_data("x.npy", value_range=(np.float64(-1), 1), layout="NCHW")
    assert json.loads(json.dumps(data.report.options)) == {"value_range": [-1.0, 1], "layout": "NCHW"}
    assert load_data(data.report.source, **data.report.options).fingerprint == data.fingerprint


def photograph(path, shape=(20, 30, 3)):
    Image.fromarray(np.random.default_rng(3).integers(256, size=shape).astype(np.uint8)).save(path)


def test_restore_and_interpolate_prepare_images_as_training_did(place, call, tmp_path):
    run = place / "runs" / "photos"
    photograph(tmp_path / "large.png")
    mask = np.zeros((20, 30), np.uint8)
    mask[:10] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    said = call("restore", run, "large.png", "--mask", "mask.png", "--n", 2, "--steps", 2, "--out", "out")
    assert (said.code, said.err) == (0, "")
    assert "note: large.png: cropped to the centre square, RGB converted to grey" in said.out
    prepared = load_image("large.png", 1, (8, 8), {"size": 8, "crop": True}).pixels[0]
    answers = np.load("out/samples.npz")["x"]
    assert (answers[:, 0, 4:] == prepared[4:]).all()
    assert (answers[:, 0, :4] != prepared[:4]).any()
    said = call("interpolate", run, "large.png", "large.png", "--n", 2, "--steps", 1, "--out", "strip.png")
    assert (said.code, said.err) == (0, "")
    Image.fromarray(mask[:, :20]).save(tmp_path / "narrow.png")
    said = call("restore", run, "large.png", "--mask", "narrow.png", "--out", "none")
    assert said.err.startswith("error[SIZE] narrow.png: it has 20 x 20 pixels, and large.png 30 x 20")


def test_an_observed_image_is_not_resized(place, call, tmp_path):
    """Resizing would change the blur and the noise that the options state."""
    photograph(tmp_path / "large.png")
    said = call("restore", place / "runs" / "photos", "large.png", "--noise", 0.1)
    assert said.err.startswith("error[SIZE] large.png: it has 30 x 20 pixels instead of 8 x 8")
    flags = ["--noise", 0.1, "--degrade", "--n", 1, "--steps", 2, "--out", "out"]
    assert call("restore", place / "runs" / "photos", "large.png", *flags).code == 0


def test_an_image_that_cannot_be_prepared(tmp_path):
    photograph(tmp_path / "wide.png")
    with pytest.raises(DataError, match=r"not square.*Crop or resize it"):
        load_image(tmp_path / "wide.png", 1, (8, 8), {"size": 8})


def test_the_next_lines_run_as_printed(place, call, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    options = [*OPTIONS, "--config", "recipe.toml", "--steps", 2, "--device", "cpu", "--out", tmp_path / "a run"]
    said = call("train", "photos", *options)
    commands = [shlex.split(line.removeprefix("next: "))[1:] for line in said.out.splitlines() if "next: " in line]
    assert [command[0] for command in commands] == ["sample", "evaluate"]
    assert commands[1] == ["evaluate", str(tmp_path / "a run")]
    monkeypatch.chdir(tmp_path)
    for command, quick in zip(commands, (["--n", 2, "--steps", 1], QUICK), strict=True):
        assert call(*command, *quick).code == 0


def test_the_library_remembers_too(place, tmp_path):
    data = load_data(place / "photos", size=8, crop=True, channels=1, on_bad="skip")
    config = read(place / "recipe.toml", presets.get("digits"))
    from undiffuse.model.config import replace_train

    run = fit_diffusion(replace_train(config, max_steps=1), data, tmp_path / "run", "cpu", quiet=True)
    assert Run(run).load_data().fingerprint == data.fingerprint
