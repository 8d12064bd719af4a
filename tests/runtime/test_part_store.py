"""The store of finished parts: what is read back, and which parts are refused."""

import pytest
import torch

from undiffuse.errors import CheckpointError
from undiffuse.runtime.atomic_file import json_digest
from undiffuse.runtime.part_store import OTHER_JOB, PartStore

X = torch.arange(6.0)


@pytest.fixture
def store(tmp_path):
    store = PartStore(tmp_path / "parts", "numbers", json_digest({"seed": 1}), "[a-z]")
    store.folder.mkdir()
    store.write("b", {"x": X}, {"seconds": "2.5"})
    store.write("a", {"x": X + 1})
    return store


def test_a_part_is_read_back(store):
    assert store.names() == ["a", "b"]
    tensors, metadata = store.read("b")
    assert torch.equal(tensors["x"], X)
    assert metadata["seconds"] == "2.5"
    with pytest.raises(CheckpointError, match="no such file"):
        store.read("c")
    assert store.get("c", pytest.fail) is None


@pytest.mark.parametrize("harm", ["cut", "flipped", "another plan", "another kind", "renamed"])
def test_unusable_parts(store, harm):
    path = store.path("a")
    whole = path.read_bytes()
    if harm in ("cut", "flipped"):
        path.write_bytes(whole[:-3] if harm == "cut" else whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "renamed":
        path.write_bytes(store.path("b").read_bytes())
    else:
        kind, key = ("numbers", "0") if harm == "another plan" else ("letters", store.key)
        PartStore(store.folder, kind, key, "[a-z]").write("a", {"x": X})
    with pytest.raises(CheckpointError) as raised:
        store.read("a")
    damaged = harm in ("cut", "flipped")
    assert (raised.value.code == OTHER_JOB) != damaged
    messages = []
    assert store.get("a", messages.append) is None
    assert messages == [f"computed again: a.safetensors, {raised.value.cause}"]
    assert path.exists()
    assert store.check(messages.append) == ["b"]
    assert len(messages) == 1 + damaged
    assert not path.exists()


def test_removal_leaves_other_files(store):
    (store.folder / "c.safetensors.partial").touch()
    for name in ("notes.txt", "weights.safetensors", "a.safetensors.old"):
        (store.folder / name).touch()
    assert store.names() == ["a", "b"]
    store.remove()
    assert {path.name for path in store.folder.iterdir()} == {"notes.txt", "weights.safetensors", "a.safetensors.old"}
    for path in store.folder.iterdir():
        path.unlink()
    store.remove()
    assert not store.folder.exists()
    store.remove()
