"""The commands restore and interpolate: their output and their errors."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.model.autoencoder import Autoencoder, AutoencoderConfig
from undiffuse.model.checkpoint import load, save
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform
from undiffuse.model.restoration import Degradation, degrade, restore, rounding_std
from undiffuse.model.sdedit import sdedit
from undiffuse.report.sample_folder import SampleFolder

CONFIG = ModelConfig(
    network={"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()},
    schedule={"name": "linear_log_snr", "high": 6.0},
    chain_length=6,
)
RNG = np.random.default_rng(0)
WHOLE, SMALL, COLOUR = (RNG.integers(256, size=s).astype(np.uint8) for s in ((8, 8), (4, 4), (8, 8, 3)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restore")
    torch.manual_seed(0)
    for name, shape, codec in (("run", (1, 8, 8), IntegerLevels(256)), ("line", (1, 16), IntegerLevels(256))):
        (folder / name).mkdir()
        save(Diffusion(CONFIG, shape, codec, {"num_values": 256}), folder / name / "model.safetensors")
    save(Diffusion(CONFIG, (1, 4, 4), Identity()), folder / "plain.safetensors")
    for name, values in (("whole", WHOLE), ("small", SMALL), ("colour", COLOUR), ("black", 0 * WHOLE)):
        Image.fromarray(values).save(folder / f"{name}.png")
    hidden = np.zeros((8, 8), np.uint8)
    hidden[:, 4:], hidden[0] = 255, 127
    Image.fromarray(hidden).save(folder / "mask.png")
    Image.fromarray(0 * hidden + 255).save(folder / "white.png")
    (folder / "torn.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    return folder


def read(path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def tiles(path) -> list[np.ndarray]:
    """The images of a strip: 8 x 8 pixels, shown eight times as large and eight pixels apart."""
    shown = read(path)[..., 0]
    return [shown[8:72:8, left : left + 64 : 8] for left in range(8, shown.shape[1] - 64, 72)]


def test_a_model_of_latents(place, call):
    """Methods of posterior guidance and variants work through the decoder; those of pixels are one line."""
    torch.manual_seed(0)
    kl = {"kind": "kl", "widths": [8, 8], "latent_channels": 2, "blocks": 1}
    transform = LatentTransform(Autoencoder(AutoencoderConfig(kl), (1, 8, 8), IntegerLevels(256)))
    save(Diffusion(CONFIG, (1, 8, 8), transform, {"num_values": 256}), place / "latent.safetensors")
    command = ("restore", place / "latent.safetensors", place / "whole.png", "--n", 1, "--steps", 2)
    flags = ("--mask", place / "mask.png")
    for name, more in (("mask", flags), ("blur", ("--blur", 1)), ("edit", ("--method", "sdedit"))):
        done = call(*command, *more, "--out", place / f"latent-{name}")
        assert (done.code, done.err) == (0, "")
        assert (place / f"latent-{name}" / "strip.png").is_file()
    assert np.array_equal(read(place / "latent-mask" / "000000.png")[1:, :4], WHOLE[1:, :4])
    refused = call(*command, *flags, "--method", "repaint", "--out", place / "no")
    assert refused.err == (
        "error[METHOD] --method repaint: it changes pixels at each step, and this is a model of latents. "
        "Use 'mmps', 'pigdm' or 'dps'.\n"
    )


def test_the_expected_residual_has_the_rounding_of_the_model(place, call, tmp_path):
    """An image of 256 values and a model of 17: known pixels are rounded to the 17, 1.8 % of black to white."""
    (tmp_path / "run").mkdir()
    save(Diffusion(CONFIG, (1, 8, 8), IntegerLevels(17), {"num_values": 17}), tmp_path / "run" / "model.safetensors")
    arguments = ("restore", tmp_path / "run", place / "whole.png", "--mask", place / "mask.png", "--n", 1)
    said = call(*arguments).out
    assert "expected from noise and rounding: 1.80 %" in said
    residual = float(said.split("IMAGE: ")[1].split(" %")[0])
    assert 1.2 < residual < 2.4  # 32 known pixels, uniform in their bins


def test_a_mask(place, call):
    code, out, err = call("restore", place / "run", place / "whole.png", "--mask", place / "mask.png", "--n", 3)
    assert (code, err) == (0, "")
    assert "3 restorations by mmps in 6 steps" in out
    folder = place / "run" / "restored" / "whole-mmps"
    answers = np.stack([read(folder / f"{i:06d}.png") for i in range(3)])
    assert (answers[:, :, :4] == WHOLE[:, :4]).all()
    assert (answers[:, 0] == WHOLE[0]).all()  # 127 of 255 counts as black
    assert (answers[:, 1:, 4:] != WHOLE[1:, 4:]).mean() > 0.9
    manifest = json.loads((folder / "manifest.json").read_text())
    expected = {"method": "mmps", "seed": 0, "steps": 6, "n": 3, "upsample": 1, "blur": 0.0, "noise": 0.0}
    expected |= {"degrade": False, "residual": [0.0, 0.0, 0.0]}
    expected |= {"image": str(place / "whole.png"), "mask": str(place / "mask.png"), "precision": "float32"}
    expected |= {"mask_sha256": hashlib.sha256((place / "mask.png").read_bytes()).hexdigest()}
    assert {name: manifest[name] for name in expected} == expected
    observed, *shown, mean, spread = tiles(folder / "strip.png")
    np.testing.assert_array_equal(shown, answers)
    np.testing.assert_array_equal(observed[:, :4], WHOLE[:, :4])
    assert (observed[1:, 4:] == 128).all()
    np.testing.assert_allclose(mean, answers.mean(0), atol=0.51)
    np.testing.assert_allclose(spread, np.clip(2 * answers.std(0), 0, 255), atol=0.51)


def test_options_reach_the_library(place, call):
    """With every option the answers equal those of the library."""
    model = load(place / "run")
    options = {"upsample": 2, "blur": 0.7, "noise": 0.05, "n": 2, "seed": 4, "steps": 3, "batch": 1}
    more = [part for name, value in options.items() for part in (f"--{name}", value)] + ["--out"]
    for method in ("dps", "pigdm"):
        flags = [] if method == "pigdm" else ["--method", method]  # pigdm is the default with --blur
        assert call("restore", place / "run", place / "small.png", *more, place / method, *flags)[0] == 0
        degradation = Degradation((1, 8, 8), 0.7, 2, 0.1)
        image = IntegerLevels(256).to_model(torch.tensor(SMALL)[None])
        settings = {"method": method, "seed": 4, "num_steps": 3, "floor": rounding_std(256)}
        expected = restore(model, degradation, image, 2, **settings)
        np.testing.assert_array_equal(
            np.stack([read(place / method / f"{i:06d}.png") for i in range(2)]), expected[:, 0]
        )
    out = place / "all"
    code, _, error = call("restore", place / "run", place / "small.png", *more, out, "--label", "cat")
    assert (code, error[:13]) == (2, "error[LABEL] ")
    code, output, _ = call("restore", place / "run", place / "whole.png", *more, out, "--degrade")
    assert code == 0
    assert "root mean square error of their mean: " in output
    image = degrade(degradation, IntegerLevels(256).to_model(torch.tensor(WHOLE)[None]), 4, 256)
    expected = restore(model, degradation, image, 2, **settings)
    np.testing.assert_array_equal(np.stack([read(out / f"{i:06d}.png") for i in range(2)]), expected[:, 0])


def test_answers_are_never_replaced(place, call):
    """A given folder with answers is an error; by default the next unused folder is taken."""
    flags = ["restore", place / "run", place / "colour.png", "--noise", 0.1, "--n", 1, "--steps", 2]
    for name in ("colour-mmps", "colour-mmps-2", "colour-mmps-3"):
        said = call(*flags, "--seed", len(name))
        assert f"{place / 'run' / 'restored' / name}/strip.png" in said.out
        assert json.loads((place / "run" / "restored" / name / "manifest.json").read_text())["seed"] == len(name)
    first = place / "run" / "restored" / "colour-mmps"
    before = (first / "000000.png").read_bytes()
    said = call(*flags, "--seed", 1, "--out", first)
    assert (said.code, said.err) == (
        2,
        f"error[OUT] {first}: it already holds finished restorations or samples. Give another folder, or remove it.\n",
    )
    said = call(*flags, "--out", first / "000000.png")
    assert (said.code, "000000.png: it, or a part of its path, is a file. " in said.err) == (2, True)
    assert (first / "000000.png").read_bytes() == before
    own = place / "own"
    own.mkdir()
    (own / "strip.png").write_text("mine")
    said = call(*flags, "--out", own)
    assert (said.code, said.err.count("\n"), "it holds strip.png, which was not written" in said.err) == (2, 1, True)
    assert [(f.name, f.read_text()) for f in own.iterdir()] == [("strip.png", "mine")]
    own.rename(place / "run" / "restored" / "colour-mmps-4")
    assert f"{place / 'run' / 'restored' / 'colour-mmps-5'}/strip.png" in call(*flags).out


def test_interrupted_restorations_begin_again(place, call, monkeypatch):
    """In their folder, also where it is the default one."""
    flags = ["restore", place / "run", place / "whole.png", "--noise", 0.2, "--steps", 2, "--method", "dps", "--n"]
    folder, real = place / "run" / "restored" / "whole-dps", SampleFolder.finish

    def finish(*_):
        raise KeyboardInterrupt

    for out in ([], ["--out", place / "interrupted"]):
        monkeypatch.setattr(SampleFolder, "finish", finish)
        assert call(*flags, 3, *out).code == 130
        monkeypatch.setattr(SampleFolder, "finish", real)
        assert call(*flags, 2, *out).code == 0
        folder = out[1] if out else folder
        names = {"000000.png", "000001.png", "grid.png", "strip.png", "samples.npz", "manifest.json"}
        assert {f.name for f in folder.iterdir()} == names
        with np.load(folder / "samples.npz") as file:
            assert len(file["x"]) == 2


def test_transparent_parts_of_a_mask_are_filled_in(place, call):
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 3], hidden[:, 4:, 3] = 255, 0  # black, and transparent on the right
    Image.fromarray(hidden).save(place / "erased.png")
    out = place / "erased"
    flags = ["--mask", place / "erased.png", "--n", 1, "--out", out]
    assert call("restore", place / "run", place / "whole.png", *flags).code == 0
    answer = read(out / "000000.png")
    np.testing.assert_array_equal(answer[:, :4], WHOLE[:, :4])
    assert (answer[:, 4:] != WHOLE[:, 4:]).mean() > 0.9


def test_steps_are_limited_to_the_chain(place, call):
    words = "99,999 steps exceed the model's chain: 6 steps are used\n"
    for flags in (
        ["restore", place / "run", place / "whole.png", "--noise", 0.1, "--n", 1, "--out", place / "long"],
        ["interpolate", place / "run", place / "whole.png", place / "black.png", "--out", place / "long.png"],
    ):
        assert words in call(*flags, "--steps", 99_999).out


def test_colour_becomes_grey_and_one_answer_has_no_spread(place, call):
    out = place / "one"
    assert call("restore", place / "run", place / "colour.png", "--noise", 0.1, "--n", 1, "--out", out)[0] == 0
    assert read(out / "000000.png").shape == (8, 8)


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["run", "whole.png"], "error[USAGE] restore: no degradation of the image is given"),
        (2, ["line", "whole.png", "--blur", "1"], "its items are 1x16, not grey or RGB images"),
        (2, ["plain.safetensors", "whole.png", "--blur", "1"], "its items are 1x4x4, not grey or RGB images"),
        (2, ["run", "whole.png", "--noise", "11"], "--noise"),
        (2, ["run", "small.png", "--upsample", "3"], "3 does not divide the sides of an item, 8 x 8"),
        (
            2,
            ["run", "whole.png", "--blur", "1", "--method", "magic"],
            "error[METHOD] --method magic: no such method. Use one of mmps, pigdm, dps, repaint, product, or sdedit",
        ),
        (2, ["run", "whole.png", "--blur", "1", "--method", "repaint"], "it fills in masked parts only"),
        (2, ["run", "whole.png", "--blur", "1", "--method", "product"], "it multiplies by a factor for each element"),
        (2, ["run", "whole.png", "--mask", "white.png"], "it hides the whole image"),
        (
            2,
            ["run", "whole.png", "--mask", "black.png"],
            "it hides nothing. Make white the part that is to be filled in",
        ),
        (3, ["run", "whole.png", "--upsample", "2"], "it has 8 x 8 pixels instead of 4 x 4"),
        (3, ["run", "small.png", "--noise", "0.1"], "it has 4 x 4 pixels instead of 8 x 8"),
        (3, ["run", "small.png", "--upsample", "2", "--degrade"], "it has 4 x 4 pixels instead of 8 x 8"),
        (3, ["run", "whole.png", "--mask", "small.png"], "it has 4 x 4 pixels instead of 8 x 8"),
        (3, ["run", "torn.png", "--blur", "1"], "error[TRUNCATED]"),
        (3, ["run", "nothing.png", "--blur", "1"], "error[NO_FILE]"),
        (3, ["run", "run", "--blur", "1"], "error[NO_FILE]"),
        (4, ["nowhere", "whole.png", "--blur", "1"], "error[NOT_FOUND]"),
    ],
)
def test_errors_are_one_line(place, call, code, arguments, message):
    run, image, *more = arguments
    more = [place / a if a.endswith(".png") else a for a in more]
    exit_code, _, err = call("restore", place / run, place / image, *more)
    assert (exit_code, err.count("\n")) == (code, 1), err
    assert message in err


def test_a_wrong_method_leaves_no_folder(place, call):
    assert (
        call("restore", place / "run", place / "whole.png", "--blur", 1, "--method", "no", "--out", place / "no").code
        == 2
    )
    assert not (place / "no").exists()


def test_interpolate(place, call):
    code, out, err = call("interpolate", place / "run", place / "whole.png", place / "black.png", "--n", 4)
    assert (code, err) == (0, "")
    path = place / "run" / "pictures" / "whole-to-black.png"
    assert str(path) in out
    assert "4 images" in out
    first, _, _, last = tiles(path)
    np.testing.assert_allclose(first.astype(int), WHOLE, atol=1)
    np.testing.assert_allclose(last, 0, atol=1)
    before = path.read_bytes()
    code, out, err = call("interpolate", place / "run", place / "whole.png", place / "black.png", "--n", 3)
    assert (code, err) == (0, "")
    assert f"3 images: {path.with_name('whole-to-black-2.png')}" in out
    assert (path.read_bytes() == before, len(tiles(path.with_name("whole-to-black-2.png")))) == (True, 3)
    said = call("interpolate", place / "run", place / "whole.png", place / "black.png", "--out", place / "colour.png")
    assert (said.code, "this file exists" in said.err, read(place / "black.png").shape) == (2, True, (8, 8))
    said = call("interpolate", place / "run", place / "whole.png", place / "black.png", "--out", place / "way.foo")
    assert (said.code, f"{place / 'way.foo'}: it is not the name of a PNG file" in said.err) == (2, True)
    assert call("interpolate", place / "line", place / "whole.png", place / "black.png")[0] == 2
    assert call("interpolate", place / "run", place / "whole.png", place / "small.png")[0] == 3
    assert call("interpolate", place / "run", place / "whole.png", place / "black.png", "--n", 1)[0] == 2
    code, _, err = call("interpolate", place / "run", place / "whole.png", place / "black.png", "--label", "cat")
    assert (code, "the model was trained without labels" in err) == (2, True)


def test_variants_by_noise_and_back(place, call):
    out = place / "variants"
    flags = ["--method", "sdedit", "--strength", 0.5, "--n", 2, "--seed", 3, "--steps", 4, "--out", out]
    said = call("restore", place / "run", place / "whole.png", *flags)
    assert (said.code, said.err) == (0, "")
    assert "2 variants by sdedit from t = 0.5 in 4 steps" in said.out
    assert "residual" not in said.out
    variants = np.stack([read(out / f"{i:06d}.png") for i in range(2)])
    x = IntegerLevels(256).to_model(torch.tensor(WHOLE)[None])
    np.testing.assert_array_equal(variants, sdedit(load(place / "run"), x, 2, 0.5, seed=3, num_steps=4)[:, 0])
    np.testing.assert_array_equal(tiles(out / "strip.png"), [WHOLE, *variants])
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["method"], manifest["strength"], manifest["steps"]) == ("sdedit", 0.5, 4)
    assert "residual" not in manifest
    by_default = call("restore", place / "run", place / "whole.png", "--method", "sdedit", "--n", 1)
    assert "from t = 0.6" in by_default.out
    for other in (["--blur", 1], ["--noise", 0.1], ["--upsample", 2], ["--degrade"], ["--mask", place / "mask.png"]):
        said = call("restore", place / "run", place / "whole.png", "--method", "sdedit", *other)
        assert (said.code, said.err.count("\n"), "it makes variants of an intact image" in said.err) == (2, 1, True)
    for wrong, words in ((["--strength", 2, "--method", "sdedit"], "out of range"), (["--strength", 0.5], "'sdedit'")):
        said = call("restore", place / "run", place / "whole.png", *wrong)
        assert (said.code, said.err.count("\n"), words in said.err) == (2, 1, True), said.err


def test_a_consistency_model_makes_variants_only(place, call):
    """Restorations and interpolations need means of the data, which it does not predict."""
    distilled = Diffusion(replace(CONFIG, calls=2), (1, 8, 8), IntegerLevels(256), {"num_values": 256})
    save(distilled, place / "distilled.safetensors")
    run, image = place / "distilled.safetensors", place / "whole.png"
    said = call("restore", run, image, "--method", "sdedit", "--n", 2, "--out", place / "few")
    assert (said.code, said.err) == (0, "")
    assert "2 variants by sdedit from t = 0.6 in 2 steps" in said.out
    x = IntegerLevels(256).to_model(torch.tensor(WHOLE)[None])
    variants = np.stack([read(place / "few" / f"{i:06d}.png") for i in range(2)])
    np.testing.assert_array_equal(variants, sdedit(load(run), x, 2, 0.6)[:, 0])
    refused = call("restore", run, image, "--method", "sdedit", "--steps", 3, "--out", place / "steps")
    cause = "with --method sdedit a distilled model takes the times of its own sampler. Omit it"
    assert (refused.code, refused.err) == (2, f"error[USAGE] --steps 3: {cause}.\n")
    for command in (("restore", run, image, "--noise", 0.1), ("interpolate", run, image, image)):
        refused = call(*command, "--out", place / "no.png")
        assert (refused.code, refused.err.count("\n")) == (2, 1)
        assert refused.err.startswith(f"error[DISTILLED] {run}: it is a consistency model")
        assert not (place / "no.png").exists()
