"""The example of fine-tuning, on a tiny network."""

from dataclasses import replace

from test_any_data import load_example

from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.training.monitor import Monitor

NETWORK = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
RECIPE = Config(
    ModelConfig(network=NETWORK, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=5),
    TrainConfig(batch=8, warmup=1, precision="float32", previews=0, snapshots=0),
)


def test_the_example_prints_the_bound_of_three_models(tmp_path, monkeypatch, capsys):
    example = load_example("fine_tune")
    monkeypatch.setattr(Monitor, "_draw", lambda *_: None)
    monkeypatch.setattr(example.undiffuse, "preset", lambda name: replace(RECIPE))
    bounds = example.main(tmp_path, max_steps=2)
    output = capsys.readouterr().out
    assert "note: starts from" in output
    assert all(f"{name:22} at most {bound:.3f} bits" in output for name, bound in bounds.items())
    assert list(bounds) == ["trained on 0 to 7", "fine-tuned on 8 and 9", "trained on 8 and 9"]
