"""The example that distills a run, on a run of two steps."""

import numpy as np
from PIL import Image
from test_any_data import load_example

from undiffuse.data.sources import array_files
from undiffuse.model.checkpoint import load, save
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.training.diffusion_task import fit_diffusion
from undiffuse.training.monitor import Monitor

CONFIG = Config(
    ModelConfig(network={"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}, chain_length=50),
    TrainConfig(batch=8, max_steps=2, warmup=1, precision="float32", held_out=0.2, previews=0),
)


def test_the_example_writes_the_model_and_the_picture(tmp_path, monkeypatch):
    example = load_example("few_calls")
    monkeypatch.setattr(Monitor, "finish", lambda monitor: save(monitor.ema_model, monitor.run.model))
    values = np.random.default_rng(0).integers(256, size=(40, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "data.npy", values)
    run, data = str(tmp_path / "run"), str(tmp_path / "data.npy")
    fit_diffusion(CONFIG, array_files.load(data), run, device="cpu", quiet=True)
    path = example.main(run, data, images=3, max_steps=2, batch=8, previews=0)
    assert path == tmp_path / "run-1-call" / "pictures" / "few-calls.png"
    with Image.open(path) as picture:
        assert picture.size[0] < picture.size[1]  # four rows of three
    assert load(tmp_path / "run-1-call").config.calls == 1
