"""The example of a cascade, with two steps of a tiny network."""

from dataclasses import replace

from PIL import Image
from test_any_data import load_example

from undiffuse.model import presets
from undiffuse.model.checkpoint import load, save
from undiffuse.training.monitor import Monitor


def test_the_example_draws_both_stages(tmp_path, monkeypatch, capsys):
    example = load_example("cascade")
    digits = presets.PRESETS["digits"]
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
    tiny = replace(digits, model=replace(digits.model, network=network, chain_length=50))
    monkeypatch.setattr(example, "preset", lambda name: tiny)
    monkeypatch.setattr(Monitor, "finish", lambda monitor: save(monitor.ema_model, monitor.run.model))
    path = example.main(str(tmp_path), None, columns=3, max_steps=2, batch=8, previews=0, precision="float32")
    with Image.open(path) as picture:
        assert picture.size[0] < picture.size[1]  # four rows of three
    assert "bits per dimension, of which the base" in capsys.readouterr().out
    assert load(tmp_path / "large").item_shape == (3, 4, 4)
