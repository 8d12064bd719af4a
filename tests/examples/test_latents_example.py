"""The example that trains on latents, with two steps each."""

import numpy as np
from PIL import Image
from test_any_data import load_example

from undiffuse.training.monitor import Monitor


def test_the_example_writes_both_models_and_the_picture(tmp_path, monkeypatch):
    example = load_example("latents")
    monkeypatch.setattr(Monitor, "finish", lambda monitor: monitor.task.save(monitor.ema_model, monitor.run.model))
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(256, size=(40, 8, 8)).astype(np.uint8))
    out = str(tmp_path / "out")
    path = example.main(str(tmp_path / "data.npy"), out, images=3, max_steps=2, batch=8, previews=0)
    with Image.open(path) as picture:
        assert picture.size[0] > 3 * 8
