"""Kinds of networks: settings that are refused, registered classes, a user's own file."""

import subprocess
import sys

import pytest
import torch
from network_cases import DIFFUSERS, PACKAGE, SIZES, SMALL, SONG, TRANSFORMER
from torch import nn

from undiffuse.errors import ConfigError
from undiffuse.networks import registry
from undiffuse.networks.mlp import MLP
from undiffuse.networks.registry import build, kind_of, load_class, network_settings, register
from undiffuse.networks.unet import UNet

WRONG = [
    ("transformer", {"channels": 1}, "kind"),
    ("unet", {"channels": 1, "widht": 3}, "widht"),
    ("unet", {}, "channels"),
    ("unet", {"channels": 0}, "channels"),
    ("unet", {"channels": True}, "channels"),
    ("unet", {"channels": 1, "out_channels": 0}, "out_channels"),
    ("unet", {"channels": 1, "dims": 4}, "dims"),
    ("unet", {"channels": 1, "widths": ()}, "widths"),
    ("unet", {"channels": 1, "widths": "64"}, "widths"),
    ("unet", {"channels": 1, "widths": 64}, "widths"),
    ("unet", {"channels": 1, "widths": (8, -8)}, "widths"),
    ("unet", {"channels": 1, "blocks": 0}, "blocks"),
    ("unet", {"channels": 1, "attention": (2,)}, "attention"),
    ("unet", {"channels": 1, "attention": (-1,)}, "attention"),
    ("unet", {"channels": 1, "heads": 5}, "heads"),
    ("unet", {"channels": 1, "heads": 0}, "heads"),
    ("unet", {"channels": 1, "patch": 1.5}, "patch"),
    ("unet", {"channels": 1, "dropout": 1.0}, "dropout"),
    ("unet", {"channels": 1, "classes": -1}, "classes"),
    ("unet", {"channels": 1, "time_width": 0}, "time_width"),
    ("unet", {"channels": 1, "fourier": (-1,)}, "fourier"),
    ("unet", {"channels": 1, "norm": "batch"}, "norm"),
    ("unet", {"channels": 1, "vector": -1}, "vector"),
    ("unet", {"channels": 1, "tokens": 0.5}, "tokens"),
    ("mlp", {"channels": 1, "vector": True}, "vector"),
    ("mlp", {"channels": 1, "tokens": -1}, "tokens"),
    ("mlp", {"channels": 1, "width": 0}, "width"),
    ("mlp", {"channels": 1, "dims": 2}, "dims"),
    ("mlp", {"channels": 1, "dropout": "much"}, "dropout"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "where"), WRONG, ids=[f"{k}-{w}-{i}" for i, (k, _, w) in enumerate(WRONG)]
)
def test_settings_that_cannot_work_are_refused_by_name(kind, settings, where):
    with pytest.raises(ConfigError) as caught:
        build(kind, **settings)
    assert caught.value.where == f"network.{where}"
    assert "\n" not in str(caught.value)


class Plain(nn.Module):
    def __init__(self, channels: int, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(channels, width)


class Declaring(Plain):
    def __init__(self, channels: int = 2, width: int = 3, classes: int = 0) -> None:
        super().__init__(channels, width)
        self.settings, self.condition_sizes = {"width": width}, {"classes": classes, "tokens": 0}


@pytest.fixture
def kinds(monkeypatch):
    """The table of kinds, restored after the test."""
    monkeypatch.setattr(registry, "NETWORKS", dict(registry.NETWORKS))


def test_a_registered_class_is_a_kind(kinds):
    register("plain", Plain)
    built = build("plain", channels=2, width=5)
    assert isinstance(built, Plain)
    assert built.layer.weight.shape == (5, 2)
    with pytest.raises(ConfigError, match=r"network\.depth: a network of kind 'plain' has no such setting"):
        build("plain", channels=2, depth=1)
    with pytest.raises(
        ConfigError, match=r"network\.text: a network of kind 'plain' cannot be conditioned on captions"
    ):
        build("plain", channels=2, text=64)
    with pytest.raises(ConfigError, match=r"network\.channels: a network of kind 'plain' needs this setting"):
        build("plain")
    register("plain", Declaring)  # as a notebook does that runs a cell again
    assert isinstance(build("plain"), Declaring)


@pytest.mark.parametrize(
    ("name", "cls", "cause"),
    [
        ("new", 3, "3 is not a subclass of nn.Module"),
        ("new", Plain(1), "is not a subclass of nn.Module"),
        ("new", dict, "is not a subclass of nn.Module"),
        ("unet", Plain, "this is a built-in kind of network"),
    ],
)
def test_what_cannot_be_registered(kinds, name, cls, cause):
    with pytest.raises(ConfigError, match=cause):
        register(name, cls)
    register("unet", UNet)


def test_a_checkpoint_records_the_registered_name_of_what_can_be_rebuilt(kinds):
    assert [kind_of(network) for network in (MLP, MLP(2), Plain, Plain(1), Declaring(1))] == [
        *("mlp", "MLP", "Plain", "Plain", "Declaring")
    ]
    register("own", Declaring)
    assert [kind_of(network) for network in (Declaring, Declaring(1))] == ["own", "own"]


def test_settings_of_a_configuration_are_kept_for_their_own_kind():
    settings = {"kind": "Plain", "width": 7}
    assert network_settings(Plain, settings) == settings
    assert network_settings(Declaring, settings) == {"kind": "Declaring"}
    assert network_settings(Plain, {"width": 7}) == {"width": 7, "kind": "Plain"}
    assert network_settings(Plain(1), {"kind": "unet", "widths": [8]}) == {"kind": "Plain"}
    assert network_settings(Declaring(1, 5, 4), settings) == {"kind": "Declaring", "width": 5, "classes": 4}
    assert network_settings(Declaring(1, 5), {"width": 5}) == {"kind": "Declaring", "width": 5}


@pytest.mark.parametrize(
    ("instance", "settings", "cause"),
    [
        (Plain(1), {"kind": "Plain", "classes": 3}, "the condition 'classes' of size 3"),
        (Declaring(classes=4), {"kind": "Declaring", "classes": 3}, "the condition 'classes' of size 3"),
        (Declaring(width=4), {"width": 3}, "the setting 'width' is for a class, and this network is built already"),
        (Declaring(width=torch.tensor(3)), {}, "its settings are not plain data"),  # type: ignore[arg-type]
    ],
)
def test_instances_whose_declarations_do_not_fit(instance, settings, cause):
    with pytest.raises(ConfigError, match=cause):
        network_settings(instance, settings)


class Failing(nn.Module):
    def __init__(self, channels: int) -> None:
        raise RuntimeError("no\nluck")


def test_a_constructor_that_fails_is_one_line(kinds):
    register("failing", Failing)
    with pytest.raises(ConfigError, match=r"^error\[NETWORK\] failing: its constructor fails \(RuntimeError") as caught:
        build("failing", channels=1)
    assert "\n" not in str(caught.value)


class Stubborn(Plain):
    """Cannot be built on the meta device."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.start = float(self.layer.weight.sum())


def test_a_class_that_cannot_be_built_without_storage_is_built(kinds):
    register("stubborn", Stubborn)
    assert build("stubborn", channels=2).start != 0


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn
from beside import WIDTH

@dataclass
class Settings:
    width: int = WIDTH

class Net(nn.Module):
    pass

number = 3
"""


def test_a_file_is_run_for_its_class(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("WIDTH = 5")
    before = list(sys.path)
    cls = load_class(f"{tmp_path}/own.py:Net")
    assert issubclass(cls, nn.Module)
    assert cls.__name__ == "Net"
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "content", "cause"),
    [
        ("own.py", "", "this is not FILE.py:NAME"),
        ("own:Net", "", "this is not FILE.py:NAME"),
        ("own.py:a.b", "", "this is not FILE.py:NAME"),
        ("none.py:Net", "", "there is no file"),
        ("own.py:Net", "x = (", r"running the file fails \(SyntaxError"),
        ("own.py:Net", "import nothing_such", r"running the file fails \(ModuleNotFoundError"),
        ("own.py:Net", "raise SystemExit('no foo')", r"running the file fails \(SystemExit: no foo"),
        ("own.py:Net", "x = 1", "the file has no 'Net'"),
        ("own.py:Net", "Net = 1", "'Net' is not a subclass of nn.Module"),
        ("own.py:Net", "class Net: pass", "'Net' is not a subclass of nn.Module"),
    ],
)
def test_files_without_a_network_are_one_line(tmp_path, text, content, cause):
    (tmp_path / "own.py").write_text(content)
    with pytest.raises(ConfigError, match=cause) as caught:
        load_class(f"{tmp_path}/{text}")
    assert str(caught.value).startswith(f"error[NETWORK] {tmp_path}/{text}: ")
    assert "\n" not in str(caught.value)


CONDITIONED = {
    "unet": SMALL | SIZES,
    "dit": TRANSFORMER | SIZES,
    "mlp": {"width": 16} | SIZES,
    "diffusers-unet": DIFFUSERS | {"classes": 3},
    "denoising-diffusion-unet": PACKAGE | {"classes": 3},
    "edm-unet": SONG | {"classes": 3},
}


def test_a_network_is_built_without_the_compiler_of_torch():
    """Its import takes over a second of each command that loads a model."""
    assert list(CONDITIONED) == [kind for kind, _ in registry.BUILT_IN]
    code = f"""
import sys
from undiffuse.networks.registry import build
for kind, settings in {CONDITIONED!r}.items():
    build(kind, channels=2, **settings)
    assert "torch._dynamo" not in sys.modules, kind
"""
    subprocess.run([sys.executable, "-c", code], check=True)
