"""``--network FILE.py:NAME``: a user's own class on the command line."""

import re

import numpy as np
import pytest

from undiffuse.cli import main
from undiffuse.errors import ConfigError
from undiffuse.model import checkpoint
from undiffuse.networks import registry

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, channels, out_channels, classes=0, side=3):
        super().__init__()
        self.layer = nn.Conv2d(channels, out_channels, side, padding=side // 2)

    def forward(self, x, time, cond=None):
        return self.layer(x) + time[:, None, None, None] / 100
"""


@pytest.fixture(autouse=True)
def kinds():
    """Forgets the kinds that a command registers."""
    before = dict(registry.NETWORKS)
    yield
    registry.NETWORKS.clear()
    registry.NETWORKS.update(before)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a network and data in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "wrong.py").write_text("x = 1")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).integers(5, size=(40, 1, 4, 4), dtype=np.uint8))
    return tmp_path


def test_a_class_in_a_file_is_trained_and_inspected(folder, capsys):
    train = "train data.npy --num-values 5 --out run --steps 1 --device cpu --network net.py:Net"
    assert main(train.split()) == 0
    assert "undiffuse sample run --network net.py:Net" in capsys.readouterr().out
    del registry.NETWORKS["Net"]
    assert main(["inspect", "run"]) == 4
    assert "Give the class: load(path, network=Net), or --network FILE.py:Net" in capsys.readouterr().err
    assert main(["inspect", "run", "--network", "net.py:Net"]) == 0
    assert re.search(r"network +Net", capsys.readouterr().out)


def test_a_table_without_a_kind_sets_the_settings_of_the_class(folder, capsys):
    train = "train data.npy --num-values 5 --out run --steps 1 --device cpu --network net.py:Net --config my.toml"
    (folder / "my.toml").write_text("[train]\npreviews = 0\n[model.network]\nsid = 5")
    assert main(train.split()) == 2
    assert "network.sid: a network of kind 'Net' has no such setting" in capsys.readouterr().err
    (folder / "my.toml").write_text("[train]\npreviews = 0\n[model.network]\nside = 5")
    assert main(train.split()) == 0
    assert checkpoint.load("run").config.network == {"kind": "Net", "side": 5}


READING = ["sample run", "evaluate run data.npy", "inspect run"]


@pytest.mark.parametrize("command", READING)
def test_the_class_is_registered_before_a_model_is_loaded(command, folder, capsys, monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise ConfigError("LOADED", ",".join(registry.NETWORKS), "", "")

    monkeypatch.setattr(checkpoint, "load", load)
    assert main([*command.split(), "--network", "net.py:Net"]) == 2
    assert "error[LOADED]" in (error := capsys.readouterr().err)
    assert ",Net:" in error


@pytest.mark.parametrize("command", ["train data.npy --num-values 5 --steps 1", *READING])
def test_a_file_without_the_class_is_an_error_before_anything_else(command, folder, capsys):
    assert main([*command.split(), "--network", "wrong.py:Net"]) == 2
    assert capsys.readouterr().err == "error[NETWORK] wrong.py:Net: the file has no 'Net'. Name a class of the file.\n"
    assert not (folder / "run").exists()
