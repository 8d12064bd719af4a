"""A denoiser as a program of torch.export: for any batch, with the levels of its chain. ONNX: tests/parity."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers_models import model
from network_cases import randomized

from undiffuse.cli import main
from undiffuse.data.transform import Standardized
from undiffuse.errors import ConfigError
from undiffuse.interop.graph_export import CHECKED_TIMES, LEVELS, PROGRAM, DenoiserGraph, export_torch
from undiffuse.model import checkpoint, presets
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition


def vectors(**changes) -> Diffusion:
    """A model of vectors of two numbers with three classes and random weights."""
    config = replace(
        presets.get("vector").model, network={"kind": "mlp", "width": 16, "depth": 1, "classes": 3}, chain_length=20
    )
    diffusion = Diffusion(replace(config, **changes), (2,), Standardized((0.0, 1.0), (1.0, 2.0)))
    randomized(diffusion.network)
    return diffusion


def test_the_program_predicts_as_the_model_does_for_any_batch(tmp_path):
    diffusion = vectors()
    (check,) = export_torch(diffusion, tmp_path)
    assert check.difference < 1e-5
    program = torch.export.load(tmp_path / PROGRAM).module()
    fields = json.loads((tmp_path / LEVELS).read_text())
    x_t, label = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, -1, 1, 1])
    for place in (0, 11, 19):
        row, level = fields["chain"][place], diffusion.chain[place]
        inputs = [torch.full((5,), row[name], dtype=torch.float32) for name in ("alpha", "sigma", "time")]
        with torch.no_grad():
            x = program(x_t, *inputs, label)
            own = diffusion.denoiser()(x_t, level, Condition(label=label)).x
        torch.testing.assert_close(x, own, rtol=0, atol=1e-5 * max(1.0, float(own.abs().max())))
    assert fields["x_shape"] == [2]
    assert fields["classes"] == 3
    assert fields["transform"] == {"kind": "standardized", "mean": [0.0, 1.0], "std": [1.0, 2.0]}
    assert [row["t"] for row in fields["chain"]] == pytest.approx(np.linspace(1, 0, 21).tolist())


@pytest.mark.release
def test_a_transformer_is_exported_for_any_batch(tmp_path):
    network = {"kind": "dit", "patch": 2, "width": 8, "depth": 1, "heads": 2, "classes": 3}
    config = replace(presets.adapt_to_data(presets.get("digits"), 17).model, chain_length=20, network=network)
    diffusion = Diffusion(config, (1, 4, 4), model().transform.__class__(17))
    randomized(diffusion.network)
    (check,) = export_torch(diffusion, tmp_path)
    assert check.difference < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["eps", "x", "v", "edm", "flow", "score", "categorical"])
def test_the_module_that_is_exported_has_every_target(kind):
    if kind == "categorical":
        config = presets.adapt_to_data(presets.get("digits"), 17).model
        diffusion = Diffusion(replace(config, chain_length=20), (1, 8, 8), model().transform.__class__(17))
        randomized(diffusion.network)
    else:
        scale = {"preconditioning": {"scale": "unit", "time": "log_sigma", "sigma_data": 0.5}} if kind == "edm" else {}
        diffusion = vectors(target={"name": kind}, **scale)
    level = diffusion.schedule(torch.tensor(CHECKED_TIMES, dtype=torch.float64))
    time = diffusion.denoiser().preconditioning.time_input(level).float()
    x_t = torch.randn((3, *diffusion.x_shape), generator=torch.Generator().manual_seed(2))
    x = DenoiserGraph(diffusion.eval())(x_t, level.alpha.float(), level.sigma.float(), time)
    own = diffusion.denoiser()(x_t, level).x
    torch.testing.assert_close(x, own, rtol=0, atol=1e-5 * max(1.0, float(own.abs().max())))


@pytest.mark.parametrize(
    ("diffusion", "cause"),
    [
        (lambda: vectors(network={"kind": "mlp", "width": 8, "vector": 3}), "with the conditions vector"),
        (lambda: model(target={"name": "posterior"}), "it is posterior, which depends on the next level"),
        (lambda: vectors(calls=2), "a distilled model"),
    ],
)
def test_models_without_such_a_graph_are_refused(diffusion, cause, tmp_path):
    with pytest.raises(ConfigError, match=cause):
        export_torch(diffusion(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_network_that_cannot_be_traced_is_one_line(tmp_path):
    diffusion = vectors()
    diffusion.network.forward = lambda x, *_: x if float(x.sum()) > 0 else -x
    with pytest.raises(ConfigError, match=r"^error\[EXPORT\] model.network: its graph cannot be written \(") as error:
        export_torch(diffusion, tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 500
    assert not (tmp_path / "out").exists()


def test_the_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    checkpoint.save(vectors(), tmp_path / "model.safetensors")
    command = ["export", str(tmp_path / "model.safetensors"), str(tmp_path / "out"), "--format", "onnx"]
    assert main(command) == 2
    assert "Run: pip install 'undiffuse[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
