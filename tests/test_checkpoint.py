import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from undiffuse import checkpoint
from undiffuse.checkpoint import FORMAT, digest, fit_tensors, load, read_tensors, save, write_tensors
from undiffuse.codec import Identity, Pixels, Standardised
from undiffuse.config import ModelConfig
from undiffuse.diffusion import Diffusion, describe
from undiffuse.errors import CheckpointError, ResourceError

NET = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": ()}
INFO = {"name": "tiny", "levels": 5, "notes": ["seen"], "steps": 3}


def model(shape=(1, 4, 4), codec=None, **settings) -> Diffusion:
    torch.manual_seed(0)
    network = NET if len(shape) > 1 else {"kind": "mlp", "width": 4, "depth": 1}
    built = Diffusion(
        ModelConfig(**({"network": network, "steps": 4} | settings)), shape, codec or Pixels(5), dict(INFO)
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_()
    return built


def refused(path, code):
    with pytest.raises(CheckpointError) as caught:
        load(path)
    error = caught.value
    assert (error.code, error.exit_code) == (code, 4)
    assert str(error).startswith(f"error[{code}] {path}")
    assert "\n" not in str(error)
    return str(error)


def rewritten(path: Path, tensors=None, **metadata) -> Path:
    """The file with some tensors or metadata replaced (None: removed), and its sha256 right again."""
    old, described = read_tensors(path)
    described.pop("sha256")
    write_tensors(
        path,
        {k: v for k, v in {**old, **(tensors or {})}.items() if v is not None},
        {k: v for k, v in {**described, **metadata}.items() if v is not None},
    )
    return path


@pytest.fixture
def file(tmp_path):
    save(model(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "diffusion",
    [
        model(),
        model((2,), Standardised((0.1, 1 / 3), (2.0, 1e-9)), loss="bound", variance="learned"),
        model((2, 8), Identity(), schedule={"name": "tabulated", "beta": [0.1, 0.2, 0.3, 0.4]}),
    ],
)
def test_round_trip(diffusion, tmp_path):
    save(diffusion, tmp_path / "model.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors"]  # and nothing partial
    again = load(tmp_path / "model.safetensors")
    assert json.loads(json.dumps(describe(again))) == json.loads(json.dumps(describe(diffusion)))
    assert (again.codec, again.item_shape, again.info) == (diffusion.codec, diffusion.item_shape, INFO)
    assert again.steps == 4
    for name, tensor in diffusion.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor)
    assert not again.training
    assert torch.equal(again.sample(3, seed=1, steps=4), diffusion.sample(3, seed=1, steps=4))
    assert torch.equal(load(tmp_path).sample(3, seed=1, steps=4), again.sample(3, seed=1, steps=4))  # by its folder
    assert load(str(tmp_path)).dims == diffusion.dims


def test_saving_again_replaces_and_a_failure_leaves_the_old_one(file, monkeypatch):
    changed = model()
    changed.info["steps"] = 8
    save(changed, file)
    assert load(file).info["steps"] == 8
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    other = model()
    other.info["steps"] = 9
    with pytest.raises(ResourceError, match=rf"^error\[DISK\] {file}: its [0-9,]+ bytes .*No space") as caught:
        save(other, file)
    assert caught.value.exit_code == 6
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]  # the room is given back


def test_a_file_of_format_1_is_read(file):
    tensors, metadata = read_tensors(file)
    old = {"undiffuse": "1", "model": metadata["model"]}
    save_file(tensors, file, metadata={**old, "sha256": digest(tensors, old)})
    assert load(file).info == INFO


def test_nothing_there(tmp_path):
    assert "no such file" in refused(tmp_path / "none.safetensors", "NOT_FOUND")
    assert "Name a run folder" in refused(tmp_path, "NO_MODEL")
    (tmp_path / "checkpoints").mkdir()
    assert "train on" in refused(tmp_path, "NO_MODEL")
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "NO_MODEL")


def test_every_truncation_and_every_flipped_bit_is_seen(file):
    whole = file.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for size in (0, 4, 8, 9, header // 2, header + 7, header + 8, len(whole) - 4, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(file, "DAMAGED")
    g = torch.Generator().manual_seed(0)
    places = [*range(8), *torch.randint(8, len(whole), (400,), generator=g).tolist()]
    places += [
        whole.index(part) for part in (b"undiffuse", b"sha256", b"model", b"levels", b'high\\": ') if part in whole
    ]
    codes = set()
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(torch.randint(8, (), generator=g))
        file.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            load(file)
        codes.add(caught.value.code)
    assert codes <= {"DAMAGED", "NOT_OURS", "FORMAT"}
    file.write_bytes(whole)
    load(file)


def test_the_description_is_under_the_sha256(file):
    whole = file.read_bytes()
    assert whole.count(b'\\"steps\\": 4') == 1
    file.write_bytes(whole.replace(b'\\"steps\\": 4', b'\\"steps\\": 5'))
    assert "its own sha256" in refused(file, "DAMAGED")


def test_other_files(file, tmp_path):
    save_file({"weight": torch.ones(2)}, file)
    assert "not written by undiffuse" in refused(file, "NOT_OURS")
    save_file({"weight": torch.ones(2)}, file, metadata={"format": "pt", "model": "{}"})
    refused(file, "NOT_OURS")
    save(model(), file)
    refused(rewritten(file, model=None), "NOT_OURS")
    save(model(), file)
    assert "Update undiffuse" in refused(rewritten(file, undiffuse=str(FORMAT + 1)), "FORMAT")
    save(model(), file)
    refused(rewritten(file, undiffuse="state"), "NOT_OURS")
    file.write_bytes(b"GIF89a" + bytes(100))
    refused(file, "DAMAGED")


@pytest.mark.parametrize(
    ("change", "code", "cause"),
    [
        ({"leave.bias": None}, "TENSOR", "'leave.bias' is missing"),
        ({"more": torch.zeros(1)}, "TENSOR", "'more' does not belong"),
        ({"leave.bias": torch.zeros(2)}, "TENSOR", "'leave.bias' has the shape (2,), not (1,)"),
        ({"leave.bias": torch.zeros(1, 1)}, "TENSOR", "the shape (1, 1), not (1,)"),
        ({"leave.bias": torch.tensor([float("nan")])}, "NON_FINITE", "'leave.bias'"),
        ({"leave.bias": torch.tensor([float("-inf")])}, "NON_FINITE", "'leave.bias'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(file, change, code, cause):
    assert cause in refused(rewritten(file, change), code)


def test_fitting_is_by_name():
    fit_tensors(Path("x"), {"a": torch.zeros(2)}, {"a": torch.ones(2)})


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[]",
        "3",
        '"' + "a" * 10,
        "[" * 20_000,
        lambda d: d.pop("codec"),
        lambda d: d.update(codec=[]),
        lambda d: d.update(codec={"kind": "best"}),
        lambda d: d.update(config=[]),
        lambda d: d["config"].update(new=1),
        lambda d: d["config"].update(steps="4"),
        lambda d: d["config"].update(target={"name": "best"}),
        lambda d: d["config"].update(network={"kind": "unet", "widths": [-4]}),
        lambda d: d.update(item_shape=[]),
        lambda d: d.update(item_shape=["a", 4, 4]),
        lambda d: d.update(item_shape=4),
        lambda d: d.update(info=7),
    ],
)
def test_descriptions_that_make_no_model(file, change):
    text = change
    if callable(change):
        plain = json.loads(read_tensors(file)[1]["model"])
        change(plain)
        text = json.dumps(plain)
    assert "not one that this version understands" in refused(rewritten(file, model=text), "DESCRIPTION")


class Canary:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_nothing_in_a_file_is_ever_run(tmp_path, kind):
    canary, file = tmp_path / "canary", tmp_path / "model.safetensors"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Canary(canary)))
    else:
        torch.save({"weight": Canary(canary)}, file)
    refused(file, "DAMAGED")
    refused(tmp_path / "model.safetensors", "DAMAGED")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # the canary sings where it is let
