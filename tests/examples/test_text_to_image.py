"""The example of text: its captions, its held-out pair, and a run of two steps from captions to a grid of prompts."""

from PIL import Image
from test_any_data import TRAIN, load_example

from undiffuse import Config, ModelConfig, Sampler, load_data
from undiffuse.training.monitor import Monitor

NETWORK = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": (), "patch": 4}
RECIPE = Config(ModelConfig(network=NETWORK, chain_length=3), TRAIN)


def test_text_to_image(tmp_path, monkeypatch):
    text = load_example("text_to_image")
    text.write(tmp_path / "shapes", 22)
    data = load_data(tmp_path / "shapes", captions=True)
    assert len({captions[0] for captions in data.captions}) == 11
    assert data.captions[0] == ("a red disc", "the disc is red")
    assert not any("blue" in a and "box" in a for captions in data.captions for a in captions)
    monkeypatch.setattr(text, "preset", lambda name: RECIPE)
    monkeypatch.setattr(Monitor, "_draw", lambda *_: None)
    monkeypatch.setattr(text, "Sampler", lambda **settings: Sampler(num_steps=2, **settings))
    path = text.train_and_draw(tmp_path / "shapes", max_steps=2)
    with Image.open(path) as image:
        assert image.width > 2 * image.height
