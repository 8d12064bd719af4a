"""The example of a cascade, with two steps of a tiny network."""

import importlib.util
from dataclasses import replace
from pathlib import Path

from PIL import Image

from undiffuse.model import presets
from undiffuse.model.checkpoint import load, save
from undiffuse.training.monitor import Monitor

EXAMPLE = Path(__file__).parents[2] / "examples" / "cascade.py"


def test_the_example_draws_both_stages(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("cascade_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
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
    assert len(EXAMPLE.read_text().splitlines()) <= 60
