"""``channels=4`` keeps transparency and removes hidden colours."""

import numpy as np
import pytest
from PIL import Image

from undiffuse.cli import main
from undiffuse.data.image_decoding import ImageOptions
from undiffuse.data.single import load_image
from undiffuse.data.sources.registry import load
from undiffuse.errors import ConfigError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (8, 8, 4)).astype(np.uint8)
PIXELS[:3, ..., 3], PIXELS[3:5, ..., 3] = 0, 255


@pytest.mark.parametrize(("background", "below"), [("white", 255), ("#000000", 0)])
def test_opacity_is_kept_and_hidden_colours_are_not(tmp_path, background, below):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    data = load(tmp_path, channels=4, background=background)
    assert (data.item_shape, data.num_values) == ((4, 8, 8), 256)
    expected = np.where(PIXELS[..., 3:] > 0, PIXELS, [below, below, below, 0])
    np.testing.assert_array_equal(data.values[0], expected.transpose(2, 0, 1))
    assert "1 of 1 images: fully transparent pixels given the background's colour" in data.notes
    assert f"the background is {background}" in data.notes
    assert load(tmp_path).item_shape == (3, 8, 8)  # composited by default
    assert load_image(tmp_path / "a.png", 4).pixels.shape == (4, 8, 8)


def test_images_without_transparency_are_opaque(tmp_path):
    grey, deep = PIXELS[..., 0], PIXELS[..., 0].astype(np.uint16) << 8
    Image.fromarray(PIXELS[..., :3]).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "b.png")
    Image.fromarray(grey > 99).save(tmp_path / "c.png")
    Image.fromarray(np.dstack([grey, PIXELS[..., 3]])).save(tmp_path / "d.png")  # grey with opacity
    Image.fromarray(np.dstack([PIXELS[..., :3], np.full_like(grey, 255)])).save(tmp_path / "e.png")
    data = load(tmp_path, channels=4)
    np.testing.assert_array_equal(data.values[[0, 4], :3], [PIXELS[..., :3].transpose(2, 0, 1)] * 2)
    np.testing.assert_array_equal(data.values[1, :3], [grey] * 3)
    np.testing.assert_array_equal(data.values[2, :3], [255 * (grey > 99)] * 3)
    np.testing.assert_array_equal(data.values[3, :3, 3:], [grey[3:]] * 3)
    np.testing.assert_array_equal(data.values[3, 3], PIXELS[..., 3])
    assert (data.values[[0, 1, 2, 4], 3] == 255).all()
    assert "3 of 5 images: opaque alpha channel added" in data.notes
    for path in tmp_path.iterdir():
        path.unlink()
    Image.fromarray(deep).save(tmp_path / "a.png")
    data = load(tmp_path, channels=4, size=4)
    assert (data.num_values, data.item_shape) == (65536, (4, 4, 4))
    assert (data.values[0, 3] == 65535).all()


def test_resizing_weights_colours_by_opacity(tmp_path):
    pixels = RNG.integers(0, 256, (24, 24, 4)).astype(np.uint8)
    pixels[:12, :, 3] = 0
    pixels[12:, :, :3] = (200, 100, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    values = load(tmp_path, channels=4, size=16, background="#010203").values[0]
    is_visible = values[3] > 0
    assert is_visible[8:].all()
    assert not is_visible[:7].any()
    assert (values[:3, is_visible].T == (200, 100, 7)).all()
    assert (values[:3, ~is_visible].T == (1, 2, 3)).all()
    opacity = np.asarray(Image.fromarray(pixels[..., 3].astype(np.float32)).resize((16, 16), Image.Resampling.HAMMING))
    np.testing.assert_array_equal(values[3], np.rint(opacity))
    half = np.dstack([np.full((2, 2, 3), [[0], [90]], np.uint8), np.array([[50, 100], [50, 100]], np.uint8)])
    Image.fromarray(half).save(tmp_path / "a.png")
    assert load(tmp_path, channels=4, size=1).values.ravel().tolist() == [60, 60, 60, 75]


def test_check_and_pack_commands(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.fromarray(RNG.integers(0, 256, (6, 6, 4)).astype(np.uint8)).save(tmp_path / "in" / f"{i}.png")
    source, out = str(tmp_path / "in"), str(tmp_path / "x.npy")
    assert main(["check", source, "--channels", "4", "--out", str(tmp_path / "sheet.png")]) == 0
    assert "4 of 4×6×6" in capsys.readouterr().out
    assert main(["pack", source, out, "--channels", "4"]) == 0
    assert load(out).fingerprint == load(source, channels=4).fingerprint
    with pytest.raises(ConfigError, match="2 is not 1, 3 or 4"):
        ImageOptions(channels=2)
