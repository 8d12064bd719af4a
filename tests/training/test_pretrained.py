"""Models in folders and on the hub: what is written, read and refused, with a hub on this machine."""

import json
import logging
import socket
import sys

import fake_hub
import pytest
import torch
from tiny_run import data, quick_looks, recipe, train

import undiffuse
from undiffuse import Diffusion
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.model import checkpoint
from undiffuse.report import model_card
from undiffuse.runtime import hub as names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps."""
    with quick_looks():
        return train(recipe(2), tmp_path_factory.mktemp("run") / "run", data())


@pytest.fixture
def model(run):
    return undiffuse.load(run)


@pytest.fixture
def hub(tmp_path):
    with fake_hub.served(tmp_path / "cache") as hub:
        yield hub


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError(f"a connection to {arguments}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def equal(one, other):
    return checkpoint.fingerprint(one) == checkpoint.fingerprint(other)


def test_a_folder_has_the_model_and_its_card(model, run, tmp_path, no_network):
    folder = model.save_pretrained(tmp_path / "new" / "saved", license="mit")
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "README.md"}
    for source in (folder, str(folder), folder / "model.safetensors"):
        assert equal(Diffusion.from_pretrained(source), model)
    text = (folder / "README.md").read_text()
    fingerprint = json.loads((run / "run.json").read_text())["data"]["fingerprint"]
    assert "license: mit" in text
    assert f"| fingerprint | {fingerprint} |" in text
    assert "undiffuse train DATA --config recipe.json --seed 4 --network FILE.py:NAME --out NEW" in text
    assert '"max_steps": 2' in text
    assert "from_pretrained('saved', network=tiny)" in text
    assert "undiffuse sample saved --n 16 --network FILE.py:tiny" in text


def test_a_license_is_one_word(model, tmp_path):
    for wrong in ("mit\nevil: 1", "", "a b"):
        with pytest.raises(ConfigError, match=r"LICENSE.*is not the name of a license\. Give one of the hub"):
            model.save_pretrained(tmp_path / "saved", license=wrong)
    assert not (tmp_path / "saved").exists()


def test_the_card_in_the_working_folder_has_its_name(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"from_pretrained('{tmp_path.name}'" in (model.save_pretrained(".") / "README.md").read_text()


def test_a_model_of_other_weights_has_no_results_of_the_run(model, tmp_path):
    with torch.no_grad():
        next(model.network.parameters()).add_(1)
    text = (model.save_pretrained(tmp_path / "saved") / "README.md").read_text()
    assert "Repeat it" not in text


def test_own_files_are_replaced_and_no_others(model, run, tmp_path):
    folder = model.save_pretrained(tmp_path / "saved")
    first = (folder / "README.md").read_bytes()
    (folder / "notes.txt").write_text("mine")
    model.info["name"] = "another"
    model.save_pretrained(folder)
    assert (folder / "README.md").read_bytes() != first
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "README.md").unlink()  # as a process leaves it that is killed before it writes the card
    (folder / "notes.txt").unlink()
    model.save_pretrained(folder)
    assert undiffuse.load(folder).info["name"] == "another"
    for name, content in (("README.md", "edited"), ("model.safetensors", "of the user")):
        saved = model.save_pretrained(tmp_path / name)
        (saved / name).write_text(content)
        with pytest.raises(ConfigError, match="Name a new folder"):
            model.save_pretrained(saved)
        assert (saved / name).read_text() == content
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    model.info["name"] = "a third"
    with pytest.raises(ConfigError, match="not written by this command"):
        model.save_pretrained(run)
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


@pytest.mark.parametrize("source", ["owner/name", "missing", "./hf:owner/name", "hf", "folder/"])
def test_a_path_is_never_looked_up_on_the_hub(source, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for module in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(CheckpointError) as error:
        Diffusion.from_pretrained(source)
    assert error.value.code in ("NOT_FOUND", "NO_MODEL")
    assert ("hf:owner/name for one on the hub" in str(error.value)) == (source == "owner/name")
    assert "huggingface_hub" not in sys.modules


def test_push_and_load(model, hub):
    address = model.push_to_hub("me/digits", license="mit")
    assert address.endswith(f"/me/digits/commit/{hub.commit_of('me/digits', 0)}")
    files = hub.files("me/digits")
    assert files.keys() == {"model.safetensors", "README.md"}
    assert b"undiffuse sample hf:me/digits --n 16" in files["README.md"]
    hub.requests.clear()
    loaded = Diffusion.from_pretrained("hf:me/digits")
    assert equal(loaded, model)
    assert hub.requests == [f"{verb} /me/digits/resolve/main/model.safetensors" for verb in ("HEAD", "GET")]
    hub.requests.clear()
    Diffusion.from_pretrained("hf:me/digits")  # only asks whether it is the newest
    assert hub.requests == ["HEAD /me/digits/resolve/main/model.safetensors"]


def test_a_revision(model, hub):
    model.push_to_hub("me/digits")
    model.info["name"] = "newer"
    model.push_to_hub("hf:me/digits")
    first = hub.commit_of("me/digits", 0)
    assert Diffusion.from_pretrained("hf:me/digits").info["name"] == "newer"
    assert Diffusion.from_pretrained(f"hf:me/digits@{first}").info["name"] == "tiny"
    with pytest.raises(CheckpointError, match="no revision 'v2'"):
        Diffusion.from_pretrained("hf:me/digits@v2")


def test_an_edited_card_on_the_hub_is_kept_or_replaced_on_request(model, hub):
    model.push_to_hub("me/digits")
    hub.put("me/digits", **{"README.md": b"mine"})
    with pytest.raises(ConfigError, match="was edited"):
        model.push_to_hub("me/digits")
    model.info["name"] = "newer"
    model.push_to_hub("me/digits", card="keep")
    assert hub.files("me/digits")["README.md"] == b"mine"
    assert Diffusion.from_pretrained("hf:me/digits").info["name"] == "newer"
    model.push_to_hub("me/digits", card="replace")
    with pytest.raises(ConfigError, match="no such choice"):
        model.push_to_hub("me/digits", card="burn")
    assert model_card.described_model(hub.files("me/digits")["README.md"].decode())


@pytest.mark.parametrize(
    "name", ["hf:", "hf:digits", "hf:a/b/c", "hf:../x", "hf:a/..", "hf:a/b@", "hf:a/b@../../x", "hf:a--b/c", "hf:a/b c"]
)
def test_wrong_names(name, model, no_network):
    for use in (lambda: Diffusion.from_pretrained(name), lambda: model.push_to_hub(name)):
        with pytest.raises(ConfigError) as error:
            use()
        assert error.value.code == "HUB_NAME"


def test_what_is_not_there_is_one_line(model, hub):
    with pytest.raises(CheckpointError, match="no such repository"):
        Diffusion.from_pretrained("hf:me/missing")
    hub.put("me/text", **{"README.md": b"words"})
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        Diffusion.from_pretrained("hf:me/text")
    hub.put("me/other", **{"model.safetensors": b"words"})
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        Diffusion.from_pretrained("hf:me/other")
    hub.status = 403
    with pytest.raises(ResourceError, match=r"not reached|refuses") as error:
        model.push_to_hub("me/digits")
    assert "\n" not in str(error.value)


def test_offline(model, hub, monkeypatch):
    from huggingface_hub import constants

    model.push_to_hub("me/digits")
    Diffusion.from_pretrained("hf:me/digits")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert equal(Diffusion.from_pretrained("hf:me/digits"), model)  # downloaded already
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE is set"):
        Diffusion.from_pretrained("hf:me/missing")
    with pytest.raises(ResourceError, match="HF_HUB_OFFLINE is set"):
        model.push_to_hub("me/digits")
    assert hub.requests == []


def test_a_hub_that_is_not_there_is_one_line(model, hub, monkeypatch):
    from huggingface_hub import constants

    lines = []
    handler = logging.Handler()
    handler.emit = lines.append
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [handler])

    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ResourceError, match="the hub is not reached"):
        Diffusion.from_pretrained("hf:me/digits")
    with pytest.raises(ResourceError, match="the transfer failed"):
        model.push_to_hub("me/digits", card="replace")
    assert lines == []


def test_a_file_that_a_repository_lacks_is_named(hub, model):
    model.push_to_hub("me/digits")
    with pytest.raises(CheckpointError, match=r"hf:me/digits: its repository has no other\.json"):
        names.download(names.parse_name("hf:me/digits"), "other.json")


def test_the_name_of_a_folder_in_the_cache(hub, model):
    model.push_to_hub("me/digits")
    folder = names.download(names.parse_name("hf:me/digits")).parent
    assert names.snapshot_name(folder) == "me--digits"
    assert names.snapshot_name(folder.parent.parent) is None
