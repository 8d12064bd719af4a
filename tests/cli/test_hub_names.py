"""hf:OWNER/NAME in commands, on a hub on this machine."""

from pathlib import Path

import fake_hub
import numpy as np
import pytest
import torch
import typer
from tiny_run import ITEM_SHAPE

from undiffuse.cli.app import app
from undiffuse.data.transform import IntegerLevels
from undiffuse.model import checkpoint
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.runtime import hub as hub_names


@pytest.fixture
def model():
    torch.manual_seed(0)
    settings = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": ()}
    config = ModelConfig(network=settings, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=5)
    return Diffusion(config, ITEM_SHAPE, IntegerLevels(5), {"num_values": 5})


@pytest.fixture
def hub(tmp_path, monkeypatch, model):
    """A hub with a model, and an empty working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with fake_hub.served(tmp_path / "cache") as hub:
        model.push_to_hub("me/tiny")
        yield hub


def test_commands_take_a_name_and_write_into_runs(hub, call, tmp_path):
    here, cache = tmp_path / "here", tmp_path / "cache"
    code, out, err = call("inspect", "hf:me/tiny")
    assert (code, err) == (0, "")
    assert "1×4×4, 5 values" in out
    assert not list(here.iterdir())
    downloaded = set(cache.rglob("*"))
    code, out, err = call("sample", "hf:me/tiny", "--n", 2, "--steps", 2)
    assert (code, err) == (0, "")
    assert [path.relative_to(here).parts[:3] for path in here.rglob("samples.npz")] == [("runs", "me--tiny", "samples")]
    np.save("items.npy", np.random.default_rng(0).integers(5, size=(20, 1, 4, 4)).astype(np.uint8))
    few = ("--estimate", "discrete", "--items", 4, "--mc-samples", 2)
    code, out, err = call("evaluate", "hf:me/tiny", "items.npy", "--num-values", 5, *few)
    assert (code, err) == (0, "")
    assert (here / "runs" / "me--tiny" / "evaluation.json").is_file()
    assert set(cache.rglob("*")) == downloaded


def test_share(hub, call, tmp_path, model):
    file, folder = tmp_path / "m.safetensors", tmp_path / "folder"
    checkpoint.save(model, file)
    code, out, err = call("share", file, "hf:me/new", "--license", "mit", "--private")
    assert (code, err) == (0, "")
    assert "/me/new/commit/" in out
    assert b"license: mit" in hub.files("me/new")["README.md"]
    hub.put("me/new", **{"README.md": b"mine"})
    code, out, err = call("share", file, "hf:me/new")
    line = "its README.md was edited. Give --card keep to leave it as it is, or --card replace."
    assert (code, out, err) == (2, "", f"error[HUB_CARD] hf:me/new: {line}\n")
    hub.requests.clear()
    code, out, err = call("share", file, folder)
    assert (code, err) == (0, "")
    assert f"next: undiffuse inspect {folder}\n" in out
    (folder / "README.md").write_text("mine")
    for arguments, words in (
        ([folder, "--private"], "error[USAGE] --private: it is for a repository of the hub"),
        ([folder], f"error[OUT] {folder}: its README.md is damaged, edited or not ours"),
    ):
        code, _, err = call("share", file, *arguments)
        assert (code, err[: len(words)]) == (2, words)
    assert hub.requests == []


def test_errors_are_one_line(hub, call):
    hub.put("me/empty", **{"README.md": b""})
    for name, code, words in (
        ("hf:me/none", 4, "error[HUB] hf:me/none: the hub has no such repository"),
        ("hf:me", 2, "error[HUB_NAME] hf:me: this is not the name of a model on the hub"),
        ("hf:me/tiny@v3", 4, "error[HUB] hf:me/tiny@v3: its repository has no revision 'v3'"),
        ("hf:me/empty", 4, "error[HUB] hf:me/empty: its repository has no model.safetensors"),
        ("me/tiny", 4, "error[NOT_FOUND] me/tiny: no such file"),
    ):
        hub.requests.clear()
        ended, out, err = call("inspect", name)
        assert (ended, out) == (code, "")
        assert err.startswith(words)
        assert err.count("\n") == 1
        assert bool(hub.requests) == (code == 4 and name.startswith("hf:"))


MODELS = {"RUN", "[RUN]...", "--then", "--init", "--autoencoder", "--classifier", "--autoguide"}
ONLY_FOLDERS = {"watch", "ema"}
"""Commands about the files of training, which are not on the hub."""


def test_every_model_of_a_command_may_be_on_the_hub(monkeypatch):
    monkeypatch.setattr(hub_names, "download", lambda name: Path(name.repo) / "model.safetensors")
    found = set()
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            named = {parameter.metavar, *parameter.opts} & MODELS
            if named and name not in ONLY_FOLDERS:
                found |= named
                given = ["hf:me/tiny"] if parameter.multiple or parameter.nargs == -1 else "hf:me/tiny"
                for completing, folder in ((False, "me/tiny"), (True, "hf:me/tiny")):  # completion makes no request
                    context = typer.Context(command, resilient_parsing=completing)
                    result = parameter.callback(context, parameter, given)
                    assert str(result[0] if isinstance(result, list) else result) == folder
    assert found == MODELS
