import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from latent_models import tiny_latent_model
from safetensors.torch import save_file

from undiffuse import load_data
from undiffuse.cli import main
from undiffuse.data.transform import Identity, IntegerLevels, Standardized
from undiffuse.errors import CheckpointError, DataError, ResourceError
from undiffuse.model.checkpoint import describe, load, save
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.runtime import tensor_file
from undiffuse.runtime.tensor_file import FORMAT, check_tensors, read_tensors, write_tensors
from undiffuse.sampling.sampler import Sampler

NET = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": ()}
INFO = {"name": "tiny", "num_values": 5, "notes": ["sorted"], "steps": 3}


def model(shape=(1, 4, 4), transform=None, **settings) -> Diffusion:
    torch.manual_seed(0)
    network = NET if len(shape) > 1 else {"kind": "mlp", "width": 4, "depth": 1}
    config = ModelConfig(**({"network": network, "chain_length": 4} | settings))
    built = Diffusion(config, shape, transform or IntegerLevels(5), dict(INFO))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_()
    return built


def load_error(path, code):
    """The one-line message of the `CheckpointError` of that ``code``."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    error = caught.value
    assert (error.code, error.exit_code) == (code, 4)
    assert str(error).startswith(f"error[{code}] {path}")
    assert "\n" not in str(error)
    return str(error)


def rewritten(path: Path, tensors=None, **metadata) -> Path:
    """The file with some tensors or metadata replaced (None: removed), and a matching sha256."""
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
        model((2,), Standardized((0.1, 1 / 3), (2.0, 1e-9)), loss="bound", variance="learned"),
        model((2, 8), Identity(), schedule={"name": "tabulated", "beta": [0.1, 0.2, 0.3, 0.4]}),
    ],
)
def test_round_trip(diffusion, tmp_path):
    save(diffusion, tmp_path / "model.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors"]  # no partial file
    again = load(tmp_path / "model.safetensors")
    assert json.loads(json.dumps(describe(again))) == json.loads(json.dumps(describe(diffusion)))
    assert (again.transform, again.item_shape, again.info) == (diffusion.transform, diffusion.item_shape, INFO)
    assert again.chain_length == 4
    for name, tensor in diffusion.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor)
    assert not again.training
    assert torch.equal(
        again.sample(3, seed=1, sampler=Sampler(num_steps=4)), diffusion.sample(3, seed=1, sampler=Sampler(num_steps=4))
    )
    by_folder = load(str(tmp_path))
    assert by_folder.dims == diffusion.dims
    assert all(torch.equal(one, two) for one, two in zip(by_folder.parameters(), again.parameters(), strict=True))


def test_a_program_of_float64_by_default_loads_float32(file):
    """A network, and an autoencoder in a model of latents; the default of the program stays, also after an error."""
    save(tiny_latent_model(), file.parent / "latent.safetensors")
    save(model(), file.parent / "bad.safetensors")
    rewritten(file.parent / "bad.safetensors", model="{}")
    torch.set_default_dtype(torch.float64)
    try:
        loaded = [load(file.parent / name) for name in ("model.safetensors", "latent.safetensors")]
        load_error(file.parent / "bad.safetensors", "DESCRIPTION")
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert [again.dtype for again in loaded] == [torch.float32] * 2
    assert loaded[1].transform.autoencoder.dtype == torch.float32


def test_saving_again_replaces_and_a_failure_leaves_the_old_one(file, monkeypatch):
    changed = model()
    changed.info["steps"] = 8
    save(changed, file)
    assert load(file).info["steps"] == 8
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    other = model()
    other.info["steps"] = 9
    with pytest.raises(ResourceError, match=rf"^error\[DISK\] {file}: its [0-9,]+ bytes .*No space") as caught:
        save(other, file)
    assert caught.value.exit_code == 6
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]  # no partial file


@pytest.mark.parametrize("version", ["1", "2"])
def test_older_formats_are_refused(file, version):
    assert "Use the version that wrote it" in load_error(rewritten(file, undiffuse=version), "FORMAT")


def test_a_missing_file_or_model(tmp_path):
    assert "no such file" in load_error(tmp_path / "none.safetensors", "NOT_FOUND")
    assert "Name a run folder" in load_error(tmp_path, "NO_MODEL")
    (tmp_path / "checkpoints").mkdir()
    assert "resume it" in load_error(tmp_path, "NO_MODEL")
    (tmp_path / "model.safetensors").mkdir()
    load_error(tmp_path, "NO_MODEL")


def test_every_truncation_and_every_flipped_bit_is_detected(file):
    whole = file.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for size in (0, 4, 8, 9, header // 2, header + 7, header + 8, len(whole) - 4, len(whole) - 1):
        file.write_bytes(whole[:size])
        load_error(file, "DAMAGED")
    g = torch.Generator().manual_seed(0)
    places = [*range(8), *torch.randint(8, len(whole), (200,), generator=g).tolist()]
    places += [
        whole.index(part) for part in (b"undiffuse", b"sha256", b"model", b"num_values", b'high\\": ') if part in whole
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


def test_the_sha256_covers_the_description(file):
    whole = file.read_bytes()
    assert whole.count(b'\\"chain_length\\": 4') == 1
    file.write_bytes(whole.replace(b'\\"chain_length\\": 4', b'\\"chain_length\\": 5'))
    assert "its own sha256" in load_error(file, "DAMAGED")


def test_a_model_is_no_data(file):
    with pytest.raises(DataError, match=r"\[NO_ARRAY\].*is a model or another file of undiffuse, not data"):
        load_data(file)


def test_files_that_are_not_a_model(file):
    save_file({"weight": torch.ones(2)}, file)
    assert "not written by undiffuse" in load_error(file, "NOT_OURS")
    save_file({"weight": torch.ones(2)}, file, metadata={"format": "pt", "model": "{}"})
    load_error(file, "NOT_OURS")
    save(model(), file)
    load_error(rewritten(file, model=None), "NOT_OURS")
    save(model(), file)
    assert "Update undiffuse" in load_error(rewritten(file, undiffuse=str(FORMAT + 1)), "FORMAT")
    save(model(), file)
    load_error(rewritten(file, undiffuse="state"), "NOT_OURS")
    file.write_bytes(b"GIF89a" + bytes(100))
    load_error(file, "DAMAGED")
    other = "it is not a safetensors file. Name a run folder or a .safetensors file."
    assert other in load_error(file.rename(file.with_suffix(".gif")), "NOT_OURS")


@pytest.mark.parametrize(
    ("change", "code", "cause"),
    [
        ({"conv_out.bias": None}, "TENSOR", "'conv_out.bias' is missing"),
        ({"more": torch.zeros(1)}, "TENSOR", "'more' does not belong"),
        ({"conv_out.bias": torch.zeros(2)}, "TENSOR", "'conv_out.bias' has the shape (2,), not (1,)"),
        ({"conv_out.bias": torch.zeros(1, 1)}, "TENSOR", "the shape (1, 1), not (1,)"),
        ({"conv_out.bias": torch.tensor([float("nan")])}, "NON_FINITE", "'conv_out.bias'"),
        ({"conv_out.bias": torch.tensor([float("-inf")])}, "NON_FINITE", "'conv_out.bias'"),
    ],
)
def test_tensors_that_do_not_fit_are_named(file, change, code, cause):
    assert cause in load_error(rewritten(file, change), code)


def test_tensors_of_the_right_form_are_accepted():
    check_tensors(Path("x"), {"a": torch.zeros(2)}, {"a": torch.ones(2)})


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[]",
        "3",
        '"' + "a" * 10,
        "[" * 20_000,
        lambda d: d.pop("transform"),
        lambda d: d.update(transform=[]),
        lambda d: d.update(transform={"kind": "best"}),
        lambda d: d.update(config=[]),
        lambda d: d["config"].update(new=1),
        lambda d: d["config"].update(chain_length="4"),
        lambda d: d["config"].update(target={"name": "best"}),
        lambda d: d["config"].update(network={"kind": "unet", "widths": [-4]}),
        lambda d: d.update(item_shape=[]),
        lambda d: d.update(item_shape=["a", 4, 4]),
        lambda d: d.update(item_shape=4),
    ],
)
def test_descriptions_of_no_model(file, change):
    text = change
    if callable(change):
        plain = json.loads(read_tensors(file)[1]["model"])
        change(plain)
        text = json.dumps(plain)
    assert "not one that this version understands" in load_error(rewritten(file, model=text), "DESCRIPTION")


class Canary:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_no_code_in_a_file_is_run(tmp_path, kind):
    canary, file = tmp_path / "canary", tmp_path / "model.safetensors"
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Canary(canary)))
    else:
        torch.save({"weight": Canary(canary)}, file)
    load_error(file, "DAMAGED")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # power


@pytest.mark.parametrize(
    ("info", "left"),
    [
        (7, {}),
        ({"num_values": "5", "notes": 3, "classes": "ab", "steps": 3, "own": [1]}, {"steps": 3, "own": [1]}),
        ({"distilled": True, "imported": "x"}, {"imported": "x"}),
        ({"distilled": {"guidance": "2"}, "imported": {"scheduler": 3}}, {}),
        ({"columns": 7, "held_out": "most", "accuracy": [[]]}, {}),
    ],
)
def test_odd_facts_about_the_data_cost_themselves_and_not_the_model(file, info, left):
    """The commands that use them went down with a traceback."""
    plain = json.loads(read_tensors(file)[1]["model"])
    path = rewritten(file, model=json.dumps({**plain, "info": info}))
    assert load(path).info == left
    assert main(["inspect", str(path)]) == 0
    assert main(["sample", str(path), "--n", "1", "--steps", "2", "--out", str(path.parent / "out")]) == 0
