"""Text to image from the command line: training with captions, prompts, and their errors."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import checkpoint_hashes, quick_looks, recipe, stopping_at, train

from undiffuse.cli.prompt_options import read_prompts, slug
from undiffuse.data.dataset import Dataset
from undiffuse.data.from_array import from_array
from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.guidance import Guide
from undiffuse.errors import ConfigError
from undiffuse.evaluation import plan as planning
from undiffuse.evaluation import sampler_ranking
from undiffuse.model import checkpoint
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.report.figures import image_strip, prompt_grid
from undiffuse.sampling import sampler_search
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.training import diffusion_task, distillation_task
from undiffuse.training.run_folder import ChangedError

RECIPE = """[model]
network = {kind = "unet", widths = [8], blocks = 1, attention = [0]}
chain_length = 12
[train]
batch = 8
warmup = 1
precision = "float32"
previews = 0
"""
COLOURS = ("black", "white")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps on pictures with captions, and its folder of data."""
    from undiffuse.cli import main

    place = tmp_path_factory.mktemp("text")
    pictures(place / "data")
    (place / "my.toml").write_text(RECIPE)
    flags = ["--captions", "--steps", "2", "--config", str(place / "my.toml"), "--out", str(place / "run")]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FINAL_ITEMS", "HELD_OUT_ITEMS", "FINAL_MC_SAMPLES", "MC_SAMPLES"):
            patch.setattr(diffusion_task, name, 2)
        assert main(["train", str(place / "data"), *flags]) == 0
    return place


def pictures(folder, count=30):
    folder.mkdir()
    rows = [{"file_name": f"{i}.png", "text": f"a {COLOURS[i % 2]} square"} for i in range(count)]
    for i, row in enumerate(rows):
        pixels = np.clip(np.random.default_rng(i).integers(60, size=(4, 4)) + 180 * (i % 2), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def values(folder):
    with np.load(folder / "samples.npz") as file:
        return file["x"]


def test_a_run_with_captions_draws_prompts(trained, call, tmp_path):
    run = trained / "run"
    assert "prompts of up to 64 bytes, by a transformer trained with the network" in " ".join(
        call("inspect", run).out.split()
    )
    (tmp_path / "p.txt").write_text("a white square\n\n a black square \n")
    flags = ["--solver", "ddim", "--steps", 3, "--guidance", 4, "--threshold", "dynamic", "--n", 5]
    done = call("sample", run, "--prompt", "a grey square", "--prompts", tmp_path / "p.txt", *flags)
    assert (done.code, done.err) == (0, "")
    (folder,) = (run / "samples").iterdir()
    assert folder.name.startswith("ddim-3-a-grey-square-a-white-square-a-black-squ")
    manifest = json.loads((folder / "manifest.json").read_text())
    prompts = ["a grey square", "a white square", "a black square"]
    assert (manifest["prompt"], manifest["negative"]) == (prompts, None)
    model = checkpoint.load(run)
    cond = model.text_condition([*prompts, *prompts[:2]])
    sampler = Sampler("ddim", 3, guidance=4.0, threshold="dynamic")
    expected = model.sample(5, sampler=sampler, cond=cond)
    np.testing.assert_array_equal(values(folder), expected.numpy())
    named = prompt_grid(expected.numpy(), prompts, 256)
    with Image.open(folder / "grid.png") as grid:
        np.testing.assert_array_equal(np.asarray(grid), np.asarray(named))
    flags += ["--negative", "a grey square", "--out", tmp_path / "n"]
    assert call("sample", run, "--prompt", "a white square", *flags).code == 0
    assert json.loads((tmp_path / "n" / "manifest.json").read_text())["negative"] == "a grey square"
    assert call("sample", run, "--prompt", "a white square", *flags).out.startswith("these 5 samples exist already")


def test_the_command_after_distillation_has_a_prompt(trained, call, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation_task, "TEACHER_STEPS", 1)
    said = call("distill", trained / "run", "--steps", 1, "--device", "cpu", "--out", tmp_path / "few")
    assert re.search(r"next: undiffuse sample \S+/few --prompt '\w+", said.out), said


def test_a_negative_prompt_beside_a_label_needs_no_prompt(call, tmp_path):
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": (0,), "classes": 2, "text": 64}
    config = ModelConfig(network, {"name": "linear_log_snr", "high": 6.0}, chain_length=5)
    torch.manual_seed(0)
    model = Diffusion(config, (1, 4, 4), IntegerLevels(256), {"classes": ["cat", "dog"], "num_values": 256}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoint.save(model, tmp_path / "model.safetensors")
    flags = ["--label", "dog", "--negative", "a box", "--guidance", 3, "--solver", "ddim", "--steps", 3, "--n", 2]
    flags += ["--text-encoder", "bytes"]
    done = call("sample", tmp_path / "model.safetensors", *flags, "--out", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    sampler, cond = Sampler("ddim", 3, guidance=3.0), Condition(label=torch.tensor([1, 1]))
    expected = model.sample(2, sampler=sampler, cond=cond, guide=Guide(negative=model.text_condition(["a box"])))
    np.testing.assert_array_equal(values(tmp_path / "out"), expected.numpy())
    assert not torch.equal(expected, model.sample(2, sampler=sampler, cond=cond))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["negative"] == "a box"


def test_evaluate_restore_and_interpolate_take_captions(trained, call, tmp_path, monkeypatch):
    """Captions are read batch by batch: the embeddings of all items may not fit into memory."""
    run, one, two = trained / "run", trained / "data" / "0.png", trained / "data" / "1.png"
    read, real = [], Dataset.given_condition
    monkeypatch.setattr(Dataset, "given_condition", lambda *given: (read.append(len(given[1])), real(*given))[1])
    monkeypatch.setattr(planning, "batch_size", lambda *_: 1)
    done = call("evaluate", run, "--estimate", "discrete", "--items", 2, "--mc-samples", 2)
    assert (done.code, done.err) == (0, "")
    assert json.loads((run / "evaluation.json").read_text())["condition"] == "captions"
    assert read == [2, 1, 1]  # for the speed (64 items at most), then batch by batch
    strips = {}
    for prompt in ("a black square", "a white square"):
        out = tmp_path / prompt
        for kind, more in (("restored", ["--noise", 0.3]), ("variants", ["--method", "sdedit"])):
            flags = [*more, "--n", 1, "--steps", 2, "--prompt", prompt, "--out", out / kind]
            assert call("restore", run, one, *flags).code == 0
            assert json.loads((out / kind / "manifest.json").read_text())["prompt"] == [prompt]
        strip = tmp_path / f"{prompt}.png"
        assert call("interpolate", run, one, two, "--n", 2, "--steps", 2, "--prompt", prompt, "--out", strip).code == 0
        strips[prompt] = strip.read_bytes()
        assert not np.array_equal(values(out / "variants"), values(out / "restored"))
    assert call("check", trained / "data", "--captions").out.count("'a black square', 'a white square'") == 1


def test_advice_is_measured_with_prompts(trained, call, tmp_path, monkeypatch):
    monkeypatch.setattr(sampler_search, "SOLVERS", {name: SOLVERS[name] for name in ("unipc", "ancestral")})
    shutil.copytree(trained / "run", tmp_path / "run")
    flags = ["--calls", 2, "--items", 8, "--fine", 4]
    done = call("advise", tmp_path / "run", *flags, "--prompt", "a black square", "--prompt", "a box")
    assert (done.code, done.err) == (0, "")
    assert "not compared: they are compared without prompts only" in done.out
    assert "--calls 2 --prompt 'a black square' --prompt 'a box'" in " ".join(done.out.split())
    (advice,) = json.loads((tmp_path / "run" / "advice.json").read_text())["advice"].values()
    stored = advice["2"]
    assert stored["prompt"] == ["a black square", "a box"]
    for prompts, words in (
        (["--prompt", "a black square", "--prompt", "a box"], None),
        ([], "was measured for prompt a black square, a box and without guidance; with other --prompt the best"),
    ):
        done = call("sample", tmp_path / "run", "--n", 1, "--calls", 2, *prompts)
        assert (done.code, "was measured for" in done.out) == (0, words is not None)
        assert words is None or words in " ".join(done.out.split())
    monkeypatch.setattr(sampler_ranking, "MIN_ITEMS", 2)
    done = call("advise", tmp_path / "run", *flags, "--samples", 20)
    assert (done.code, done.err) == (0, "")
    assert "compared with held-out items with the same captions" in " ".join(done.out.split())
    for prompts, words in ((["--prompt", "a box"], False), ([], True)):
        done = call("sample", tmp_path / "run", "--n", 1, "--calls", 2, *prompts)
        said = " ".join(done.out.split())
        assert (done.code, "was measured for the captions of the data" in said) == (0, words)


ERRORS = [
    (["--prompt", "x" * 65], "[PROMPT] --prompt xxx", "it has 65 bytes"),
    (["--prompt", "a\udcff"], "[PROMPT] 'a\\udcff'", "it is not valid UTF-8"),
    (["--prompt", "a", "--negative", "b"], "[GUIDANCE] --negative", "no effect without a --guidance scale"),
    (["--negative", "b", "--guidance", "3"], "[GUIDANCE] --guidance", "it needs a condition. Give --prompt."),
    (["--prompt", "", "--guidance", "3"], "[GUIDANCE] --guidance", "it needs a condition"),
    (["--prompts", "none.txt"], "[PROMPT] none.txt", "cannot be read (No such file or directory)"),
    (["--text-encoder", "bytes"], "[USAGE] --text-encoder", "no effect without a prompt"),
    (["--prompt", "a", "--text-encoder", "minilm"], "[TEXT_ENCODER] minilm", "a part of the model's network"),
    (["--prompt", "a", "--label", "b"], "[LABEL] --label b", "trained without labels"),
]


@pytest.mark.parametrize(("flags", "place", "cause"), ERRORS, ids=lambda value: value[0] if value else "")
def test_prompts_that_cannot_work_are_one_line(flags, place, cause, trained, call):
    done = call("sample", trained / "run", "--n", 2, *flags)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith(f"error{place}")
    assert cause in done.err


def test_bad_captions_and_other_data_are_one_line(trained, call, tmp_path):
    pictures(tmp_path / "data", 12)
    table = tmp_path / "data" / "metadata.jsonl"
    table.write_text(table.read_text().replace("a black square", "", 1))
    done = call("train", tmp_path / "data", "--captions", "--steps", 1, "--out", tmp_path / "run")
    assert (done.code, (tmp_path / "run").exists()) == (3, False)
    assert "error[CAPTIONS]" in done.err.splitlines()[-1]
    assert "--on-bad skip" in done.err.splitlines()[-1]
    done = call("train", trained / "data", "--text-encoder", "minilm", "--steps", 1, "--out", tmp_path / "run")
    assert "Give --captions too" in done.err
    done = call("train", "two-moons", "--captions", "--steps", 1, "--out", tmp_path / "run")
    assert "a built-in data set does not take this option" in done.err


def test_lines_of_a_file_are_prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_bytes("﻿one\r\n\r\n two ".encode())
    assert read_prompts(["zero", ""], file) == ["zero", "", "one", "two"]
    for content, cause in ((b"\n \n", "no prompt in it"), (b"\xff", "not text in UTF-8"), (b"x" * (1 << 23), "larger")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=cause):
            read_prompts([], file)


def test_a_grid_has_a_column_for_each_prompt():
    values = np.arange(7)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    strip = image_strip(
        np.stack([values[[0, 3]], values[[1, 4]], values[[2, 5]]]), ["a", "b" * 28, "c" * 25 + "..."], 256
    )
    assert np.array_equal(np.asarray(prompt_grid(values, ["a", "b" * 28, "c" * 29], 256)), np.asarray(strip))
    eleven = np.asarray(prompt_grid(np.repeat(values, 9, 0), list("abcdefghijk"), 256))
    first = image_strip(np.zeros((6, 4, 1, 2, 2), np.uint8), list("abcdef"), 256)  # and five below
    assert eleven.shape == (2 * first.height, first.width, 3)
    many = prompt_grid(np.zeros((40, 1, 2, 2), np.uint8), ["a"] * 40, 256)
    assert many.height == 4 * image_strip(np.zeros((8, 1, 1, 2, 2), np.uint8), ["a"] * 8, 256).height


def test_the_name_of_a_folder_says_the_prompts():
    assert slug(["a red apple"]) == ["a-red-apple"]
    assert slug([]) == []
    assert slug(["x" * 50, "y"]) == ["x" * 40]


def captioned():
    g = np.random.default_rng(0)
    data = from_array(g.integers(5, size=(30, 1, 4, 4)), num_values=5, name="tiny")
    return replace(data, captions=tuple((f"item {i}", f"{i}", "it") for i in range(30)))


def test_a_run_with_captions_resumes_to_the_bit(tmp_path):
    config = recipe(max_steps=4)
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": (0,)}
    config, data = replace(config, model=replace(config.model, network=network)), captioned()
    with quick_looks():
        train(config, tmp_path / "straight", data)
        with stopping_at(2):
            train(config, tmp_path / "stopped", data)
        changed = replace(data, captions=(("other",), *data.captions[1:]))
        with pytest.raises(ChangedError, match="fingerprint"):
            train(config, tmp_path / "stopped", changed)
        train(config, tmp_path / "stopped", data)
    hashes = checkpoint_hashes(tmp_path / "stopped", 4)
    assert hashes == checkpoint_hashes(tmp_path / "straight", 4)
    assert torch.equal(*(checkpoint.load(tmp_path / name).network.text.null_token for name in ("straight", "stopped")))
