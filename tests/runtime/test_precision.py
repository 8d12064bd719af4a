"""Which precision the network computes in, and what is computed in float32 all the same."""

import pytest
import torch

from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.model import likelihood_estimators
from undiffuse.model.checkpoint import load, save
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.measurement import measure
from undiffuse.process.ode_integrator import Integrator
from undiffuse.runtime import precision
from undiffuse.runtime.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("native", [False, True])
def test_auto_is_bfloat16_where_the_device_multiplies_in_it(native, monkeypatch):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    expected = "bfloat16" if native else "float32"
    assert resolve_precision("auto", CPU) == resolve_precision("auto", torch.device("cuda")) == expected
    for other in (resolve_precision("auto", torch.device("xpu")), resolve_precision("auto", CPU, dims=3)):
        assert other == "float32"
    for given in ("float32", "bfloat16"):
        assert resolve_precision(given, CPU, dims=3) == resolve_precision(given, torch.device("xpu")) == given
    with pytest.raises(ConfigError, match=r"float16: there is no such precision\. Use auto, float32, bfloat16"):
        resolve_precision("float16", CPU)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights in float32 and in bfloat16."""
    torch.manual_seed(0)
    network = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": ()}
    built = Diffusion(ModelConfig(network=network, chain_length=4), (1, 4, 4), IntegerLevels(5))
    for parameter in built.parameters():
        parameter.data.normal_()
    path = tmp_path_factory.mktemp("models") / "model.safetensors"
    save(built, path)
    assert load(path).precision == load(path, precision="auto").precision == "float32"
    return load(path), load(path, precision="bfloat16")


def test_the_network_of_a_loaded_model_computes_in_bfloat16(models):
    one, other = models
    assert other.precision == "bfloat16"
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    level = one.schedule(torch.tensor(0.5))
    exact, rounded = (model.denoiser()(x, level).x for model in models)
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.1


def test_only_the_flow_of_bfloat16_is_that_of_float32(models, monkeypatch):
    """The flow in equal steps: random weights make adaptive ones many."""
    for integrator in ("TIGHT_TOLERANCE", "LOOSE_TOLERANCE"):
        monkeypatch.setattr(likelihood_estimators, integrator, Integrator("heun", num_steps=3))
    values = torch.randint(5, (3, 1, 4, 4), generator=torch.Generator().manual_seed(2))
    for estimate, equal in (("ode", True), ("discrete", False), ("continuous", False)):
        one, other = (measure(model, values, estimate=estimate).total for model in models)
        assert torch.equal(one, other) is equal
        torch.testing.assert_close(one, other, rtol=0.02, atol=0)
