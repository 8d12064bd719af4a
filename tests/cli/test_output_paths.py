"""No command writes into the data that it reads; `undiffuse train .` in a folder of images leaves it as it was."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import RECIPE

from undiffuse.cli.training_options import open_run
from undiffuse.data.sources.registry import load as load_data
from undiffuse.errors import ConfigError
from undiffuse.training import autoencoder_task, distillation_task
from undiffuse.training.run_folder import Run

PHOTOS = 40


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images, trained on by `undiffuse train .` in it."""
    from undiffuse.cli import main

    folder = tmp_path_factory.mktemp("outputs")
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(PHOTOS):
        Image.fromarray(random.integers(256, size=(4, 4)).astype(np.uint8)).save(folder / "photos" / f"{i:02d}.png")
    (folder / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "photos")
        assert main(["train", ".", "--config", "../recipe.toml", "--steps", "1", "--device", "cpu"]) == 0
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_training_inside_the_data_leaves_them_as_they_were(place):
    data = load_data(place / "photos")
    assert files(place / "photos") == {f"{i:02d}.png" for i in range(PHOTOS)}
    assert (len(data), data.name) == (PHOTOS, "photos")
    run = Run(place / "runs" / "photos")
    assert run.finished
    assert run.load_data().fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("cwd", "data", "out"),
    [
        ("", "photos", "runs/photos"),
        ("", "photos/", "runs/photos"),
        ("", "./photos/../photos", "runs/photos"),
        ("photos", ".", "../runs/photos"),
        ("photos", "../photos", "../runs/photos"),
        ("photos/cats", "..", "../../runs/photos"),
        ("photos/cats", ".", "../runs/cats"),
        ("link", ".", "../runs/photos"),
        ("", "link", "runs/photos"),
        ("", ".hidden", "runs/hidden"),
        ("", "table.v2.csv", "runs/table"),
        ("photos", "digits", "runs/digits"),
        ("photos", "/", "runs/data"),
    ],
)
def test_the_default_run_folder(cwd, data, out, tmp_path, monkeypatch):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "table.v2.csv").touch()
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path / cwd)
    if data == "/":
        with pytest.raises(ConfigError, match="would be read as data"):
            open_run(None, data)
        return
    assert str(open_run(None, data).folder) == out


def assert_refused(command, start, words, place, call, monkeypatch):
    """One line that starts with ``start`` and has the ``words``, and every file as it was."""
    monkeypatch.chdir(place)
    before = files(place)
    said = call(*command.replace("RUN", "runs/photos").split())
    assert (said.code, said.err.count("\n"), said.err.startswith(start)) == (2, 1, True), said
    assert all(word in said.err for word in words), said
    assert files(place) == before


@pytest.mark.parametrize(
    "command",
    [
        "train photos --steps 1 --out photos/run",
        "train photos --steps 1 --out photos",
        "train-classifier photos --steps 1 --out photos/sub/../run",
        "pack photos photos/packed.npy",
        "compare photos photos --out photos/comparison",
        "compare photos --run RUN --out photos/comparison",
        "evaluate RUN --out photos/evaluation",
        "evaluate RUN photos --out photos",
        "ema RUN --best --out photos/model.safetensors",
        "sample RUN --out photos/samples",
        "sample RUN --animate photos/samples.gif",
        "restore RUN photos/00.png --noise 0.1 --out photos/restored",
        "interpolate RUN photos/00.png photos/01.png --out photos/strip.png",
    ],
)
def test_outputs_inside_the_data_are_refused(command, place, call, monkeypatch):
    assert_refused(command, "error[OUT] ", ["inside the data"], place, call, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "train photos --steps 1 --out NAME",
        "train photos --steps 1 --init NAME",
        "train-autoencoder photos --steps 1 --out NAME",
        "sample RUN --out NAME",
        "sample NAME",
        "ema NAME --length 0.1",
        "pack photos NAME.npy",
        "import RUN NAME",
        "export RUN NAME --format torch",
    ],
)
def test_names_that_no_model_file_can_have_are_refused_at_the_start(command, place, call, monkeypatch):
    words = ["run\\udcff", "is not valid UTF-8"]
    assert_refused(command.replace("NAME", "run\udcff"), "error[PATH] ", words, place, call, monkeypatch)


def test_a_link_into_the_data_is_inside_them(place, call, tmp_path):
    (tmp_path / "out").symlink_to(place / "photos")
    said = call("pack", place / "photos", tmp_path / "out" / "packed.npy")
    assert (said.code, "inside the data" in said.err) == (2, True)
    assert call("pack", place / "photos", tmp_path / "packed.npy").code == 0


def test_the_working_folder_has_a_name(place, call, tmp_path, monkeypatch):
    """Where it is the run folder, or that of the model file, the names of other runs follow from it."""
    monkeypatch.setattr(distillation_task, "TEACHER_STEPS", 1)
    shutil.copytree(place / "runs" / "photos", tmp_path / "teacher")
    monkeypatch.chdir(tmp_path / "teacher")
    options = ("--steps", 1, "--device", "cpu")
    assert "into teacher-1-call\n" in call("distill", "model.safetensors", place / "photos", *options).out
    again = call("distill", "model.safetensors", place / "photos", *options)  # there is no --extend
    assert "is a finished run already; another --out trains again\n" in again.out
    assert "into teacher-2-calls\n" in call("distill", ".", "--calls", 2, *options).out


def test_the_command_after_an_autoencoder_names_folders(place, call, tmp_path, monkeypatch):
    monkeypatch.setattr(autoencoder_task, "fit_autoencoder", lambda *_, **__: None)
    shutil.copytree(place / "photos", tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    said = call("train-autoencoder", "./digits", "--out", "../run")  # not the built-in data set
    assert "next: undiffuse train ./digits --autoencoder ../run --out ../run-latent\n" in said.out
    said = call("train-autoencoder", place / "photos", "--out", ".")
    assert (said.code, f"--autoencoder . --out {tmp_path.name}-latent\n" in said.out) == (0, True), said
