"""A task that the package does not have: the loop trains, stops, resumes and finishes it like its own."""

import json
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tiny_run import checkpoint_hashes, stopping_at
from torch import Tensor, nn

from undiffuse.data.from_array import from_array
from undiffuse.model.config import TrainConfig
from undiffuse.runtime.tensor_file import read_tensors, write_tensors
from undiffuse.training import train_state
from undiffuse.training.fit import fit
from undiffuse.training.monitor import Monitor
from undiffuse.training.run_folder import Run
from undiffuse.training.task import Evaluation, Task

DATA = from_array(np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32), name="vectors")


@dataclass(frozen=True)
class AutoencoderConfig:
    latents: int = 2
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(batch=8, max_steps=6, lr=0.01, precision="float32", previews=2, snapshots=2)
    )


class Autoencoder(nn.Module):
    """Two networks, and a running mean of the loss that is not learned by gradient."""

    item_shape = (6,)

    def __init__(self, latents: int) -> None:
        super().__init__()
        encoder, decoder = nn.Linear(6, latents), nn.Linear(latents, 6)
        self.network = nn.Sequential(encoder, nn.Tanh(), decoder)
        self.info = {}
        self.mean_loss = torch.zeros(1)


@dataclass
class AutoencoderTask(Task):
    config: AutoencoderConfig

    def adapt(self, data, settings):
        return AutoencoderTask(replace(self.config, train=settings))

    def build_model(self, data, split):
        return Autoencoder(self.config.latents)

    def parameter_groups(self, model):
        encoder, _, decoder = model.network
        return [
            {"params": list(encoder.parameters()), "lr_factor": 1.0, "weight_decay": 0.1},
            {"params": list(decoder.parameters()), "lr_factor": 0.0},
        ]

    def loss(self, model, batch, network) -> Tensor:
        return (network(batch.values) - batch.values).square().mean(1)

    def after_step(self, model, batch, losses):
        model.mean_loss += 0.5 * (losses.mean() - model.mean_loss)

    def extra_state(self, model):
        return {"mean_loss": model.mean_loss}

    def evaluate(self, model, data, split, final, limit):
        values = torch.from_numpy(data.values[split.validation])
        error = float((model.network(values) - values).square().mean())
        return Evaluation({"error": error}, f"held-out error {error:.3f}", ["the end"] if final else [])

    def draw(self, model, data, split, folder, step, limit):
        (folder / f"{step}.txt").write_text("drawn")

    def save(self, model, path):
        write_tensors(path, model.state_dict(), {"undiffuse": "state", "info": json.dumps(model.info)})

    def load(self, path):
        model = Autoencoder(self.config.latents)
        file = path if path.is_file() else path / "model.safetensors"
        model.load_state_dict(read_tensors(file)[0])
        return model


def train(folder, config=AutoencoderConfig(), **options):
    return fit(AutoencoderTask(config), DATA, Run(folder), device="cpu", quiet=True, **options)


def test_a_new_task_is_trained_evaluated_drawn_saved_and_resumed(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
    train(tmp_path / "straight")
    assert any("held-out error" in line for line in lines)
    assert lines[-1].strip() == "the end"
    assert [r["step"] for r in Run(tmp_path / "straight").read_metrics() if "error" in r] == [3, 6]
    assert {p.name for p in (tmp_path / "straight" / "pictures").iterdir()} == {"3.txt", "6.txt", "None.txt"}
    for k in (2, 5):
        with stopping_at(k):
            train(tmp_path / "stopped")
    train(tmp_path / "stopped")
    assert checkpoint_hashes(tmp_path / "stopped", 6) == checkpoint_hashes(tmp_path / "straight", 6)
    extra, _ = read_tensors(tmp_path / "stopped" / "checkpoints" / "step-00000006" / "extra.safetensors")
    assert float(extra["mean_loss"]) > 0


def test_each_parameter_group_has_its_own_options(tmp_path):
    """The decoder's learning rate is 0 times that of the encoder, so that it does not move."""
    torch.manual_seed(0)
    start = Autoencoder(2).state_dict()
    trained = AutoencoderTask(AutoencoderConfig()).load(train(tmp_path)).state_dict()
    moved = {name for name in start if not torch.equal(trained[name], start[name])}
    assert moved == {"network.0.weight", "network.0.bias"}


def test_training_can_start_from_its_weights(tmp_path):
    first = train(tmp_path / "first")
    config = replace(AutoencoderConfig(), train=replace(AutoencoderConfig().train, max_steps=1, lr=1e-12, seed=3))
    second = train(tmp_path / "second", config, init=first)
    one, two = (AutoencoderTask(config).load(folder).state_dict() for folder in (first, second))
    assert all(torch.allclose(two[name], tensor, rtol=0, atol=1e-9) for name, tensor in one.items())
    assert train_state.verify_checkpoint(second / "checkpoints" / "step-00000001").step == 1
