"""What `doctor` prints, and the facts it is made of."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from undiffuse.cli import doctor
from undiffuse.model import presets
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.runtime import environment
from undiffuse.training.step_time import seconds_per_step

NETWORK = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
RECIPE = Config(ModelConfig(network=NETWORK, chain_length=5), TrainConfig(batch=4))


@pytest.fixture(autouse=True)
def tiny_recipes(monkeypatch):
    monkeypatch.setattr(presets, "get", lambda name: RECIPE)


def test_it_names_versions_machine_and_what_is_missing(call, monkeypatch):
    absent = environment.Feature("soundings", ("json", "no_such_module"), "sound")
    monkeypatch.setattr(environment, "FEATURES", (*environment.FEATURES, absent))
    said = call("doctor", "--device", "cpu")
    assert (said.code, said.err) == (0, "")
    for text in (
        version("torch"),
        "device of training",
        "cpu, precision",
        "a step of digits",
        "items of 1×8×8 a second",
    ):
        assert text in said.out, said.out
    assert "missing: no_such_module. Run: pip install 'undiffuse[sound]'" in said.out
    facts = json.loads(call("doctor", "--device", "cpu", "--json").out)
    assert facts["torch"] == version("torch")
    assert facts["step_seconds"].keys() == doctor.TIMED.keys()
    assert facts["memory_bytes"]["usable"] <= facts["memory_bytes"]["total"]
    assert set(doctor.TIMED) <= set(presets.PRESETS)


def test_a_device_that_is_not_here_is_an_error(call):
    said = call("doctor", "--device", "cuda:77")
    assert said.code != 0
    assert said.err.startswith("error[DEVICE]")


def test_every_feature_names_an_extra_that_installs_its_modules():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for feature in environment.FEATURES:
        assert feature.extra in extras
        assert feature.missing == [m for m in feature.modules if m in feature.missing]
    for package in environment.CORE_PACKAGES:
        assert any(package in dependency for dependency in project["dependencies"])
    assert environment.package_versions(("no-such-package",))["no-such-package"] == "not installed"


def test_the_time_of_a_step_is_the_median_after_the_first_and_touches_no_random_state():
    times = iter([0, 100, 100, 101, 101, 104, 104, 106])  # the first step takes 100 s, then 1, 3 and 2
    torch.manual_seed(5)
    seconds = seconds_per_step(RECIPE, (1, 4, 4), 256, torch.device("cpu"), clock=lambda: next(times))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert seconds == 2
    assert torch.equal(drawn, torch.rand(3))


def test_a_timed_step_has_the_memory_layout_and_the_parts_of_training(monkeypatch):
    recipe = Config(ModelConfig({**NETWORK, "norm": "layer"}, chain_length=5), TrainConfig(batch=4, accumulate=2))
    seen, real = [], Diffusion.loss

    def loss(model, values, *arguments):
        weights = [w for w in model.network.parameters() if w.ndim == 4 and min(w.shape[1:]) > 1]
        seen.append((len(values), all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)))
        return real(model, values, *arguments)

    monkeypatch.setattr(Diffusion, "loss", loss)
    seconds_per_step(recipe, (1, 4, 4), 256, torch.device("cpu"))
    assert seen == [(2, True)] * 8


def test_every_extra_that_a_message_names_is_a_feature():
    source = "".join(path.read_text() for path in Path(environment.__file__).parent.parent.rglob("*.py"))
    named = set(re.findall(r"pip install '[^'\[]*\[([a-z]+)\]'", source))
    assert named - {feature.extra for feature in environment.FEATURES} == set()
    assert "parity" in named
