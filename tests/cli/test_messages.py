"""What a newcomer meets: photographs of many sizes, options that do not exist, errors about Python arguments."""

import functools
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_cli import RECIPE

from undiffuse.cli import data_options
from undiffuse.cli.messages import command_flags, config_hint, error_line
from undiffuse.data.sources.registry import load
from undiffuse.errors import ConfigError, DataError
from undiffuse.model.config import TrainConfig
from undiffuse.runtime.file_errors import FIXES, BadFilesError
from undiffuse.training.run_folder import Run

RNG = np.random.default_rng(0)


def photograph(path, width, height, channels=3):
    shape = (height, width, 3) if channels == 3 else (height, width)
    Image.fromarray(RNG.integers(256, size=shape).astype(np.uint8)).save(path)


@pytest.fixture
def many_sizes(tmp_path):
    """30 photographs of 29 sizes, of which two have 131 x 85 pixels; some are grey."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for i in range(30):
        width, height = (131, 85) if i < 2 else (70 + 2 * i, 41 + i)
        photograph(folder / f"{i:02d}.png", width, height, 1 if i % 10 == 0 else 3)
    return folder


def follow(line, call):
    """Run the command that an error ends with."""
    assert line.count("\n") == 1
    words = shlex.split(line.partition("Run: ")[2])
    assert words[0] == "undiffuse"
    return call(*words[1:])


@pytest.mark.parametrize("on_bad", [(), ("--on-bad", "skip")])
def test_photographs_of_many_sizes(many_sizes, call, on_bad):
    """It was said of two of 360 images that most have their size."""
    said = call("check", many_sizes, *on_bad)
    assert said.code == 3
    line = f"error[MIXED_SIZES] {many_sizes}: 30 images have 29 sizes, from 74 x 43 to 131 x 85 pixels. Run: undiffuse "
    assert said.err == f"{line}{shlex.join(['check', str(many_sizes), *on_bad])} --size 32 --crop --channels 3\n"
    done = follow(said.err, call)
    assert (done.code, done.err) == (0, "")
    assert "30 of 3×32×32" in done.out
    said = call("check", many_sizes, "--size", 40)
    assert said.err.startswith(f"error[ASPECT] {many_sizes}/00.png: 131 x 85 pixels are not square")
    assert "30 of 3×40×40" in follow(said.err, call).out


def test_the_remedy_in_python(many_sizes):
    with pytest.raises(BadFilesError, match="Give size=32, crop=True, channels=3") as caught:
        load(many_sizes)
    assert load(many_sizes, **caught.value.remedy).item_shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("recorded", "size"),
    [({"item_shape": [3, 28, 28]}, 28), ({"item_shape": [3, 8, 8], "options": {"size": 24}}, 24), ({}, 32)],
)
def test_the_remedy_for_other_data_of_a_run_is_its_own_size(many_sizes, monkeypatch, recorded, size):
    monkeypatch.setattr(data_options, "_recorded_data", lambda _: recorded)
    with pytest.raises(BadFilesError) as caught:
        data_options.read_data(functools.partial(load), str(many_sizes), Path("run"))
    words = ["evaluate", "run", str(many_sizes)]
    assert error_line(caught.value, words).endswith(
        f"Run: undiffuse {shlex.join(words)} --size {size} --crop --channels 3"
    )


def test_a_few_that_differ_from_most_are_listed(tmp_path, call):
    for i in range(9):
        photograph(tmp_path / f"{i}.png", 10 if i < 2 else 12, 12)
    said = call("check", tmp_path)
    assert said.err.count("10 x 12 pixels, where most have 12 x 12 pixels") == 3  # two in the list, one in the line
    assert "Use --on-bad skip" in said.err
    assert said.err.endswith(f"Run: undiffuse check {tmp_path} --size 8 --crop\n")
    assert "7 of 3×12×12" in call("check", tmp_path, "--on-bad", "skip").out


def test_a_narrow_image_does_not_decide_the_size_of_all(tmp_path, call):
    for i in range(59):
        photograph(tmp_path / f"{i}.png", 40 + i, 35)
    photograph(tmp_path / "narrow.png", 3, 90)
    said = call("check", tmp_path, "--on-bad", "skip")
    assert said.err.endswith(f"Run: undiffuse check {tmp_path} --on-bad skip --size 32 --crop\n")
    assert "59 of 3×32×32" in follow(said.err, call).out
    said = call("check", tmp_path)
    assert said.err.endswith(f"Run: undiffuse check {tmp_path} --size 32 --crop --on-bad skip\n")


@pytest.mark.parametrize(
    ("sizes", "channels", "remedy"),
    [
        ([(9, 9), (9, 7)], 3, {"size": 7, "crop": True}),
        ([(300, 200), (70, 64)], 3, {"size": 64, "crop": True}),
        ([(5, 5), (5, 5)], None, {"channels": 3}),
    ],
)
def test_the_remedy_reads_the_images(tmp_path, sizes, channels, remedy):
    for i, size in enumerate(sizes):
        photograph(tmp_path / f"{i}.png", *size, channels or 1 + 2 * i)
    with pytest.raises(BadFilesError) as caught:
        load(tmp_path)
    assert caught.value.remedy == remedy
    assert len(load(tmp_path, **remedy)) == 2


def test_depths_that_no_option_makes_equal(tmp_path):
    photograph(tmp_path / "a.png", 5, 5, 1)
    Image.fromarray(np.ones((5, 5), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(BadFilesError, match=FIXES["MIXED_DEPTH"].split("(")[0]) as caught:
        load(tmp_path)
    assert caught.value.remedy == {}


@pytest.mark.parametrize(
    ("options", "settings", "length"),
    [
        (("--batch", 4, "--lr", 0.02, "--steps", 1), {"batch": 4, "lr": 0.02}, 1),
        (("--epochs", 0.5, "--batch", 4), {"batch": 4}, 3),  # ⌈0.5 · 18 / 4⌉
        (("--epochs", 2), {"batch": 8}, 5),
    ],
)
def test_batch_learning_rate_and_epochs(options, settings, length, tmp_path, call, monkeypatch):
    monkeypatch.setattr(
        "undiffuse.training.diffusion_task.fit", lambda task, data, run, *_: run.open(task.config, data)
    )
    (tmp_path / "recipe.toml").write_text(RECIPE)
    np.save(tmp_path / "x.npy", np.arange(640).reshape(40, 1, 4, 4).astype(np.uint8))
    flags = ["--config", tmp_path / "recipe.toml", "--out", tmp_path / "run", "--device", "cpu"]
    assert call("train", tmp_path / "x.npy", *flags, *options).code == 0
    data = load(tmp_path / "x.npy")
    assert len(data.split(0.2).train) == 18
    train = Run(tmp_path / "run").record["config"]["train"]
    assert {name: train[name] for name in settings} == settings
    assert train["max_steps"] == length


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--epochs", 1, "--steps", 1), "error[USAGE] --steps, --epochs: each determines the length of the run"),
        (("--epochs", 0), "error[USAGE] --epochs 0: not a length"),
        (("--lr", -1, "--steps", 1), "error[CONFIG] --lr -1.0: must be above 0 and finite. Change it."),
        (("--batch", 0), "error[CONFIG] --batch 0: must be a whole number, at least 1. Change it."),
        (("--steps", 0), "error[CONFIG] --steps 0: must be above 0 and below 2^63. Change it."),
        (("--seed", -1), "error[CONFIG] --seed -1: must be a whole number from 0"),
        (("--size", 9000), "error[OPTION] --size: 9000 is not a side in pixels"),
        (("--on-bad", "keep"), "error[OPTION] --on-bad: 'keep' is unknown. Give stop or skip."),
        (("--num-values", 3), "error[OPTION] --num-values: a folder of images does not take this option. Its options"),
        (
            ("--layout", "NHWC"),
            "options are --size, --crop, --channels, --background, --frames, --allow-upscale, --on-bad",
        ),
        (
            ("--weight-decay", 1),
            "weight_decay is a setting of [train] in a recipe: give it in a file, --config FILE.toml.",
        ),
        (("--wieght-decay", 1), "weight_decay is a setting of [train]"),
        (("--chain-length", 1), "chain_length is a setting of [model]"),
        (("--widths", 1), "widths is a setting of [model] network"),
        (("--preset", "best"), "error[PRESET] --preset best: no such preset"),
        (("--thesis", 1), "See 'undiffuse train --help'."),
    ],
)
def test_errors_name_flags(options, line, tmp_path, call):
    photograph(tmp_path / "a.png", 5, 5)
    said = call("train", tmp_path, "--out", tmp_path.parent / "run", *options)
    assert said.code in (2, 3)
    assert line in said.err
    assert said.err.count("\n") == 1


def test_a_setting_of_a_file_keeps_its_name(tmp_path, call):
    photograph(tmp_path / "a.png", 5, 5)
    (tmp_path / "recipe.toml").write_text("[train]\nlr = -1.0\n")
    assert "error[CONFIG] train.lr = -1.0" in call("train", tmp_path, "--config", tmp_path / "recipe.toml").err


def test_options_of_data_are_spelled_as_flags():
    error = DataError("X", "size", "size=3 fits, a/size=3 and x.size=3 do not", "Give frames=first, crop=True or lr=2")
    line = error_line(error, ["check", "photos"])
    assert line == (
        "error[X] --size: --size 3 fits, a/size=3 and x.size=3 do not. Give --frames first, --crop or lr=2."
    )
    assert error_line(error, ["check", "size"]).startswith("error[X] size: ")  # a folder of that name
    assert error_line(error, ["watch", "size"]) == str(error)
    assert error_line(ConfigError("X", "on_bad", "a", "b"), []) == "error[X] on_bad: a. b."
    assert command_flags(["train", "x"])["upscale"] == "--allow-upscale"


def test_every_setting_has_a_hint():
    for name in TrainConfig.__dataclass_fields__:
        assert config_hint(f"--{name.replace('_', '-')}").startswith(f"{name} is a setting of [train]")
    assert config_hint("--thesis") == ""


def test_fixes_spell_options_as_arguments():
    """So that the command line can spell them as flags: see `error_line`."""
    names = {"on_bad", "num_values", "value_range", "upscale", "crop", "frames", "channels"}
    for code, fix in FIXES.items():
        words = {word.strip("(),") for word in fix.split()}
        assert not names & words - {"channels", "frames"}, code


def test_layouts_and_columns_of_labels_are_flags(tmp_path, call):
    np.save(tmp_path / "volumes.npy", np.zeros((2, 8, 8, 8), np.uint8))
    np.save(tmp_path / "last.npy", np.zeros((2, 8, 8, 3), np.uint8))
    np.save(tmp_path / "three.npy", np.zeros((2, 8, 8), np.float32))
    assert "Give --layout NCHW (images) or --layout NDHW (volumes)." in call("check", tmp_path / "volumes.npy").err
    assert "Give --layout NHWC (or --layout NCHW if that is right)." in call("check", tmp_path / "last.npy").err
    assert "Give --layout NHW (grey images), --layout NCL" in call("check", tmp_path / "three.npy").err
    (tmp_path / "numbers.csv").write_text("a,target\n1.5,2\n2.5,3\n")
    assert "--label-column target takes it so" in call("check", tmp_path / "numbers.csv").out
    (tmp_path / "words.csv").write_text("a,class\n1.5,x\n2.5,y\n")
    assert "If class holds the classes, give --label-column class." in call("check", tmp_path / "words.csv").err


def test_a_setting_in_the_text_of_an_error_is_a_flag():
    error = ConfigError("NON_FINITE", "runs/x", "weights are not finite", "Lower train.lr, or train.warmup")
    assert error_line(error, ["train", "x"]).endswith("Lower --lr, or train.warmup.")


def test_the_printed_next_command_works_for_names_like_flags(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.arange(12.0, dtype=np.float32).reshape(6, 2))
    said = call("pack", "data.npy", "--", "-packed.npy")
    assert "next: undiffuse train ./-packed.npy\n" in said.out
    assert call("check", "./-packed.npy").code == 0
