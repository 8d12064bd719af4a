"""Trainer files of denoising-diffusion-pytorch: a forward pass and a chain, written here, are the reference."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from denoising_diffusion_cases import SIDE, Reference, T, betas, buffers, inputs, trainer_file, write
from diffusers_cases import noise
from safetensors.torch import save_file
from tiny_run import global_batch, quick_looks
from torch import Tensor

from undiffuse import load
from undiffuse.cli import main
from undiffuse.data.from_array import from_array
from undiffuse.errors import UndiffuseError
from undiffuse.interop import foreign_files
from undiffuse.interop.denoising_diffusion import NAMES, import_denoising_diffusion, own_name
from undiffuse.interop.unpickle import convert, flatten
from undiffuse.model.config import Config, from_dict
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.trajectory import trajectory
from undiffuse.training.monitor import Monitor

REFERENCES = {
    "default": {},
    "three levels": {"mults": (1, 2, 2), "full": [False, True, True], "heads": [1, 2, 3]},
    "first width": {"init_dim": 12, "width": 6},
    "self-conditioning": {"self_condition": True, "channels": 2, "out": 2},
    "learned variance": {"out": 2},
    "wavelength": {"theta": 500},
    "1.11": {"groups": 4},
    "1.8": {"groups": 4, "memory": 0},
}
FLAGS = {
    "wavelength": {"sinusoidal_pos_emb_theta": 500},
    "1.11": {"resnet_block_groups": 4},
    "1.8": {"resnet_block_groups": 4, "attn_heads": 2},
}


@pytest.fixture(autouse=True)
def _without_the_package(monkeypatch):
    """Tests of this file compare with the reference, also where the package is installed."""
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)


def flat(content: dict) -> dict[str, Tensor]:
    """The tensors of a Trainer's file as the child process returns them."""
    return {name: t.clone().contiguous() for name, t in flatten(content).items() if isinstance(t, Tensor)}


def place(folder, reference: Reference | None = None, tables: dict | None = None, last: float = 0.0):
    """A file of the same tensors that needs no child process."""
    save_file(flat(trainer_file(reference or Reference(), tables or buffers(), last)), folder / "model-1.safetensors")
    return folder / "model-1.safetensors"


def model_of(path, **setting):
    return import_denoising_diffusion(path, size=SIDE, setting=setting)


def their_name(name: str) -> str:
    """Their name of a weight, of ours."""
    for own, theirs in NAMES.items():
        name = name.replace(own, theirs)
    return name


@torch.no_grad()
@pytest.mark.parametrize("name", REFERENCES)
def test_outputs_are_those_of_the_reference(name, tmp_path):
    reference = Reference(**REFERENCES[name])
    x, time = inputs(reference.channels)
    expected = reference(x, time)
    imported = model_of(place(tmp_path, reference), **FLAGS.get(name, {}))
    model = imported.model
    computed = model.network(x, time)
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert model.item_shape == (reference.channels, SIDE, SIDE)
    assert model.config.variance == ("learned" if name == "learned variance" else "small")
    assert any("self-conditioning" in note for note in imported.notes) == (name == "self-conditioning")
    names = model.network.state_dict()
    assert {their_name(own) for own in names} == reference.weights.keys()
    assert {own_name(theirs) for theirs in reference.weights} == names.keys()
    assert [check.difference is None for check in imported.checks] == [True, False]
    if name == "wavelength":  # power: the default is another network
        other = model_of(tmp_path / "model-1.safetensors").model.network(x, time)
        assert (other - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(
    ("objective", "limit"),
    [("pred_noise", None), ("pred_noise", 5.0), ("pred_x0", None), ("pred_x0", 0.5), ("pred_v", None), ("pred_v", 5.0)],
)
def test_the_objective_and_the_loss_are_those_of_the_tables(objective, limit, tmp_path):
    """The loss is that of the package for the same steps and noise: the squared error times loss_weight."""
    tables = buffers(objective, "cosine", limit)
    imported = model_of(place(tmp_path, tables=tables))
    model, config = imported.model, imported.model.config
    assert config.target["name"] == {"pred_noise": "eps", "pred_x0": "x", "pred_v": "v"}[objective]
    assert config.weight == ({"name": "simple"} if limit is None else {"name": "min_snr", "limit": limit})
    values = (noise("values", 6, 1, SIDE, SIDE) * 60 + 128).clamp(0, 255).to(torch.uint8)
    u, eps = (torch.arange(6) + 0.5) / 6, noise("eps", 6, 1, SIDE, SIDE)
    t = (u * T).long()
    x = values.float() / 127.5 - 1
    bar = tables["alphas_cumprod"].double()[t][:, None, None, None]
    alpha, sigma = bar.sqrt().float(), (1 - bar).sqrt().float()
    target = {"pred_noise": eps, "pred_x0": x, "pred_v": alpha * eps - sigma * x}[objective]
    with torch.no_grad():
        error = (model.network(alpha * x + sigma * eps, t.float()) - target).square().flatten(1).mean(1)
        computed = model.loss(values, u, eps)
    torch.testing.assert_close(
        computed, (error * tables["loss_weight"][t]).double(), rtol=1e-4, atol=0, check_dtype=False
    )


@pytest.mark.parametrize("kind", ["sigmoid", "cosine"])
def test_the_chain_is_that_of_the_tables(kind, tmp_path):
    """To float32: ᾱ where it is small, and 1 − ᾱ at the first steps, in a chain of 1000."""
    tables = buffers(kind=kind, steps=1000)
    model = model_of(place(tmp_path, tables=tables)).model
    beta = torch.tensor(model.config.schedule["beta"], dtype=torch.float64)
    levels = model.chain[-2::-1]
    bar = torch.stack([level.alpha**2 for level in levels])
    exact = torch.cumprod(1 - beta, 0)
    float64 = torch.cumprod(1 - betas(kind, 1000), 0)
    torch.testing.assert_close(bar, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(bar, float64, rtol=2e-6, atol=0)
    torch.testing.assert_close(1 - bar[:50], 1 - float64[:50], rtol=2e-7, atol=0)
    times = [float(model.denoiser().preconditioning.time_input(model.chain[k])) for k in (0, 1, 999)]
    assert times == [999, 998, 0]


@torch.no_grad()
@pytest.mark.parametrize("objective", ["pred_noise", "pred_v"])
def test_the_chain_draws_as_p_sample_does_from_the_same_noise(objective, tmp_path):
    """Every state, with x̂ clamped to [−1, 1] and the variance of the posterior."""
    reference, tables = Reference(), buffers(objective)
    model = model_of(place(tmp_path, reference, tables)).model
    beta = torch.tensor(model.config.schedule["beta"], dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    draws = [noise(f"draw {k}", 2, 1, SIDE, SIDE) for k in range(T + 1)]
    x, expected = draws[0], [draws[0]]
    for k, t in enumerate(reversed(range(T))):
        y = reference(x, torch.full((2,), float(t)))
        clean = (x - (1 - bar[t]).sqrt() * y) / bar[t].sqrt()
        if objective == "pred_v":
            clean = bar[t].sqrt() * x - (1 - bar[t]).sqrt() * y
        mean = beta[t] * before[t].sqrt() * clean.clamp(-1, 1) + (1 - before[t]) * (1 - beta[t]).sqrt() * x
        var = beta[t] * (1 - before[t]) / (1 - bar[t])
        x = (mean / (1 - bar[t]) + (var.sqrt() * draws[k + 1] if t else 0)).float()
        expected.append(x)
    left = iter(draws[1:])
    sampler = Sampler("ancestral", T)
    states = trajectory(
        model.sampling_denoiser(sampler),
        model.build_solver(sampler),
        model.noise_levels(sampler),
        draws[0],
        lambda n: next(left)[None] if n else draws[0][None][:0],
    )
    *_, last = states
    torch.testing.assert_close(last.x, expected[-1], rtol=0, atol=1e-4)
    assert 0.01 < expected[-1].std() < 2


def test_the_averaged_weights_are_taken_unless_asked_otherwise(tmp_path):
    path = place(tmp_path, last=0.25)
    average, last = model_of(path), model_of(path, ema=False)
    assert average.notes[0].startswith("averaged weights; objective pred_v")
    assert last.notes[0].startswith("last weights")
    name = "mid_block1.cond.weight"
    torch.testing.assert_close(last.model.network.state_dict()[name], average.model.network.state_dict()[name] + 0.25)
    content = trainer_file(Reference(), buffers())["model"]
    save_file(flat(content), tmp_path / "alone.safetensors")  # the state dict of a GaussianDiffusion
    assert model_of(tmp_path / "alone.safetensors").notes[0].startswith("last weights")


DAMAGE = [
    ({"x": torch.zeros(1)}, {}, "it has no weights of a GaussianDiffusion"),
    ("-ema/ema_model.model.final_conv.bias", {}, "'final_conv.bias' is missing"),
    ("-ema/ema_model.model.time_mlp.1.weight", {}, "not a file of denoising-diffusion-pytorch 1.8 to 2.3"),
    ("-ema/ema_model.betas", {}, "its tables betas and alphas_cumprod are missing"),
    ("-ema/ema_model.loss_weight", {}, "Give --set objective=pred_v, pred_noise or pred_x0"),
    ({"ema/ema_model.model.extra": torch.zeros(1)}, {}, "'extra' does not belong to this model"),
    ({"ema/ema_model.model.final_conv.bias": torch.tensor([math.nan])}, {}, "NaN or infinite"),
    ({"ema/ema_model.model.final_conv.bias": torch.zeros(2)}, {}, "has the shape (2,), not (1,)"),
    ({"ema/ema_model.betas": torch.full((T,), math.nan)}, {}, "the table 'betas' holds values that are NaN"),
    ({"ema/ema_model.betas": torch.zeros(T)}, {}, "its betas are not all in (0, 1)"),
    ({"ema/ema_model.betas": torch.zeros(3)}, {}, "of different lengths"),
    ({"ema/ema_model.loss_weight": torch.ones(T) / 3}, {}, "its table loss_weight fits none of pred_noise"),
    ({"ema/ema_model.loss_weight": torch.ones(3)}, {}, "its table loss_weight fits none of pred_noise"),
    ({"ema/ema_model.model.time_mlp.0.weights": torch.ones(8)}, {}, "embedding of the time is learned or random"),
    ({"ema/ema_model.model.downs.1.3.weight": torch.ones(9, 8, 3, 3)}, {}, "its levels have [8, 9] channels"),
    ({}, {"objective": "pred_x0"}, "--set objective: 'pred_x0' with the loss_weight of 'pred_v'"),
    ({}, {"objective": "v"}, "--set objective: 'v' is unknown. Use pred_noise, pred_x0, pred_v"),
    ({}, {"auto_normalize": False}, "Only models with auto_normalize can be imported"),
    ({}, {"ema": 1}, "1 is not of the type bool"),
    ({}, {"num_heads": 4}, "--set num_heads: no such flag"),
    ({}, {"dropout": 2.0}, "network.dropout: 2.0 is not a number in [0, 1)"),
]


@pytest.fixture(scope="module")
def whole():
    return flat(trainer_file(Reference(), buffers()))


@pytest.mark.parametrize(("change", "setting", "cause"), DAMAGE)
def test_files_and_flags_that_cannot_be_are_one_line(change, setting, cause, whole, tmp_path):
    if isinstance(change, str):
        tensors = {name: tensor for name, tensor in whole.items() if name != change[1:]}
    else:
        tensors = change if "x" in change else {**whole, **change}
    save_file(tensors, tmp_path / "model-1.safetensors")
    with pytest.raises(UndiffuseError) as raised:
        model_of(tmp_path / "model-1.safetensors", **setting)
    assert cause in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_size_is_needed(tmp_path):
    with pytest.raises(UndiffuseError, match="its image_size is in no file"):
        import_denoising_diffusion(place(tmp_path))


class Harmful:
    """Creates a file when it is unpickled without restriction."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_the_command_recognizes_reads_and_refuses_pickles(tmp_path, capsys, monkeypatch):
    """What the child process does is done in this one, to save its start; test_openai.py starts one."""

    def run(command, **_):
        convert(*command[-2:])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(foreign_files.subprocess, "run", run)
    path, out = write(tmp_path / "model-1.pt", last=0.5), tmp_path / "out"
    command = ["import", str(path), str(out), "--size", str(SIDE), "--unpickle"]
    assert main(command[:-1]) == 4
    assert "error[PICKLE_REFUSED]" in capsys.readouterr().err
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "note: averaged weights, step 12, version 2.3.4; objective pred_v" in printed
    assert f"next: undiffuse sample {out} --solver ancestral --steps {T}" in printed
    assert load(out).info["imported"]["from"] == "denoising-diffusion-pytorch"
    path.write_bytes(path.read_bytes()[:-900])
    assert main([*command[:2], str(tmp_path / "cut"), *command[3:]]) == 4
    error = capsys.readouterr().err
    assert error.startswith(f"error[DAMAGED] {path}: not a whole file of torch.save")
    assert error.count("\n") == 1
    assert not (tmp_path / "cut").exists()


@pytest.mark.release
def test_code_in_a_file_is_not_run(tmp_path, capsys):
    path, touched = tmp_path / "model-1.pt", tmp_path / "touched"
    torch.save({**trainer_file(Reference(), buffers()), "scaler": Harmful(touched)}, path)
    assert main(["import", str(path), str(tmp_path / "out"), "--size", str(SIDE), "--unpickle"]) == 4
    error = capsys.readouterr().err
    assert error.startswith("error[PICKLE_REFUSED]")
    assert error.count("\n") == 1
    assert not touched.exists()
    assert not (tmp_path / "out").exists()


def test_an_imported_model_is_measured_and_trained_further_from_its_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place(tmp_path)
    images = np.random.default_rng(0).integers(256, size=(24, 1, SIDE, SIDE)).astype(np.uint8)
    np.save("data.npy", images)
    assert main(["import", "model-1.safetensors", "imported", "--size", str(SIDE)]) == 0
    given = ["data.npy", "--num-values", "256", "--device", "cpu"]
    bound = load("imported").nll(torch.from_numpy(images[:2]), mc_samples=4)
    assert torch.isfinite(bound.total).all()
    losses = []
    (tmp_path / "train.toml").write_text('[train]\npreviews = 0\nsnapshots = 0\nprecision = "float32"\n')
    options = ["--init", "imported", "--steps", "1", "--batch", "4", "--out", "run", "--config", "train.toml"]
    with quick_looks():
        monkeypatch.setattr(Monitor, "record_step", lambda monitor, loss, *rest: losses.append(loss))
        main(["train", *given, *options])
    model = load("imported")
    config = from_dict(Config, json.loads((tmp_path / "run" / "run.json").read_text())["config"], "run.json")
    data = from_array(images, num_values=256)
    batch = global_batch(data, data.split(config.train.held_out).train, config.train, 0)
    with torch.no_grad():
        expected = float(model.loss(batch.values, batch.u, batch.eps).mean())
    assert losses == [pytest.approx(expected, rel=1e-5)]
    assert config.model == model.config
