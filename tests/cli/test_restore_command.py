"""``restore`` and ``interpolate``, called in this process: what they write, and what they refuse."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from undiffuse.checkpoint import save
from undiffuse.codec import Identity, Pixels
from undiffuse.config import ModelConfig
from undiffuse.diffusion import Diffusion
from undiffuse.restore import Damage, degraded, restored, rounding

CONFIG = ModelConfig(
    network={"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()},
    schedule={"name": "linear_log_snr", "high": 6.0},
    steps=6,
)
RNG = np.random.default_rng(0)
WHOLE, SMALL, COLOUR = (RNG.integers(256, size=s).astype(np.uint8) for s in ((8, 8), (4, 4), (8, 8, 3)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restore")
    torch.manual_seed(0)
    for name, shape, codec in (("run", (1, 8, 8), Pixels(256)), ("line", (1, 16), Pixels(256))):
        (folder / name).mkdir()
        save(Diffusion(CONFIG, shape, codec, {"levels": 256}), folder / name / "model.safetensors")
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
    """The images of a strip, which shows those of 8 x 8 pixels eight times as large and eight pixels apart."""
    shown = read(path)[..., 0]
    return [shown[8:72:8, left : left + 64 : 8] for left in range(8, shown.shape[1] - 64, 72)]


def test_a_mask(place, call):
    code, out, err = call("restore", place / "run", place / "whole.png", "--mask", place / "mask.png", "--n", 3)
    assert (code, err) == (0, "")
    assert "3 answers by mmps in 6 steps" in out
    folder = place / "run" / "restored" / "whole-mmps"
    answers = np.stack([read(folder / f"{i:06d}.png") for i in range(3)])
    assert (answers[:, :, :4] == WHOLE[:, :4]).all()
    assert (answers[:, 0] == WHOLE[0]).all()  # 127 of 255 is not yet white
    assert (answers[:, 1:, 4:] != WHOLE[1:, 4:]).mean() > 0.9
    manifest = json.loads((folder / "manifest.json").read_text())
    told = {
        k: manifest[k] for k in ("method", "seed", "steps", "items", "upsample", "blur", "noise", "degrade", "misfit")
    }
    expected = {"method": "mmps", "seed": 0, "steps": 6, "items": [0, 1, 2], "upsample": 1, "blur": 0.0, "noise": 0.0}
    assert told == {**expected, "degrade": False, "misfit": [0.0, 0.0, 0.0]}
    assert (manifest["image"], manifest["mask"]) == (str(place / "whole.png"), str(place / "mask.png"))
    seen, *shown, mean, spread = tiles(folder / "strip.png")
    np.testing.assert_array_equal(shown, answers)
    np.testing.assert_array_equal(seen[:, :4], WHOLE[:, :4])
    assert (seen[1:, 4:] == 128).all()
    np.testing.assert_allclose(mean, answers.mean(0), atol=0.51)
    np.testing.assert_allclose(spread, np.clip(2 * answers.std(0), 0, 255), atol=0.51)


def test_what_is_asked_reaches_the_library(place, call):
    """Every option: the same answers as the library's own."""
    from undiffuse.checkpoint import load

    model = load(place / "run")
    more = [
        "--upsample",
        2,
        "--blur",
        0.7,
        "--noise",
        0.05,
        "--n",
        2,
        "--seed",
        4,
        "--steps",
        3,
        "--batch",
        1,
        "--out",
    ]
    for method in ("dps", "pigdm"):
        asked = [] if method == "pigdm" else ["--method", method]  # which is the best for what is blurred
        assert call("restore", place / "run", place / "small.png", *more, place / method, *asked)[0] == 0
        damage = Damage((1, 8, 8), 0.7, 2, 0.1)
        image = Pixels(256).encode(torch.tensor(SMALL)[None])
        settings = {"method": method, "seed": 4, "steps": 3, "floor": rounding(256)}
        expected = restored(model, damage, image, 2, **settings)
        np.testing.assert_array_equal(
            np.stack([read(place / method / f"{i:06d}.png") for i in range(2)]), expected[:, 0]
        )
    out = place / "all"
    code, _, error = call("restore", place / "run", place / "small.png", *more, out, "--label", "cat")
    assert (code, error[:13]) == (2, "error[LABEL] ")
    code, said, _ = call("restore", place / "run", place / "whole.png", *more, out, "--degrade")
    assert code == 0
    assert "away from the whole image" in said
    image = degraded(damage, Pixels(256).encode(torch.tensor(WHOLE)[None]), 4, 256)
    expected = restored(model, damage, image, 2, **settings)
    np.testing.assert_array_equal(np.stack([read(out / f"{i:06d}.png") for i in range(2)]), expected[:, 0])


def test_answers_are_never_replaced(place, call):
    """A folder with answers is refused by name; without a name the next free one is taken."""
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
        f"error[OUT] {first}: there are answers already. Give another folder, or remove it.\n",
    )
    said = call(*flags, "--out", first / "000000.png")
    assert (said.code, "000000.png: it is a file. " in said.err) == (2, True)
    assert (first / "000000.png").read_bytes() == before


def test_what_is_transparent_in_a_mask_is_made_up(place, call):
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[..., 3], hidden[:, 4:, 3] = 255, 0  # black throughout, and nothing there on the right
    Image.fromarray(hidden).save(place / "erased.png")
    out = place / "erased"
    flags = ["--mask", place / "erased.png", "--n", 1, "--out", out]
    assert call("restore", place / "run", place / "whole.png", *flags).code == 0
    made = read(out / "000000.png")
    np.testing.assert_array_equal(made[:, :4], WHOLE[:, :4])
    assert (made[:, 4:] != WHOLE[:, 4:]).mean() > 0.9


def test_more_steps_than_the_chain_has_are_told(place, call):
    words = "99,999 steps are more than the chain of this model has: all its 6 are walked\n"
    for flags in (
        ["restore", place / "run", place / "whole.png", "--noise", 0.1, "--n", 1, "--out", place / "long"],
        ["interpolate", place / "run", place / "whole.png", place / "black.png", "--out", place / "long.png"],
    ):
        assert words in call(*flags, "--steps", 99_999).out


def test_colours_are_made_grey_and_one_answer_has_no_spread(place, call):
    out = place / "one"
    assert call("restore", place / "run", place / "colour.png", "--noise", 0.1, "--n", 1, "--out", out)[0] == 0
    assert read(out / "000000.png").shape == (8, 8)


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (2, ["run", "whole.png"], "error[USAGE] restore: nothing is said of what is wrong with the image"),
        (2, ["line", "whole.png", "--blur", "1"], "its items are 1x16, no grey or RGB images"),
        (2, ["plain.safetensors", "whole.png", "--blur", "1"], "its items are 1x4x4, no grey or RGB images"),
        (2, ["run", "small.png", "--upsample", "3"], "3 does not divide the sides of an item, 8 x 8"),
        (2, ["run", "whole.png", "--blur", "1", "--method", "magic"], "'magic': no such method"),
        (2, ["run", "whole.png", "--blur", "1", "--method", "repaint"], "it fills in what a mask hides"),
        (2, ["run", "whole.png", "--mask", "white.png"], "it hides everything"),
        (2, ["run", "whole.png", "--mask", "black.png"], "it hides nothing, so there is nothing to be made up"),
        (3, ["run", "whole.png", "--upsample", "2"], "it has 8 x 8 pixels, and 4 x 4 are needed"),
        (3, ["run", "small.png", "--noise", "0.1"], "it has 4 x 4 pixels, and 8 x 8 are needed"),
        (3, ["run", "small.png", "--upsample", "2", "--degrade"], "it has 4 x 4 pixels, and 8 x 8 are needed"),
        (3, ["run", "whole.png", "--mask", "small.png"], "it has 4 x 4 pixels, and 8 x 8 are needed"),
        (3, ["run", "torn.png", "--blur", "1"], "error[TRUNCATED]"),
        (3, ["run", "nothing.png", "--blur", "1"], "error[NO_FILE]"),
        (3, ["run", "run", "--blur", "1"], "error[NO_FILE]"),
        (4, ["nowhere", "whole.png", "--blur", "1"], "error[NOT_FOUND]"),
    ],
)
def test_what_is_refused_in_a_line(place, call, code, arguments, said):
    run, image, *more = arguments
    more = [place / a if a.endswith(".png") else a for a in more]
    found, _, err = call("restore", place / run, place / image, *more)
    assert (found, err.count("\n")) == (code, 1), err
    assert said in err


def test_the_way_between_two_images(place, call):
    code, out, err = call("interpolate", place / "run", place / "whole.png", place / "black.png", "--n", 4)
    assert (code, err) == (0, "")
    path = place / "run" / "pictures" / "whole-to-black.png"
    assert str(path) in out
    assert "4 images" in out
    first, _, _, last = tiles(path)
    np.testing.assert_allclose(first.astype(int), WHOLE, atol=1)
    np.testing.assert_allclose(last, 0, atol=1)
    said = call("interpolate", place / "run", place / "whole.png", place / "black.png", "--out", place / "way.foo")
    assert (said.code, f"{place / 'way.foo'}: it names no PNG file" in said.err) == (2, True)
    assert call("interpolate", place / "line", place / "whole.png", place / "black.png")[0] == 2
    assert call("interpolate", place / "run", place / "whole.png", place / "small.png")[0] == 3
    assert call("interpolate", place / "run", place / "whole.png", place / "black.png", "--n", 1)[0] == 2
    code, _, err = call("interpolate", place / "run", place / "whole.png", place / "black.png", "--label", "cat")
    assert (code, "the model was trained without labels" in err) == (2, True)
