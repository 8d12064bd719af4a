"""The example that trains on latents, with two steps each."""

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from undiffuse.training.monitor import Monitor

EXAMPLE = Path(__file__).parents[2] / "examples" / "latents.py"


def test_the_example_writes_both_models_and_the_picture(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("latents", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(Monitor, "finish", lambda monitor: monitor.task.save(monitor.ema_model, monitor.run.model))
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(256, size=(40, 8, 8)).astype(np.uint8))
    out = str(tmp_path / "out")
    path = example.main(str(tmp_path / "data.npy"), out, images=3, max_steps=2, batch=8, previews=0)
    with Image.open(path) as picture:
        assert picture.size[0] > 3 * 8
    assert len(EXAMPLE.read_text().splitlines()) <= 60
