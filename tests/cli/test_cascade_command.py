"""Cascades from the command line: trained on a folder of PNGs, stopped and resumed, measured, and wrong models."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.model import checkpoint
from undiffuse.model.cascade import Cascade
from undiffuse.model.diffusion import Diffusion
from undiffuse.report.sample_folder import SampleFolder, sampler_in_words
from undiffuse.runtime.signals import Interrupted
from undiffuse.sampling.sampler import Sampler

RECIPE = """
[model]
network = {kind = "unet", widths = [8], blocks = 1, attention = []}
schedule = {name = "linear_log_snr", high = 6.0}
chain_length = 5
output = "values"
[train]
batch = 8
warmup = 1
previews = 0
precision = "float32"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of images of 16×16 pixels, and the runs of a cascade with Haar's map from 4 to 8 to 16."""
    from undiffuse.cli import main

    folder = tmp_path_factory.mktemp("cascade")
    random = np.random.default_rng(0)
    for i in range(30):
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(random.integers(256, size=(16, 16, 3)).astype(np.uint8)).save(folder / "photos" / f"{i}.png")
    (folder / "recipe.toml").write_text(RECIPE)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in (["--reduce", "4"], ["--reduce", "8", "--from", "4"], ["--from", "8", "--map", "haar"]):
            options = ["photos", "--steps", "2", "--config", "recipe.toml", "--device", "cpu"]
            assert main(["train", *options, *stage]) == 0
        yield folder


BASE, MIDDLE, TOP = "runs/photos-4", "runs/photos-8-from-4", "runs/photos-from-8"


def test_all_stages_are_drawn_with_a_line_for_each_and_one_manifest(place, call, monkeypatch):
    arguments = ("sample", BASE, "--then", MIDDLE, "--then", TOP, "--n", 5, "--seed", 3, "--steps", 4, "--batch", 2)
    arguments = (*arguments, "--out", "samples", "--device", "cpu")
    added, real = [], SampleFolder.add

    def add(folder, first, values):
        real(folder, first, values)
        added.append(first)
        if first == 2:
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(SampleFolder, "add", add)
        assert call(*arguments).code != 0
    assert added == [0, 2]
    out = call(*arguments).out
    assert "resuming: 4 samples in samples/parts" in out
    for line in ("stage 1 of 3, 3×4×4: ", "stage 2 of 3, 3×8×8: ", "stage 3 of 3, 3×16×16: dpm++2m_sde in 4 steps"):
        assert line in out
    manifest = json.loads((place / "samples" / "manifest.json").read_text())
    cascade = Cascade.load([BASE, MIDDLE, TOP])
    assert manifest["weights"] == cascade.fingerprints
    assert (manifest["then"], manifest["seed"], manifest["image_noise"]) == ([MIDDLE, TOP], 3, 0.2)
    assert manifest["stage_samplers"] == [Sampler("dpm++2m_sde", 4).to_dict()] * 3
    x = np.load(place / "samples" / "samples.npz")["x"]
    assert x.shape == (5, 3, 16, 16)
    assert torch.equal(torch.from_numpy(x), cascade.sample(5, 3, Sampler("dpm++2m_sde", 4)))
    with Image.open(place / "samples" / "000004.png") as picture:
        assert picture.size == (16, 16)
    assert "these 5 samples exist already" in call(*arguments).out
    for run in ([], ["--run", TOP]):  # with the full resolution
        assert call("compare", "samples", *run).err.startswith("error[FEW] photos: 5 samples, ")
    assert "enlarges 3×8×8 to 3×16×16, map haar" in call("inspect", TOP).out
    assert "base, 3×4×4 of 3×16×16, map mean" in call("inspect", BASE).out
    other = call(*arguments, "--image-noise", 0.5).out
    assert "differ in image_noise" in other


def test_the_manifest_and_the_summary_name_the_samplers_that_the_stages_used(place, call):
    """A distilled base has a sampler of its own, whichever the command gives."""
    base = checkpoint.load(place / BASE)
    config = replace(base.config, calls=1)
    distilled = Diffusion(config, base.item_shape, base.transform, base.info)
    distilled.load_state_dict(base.state_dict())
    checkpoint.save(distilled, place / "distilled.safetensors")
    arguments = ("distilled.safetensors", "--then", MIDDLE, "--n", 1, "--device", "cpu", "--out", "of-distilled")
    said = call("sample", *arguments).out
    assert "1 sample by consistency in 1 step, then dpm++2m_sde in 5 steps, " in said
    assert ": consistency in 1 step, " in said
    assert "is distilled" not in said
    manifest = json.loads((place / "of-distilled" / "manifest.json").read_text())
    assert [stage["solver"] for stage in manifest["stage_samplers"]] == ["consistency", "dpm++2m_sde"]
    assert sampler_in_words(manifest) == "consistency in 1 step, then dpm++2m_sde in 5 steps, seed 0"
    said = call("sample", *arguments[:-1], "of-two-calls", "--calls", 2).out
    assert "note: distilled.safetensors is distilled and takes 1 call, whatever --calls\n" in said
    del manifest["stage_samplers"]  # as of a model alone
    assert sampler_in_words(manifest) == "dpm++2m_sde in 5 steps, seed 0"


def test_advice_for_a_stage_alone_is_not_used_and_the_command_says_so(place, call):
    arguments = ("sample", BASE, "--then", MIDDLE, "--n", 1, "--device", "cpu", "--out")
    assert "is not used" not in call(*arguments, "without", "--calls", 2).out
    (place / BASE / "advice.json").write_text("{}")
    line = f"{BASE}/advice.json is not used: it is for its model alone. With --then each stage takes 2 calls"
    assert line in call(*arguments, "with", "--calls", 2).out
    (place / BASE / "advice.json").unlink()


def test_the_sum_of_the_bounds_is_evaluated(place, call):
    options = ("--estimate", "discrete", "--items", 3, "--mc-samples", 3, "--device", "cpu")
    given = call("evaluate", BASE, "--then", MIDDLE, "--then", TOP, "photos", *options, "--out", "measured")
    assert given.code == 0, given.err
    assert "note: runs/photos-8-from-4 was not trained on the images that runs/photos-from-8 reduces" in given.out
    assert "discrete: 3×4×4 " in given.out
    numbers = json.loads((place / "measured" / "evaluation.json").read_text())
    cascade = Cascade.load([BASE, MIDDLE, TOP])
    assert numbers["digest"] == cascade.fingerprints
    assert numbers["part"] == "held out for testing"  # of the full resolution, by the run of the last stage
    own = call("evaluate", BASE, "--then", MIDDLE, "--then", TOP, *options)
    assert own.code == 0, own.err
    again = json.loads((place / BASE / "cascade-photos-8-from-4-photos-from-8" / "evaluation.json").read_text())
    assert again["estimates"]["discrete"]["bits_per_dim"] == numbers["estimates"]["discrete"]["bits_per_dim"]
    alone = call("evaluate", TOP, *options)
    assert "given the low resolution" in alone.out
    assert json.loads((place / TOP / "evaluation.json").read_text())["condition"] == "the low resolution"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("sample", TOP), f"error[CASCADE] {TOP}: it is a super-resolution model, which needs images to enlarge."),
        (("sample", BASE, "--then", TOP), f"error[CASCADE] {BASE}: its images are 3×4×4 with 256 values"),
        (("sample", BASE, "--then", BASE), f"error[CASCADE] {BASE}: it is not a super-resolution model."),
        (
            ("sample", MIDDLE, "--then", TOP),
            f"error[CASCADE] {MIDDLE}: it is a super-resolution model, and the first model of a cascade is its base",
        ),
        (("sample", BASE, "--then", "runs/none"), "error[NOT_FOUND] runs/none"),
        (("sample", BASE, "--image-noise", 0.2), "error[USAGE] --image-noise: it is for images that --then"),
        (("sample", BASE, "--then", MIDDLE, "--animate", "a.gif"), "error[USAGE] --animate: it is for a single model"),
        (("sample", BASE, "--then", MIDDLE, "--guidance", 2), "error[GUIDANCE] --guidance"),
        (("evaluate", BASE, "--then", MIDDLE, "--compat", "openai"), "error[USAGE] --compat: it is for a single"),
        (("train", "photos", "--from", 5), "error[SIDE] the side 5: images of 16×16"),
        (("train", "photos", "--from", 4, "--map", "haar"), "error[MAP] resolution: the map 'haar' divides each"),
        (("train", "photos", "--map", "haar"), "error[OPTION] --map"),
        (("pack", "photos", "packed.npy", "--from", 8), "error[PACK] --from"),
        (("restore", MIDDLE, "photos/0.png", "--noise", 0.1), f"error[CASCADE] {MIDDLE}: it is a super-resolution"),
        (
            ("advise", MIDDLE, "--calls", 5),
            f"error[CASCADE] {MIDDLE}: it is a super-resolution model, which needs images to enlarge.",
        ),
        (("distill", TOP, "--steps", 1), "error[DISTILLED] the teacher: it is a super-resolution model"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments, line, place, call):
    given = call(*arguments)
    assert given.code != 0
    assert given.err.startswith(line)
    assert given.err.count("\n") == 1


def test_a_damaged_model_of_a_stage(place, call):
    damaged = place / "damaged.safetensors"
    content = (place / MIDDLE / "model.safetensors").read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    given = call("sample", BASE, "--then", damaged)
    assert given.code != 0
    assert given.err.startswith("error[")
    assert str(damaged) in given.err
    assert given.err.count("\n") == 1
