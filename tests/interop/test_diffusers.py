"""diffusers' folders of UNet2DModel: outputs that diffusers itself computed, and what is refused by name."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from diffusers_cases import CASES, GOLDEN, LABELS, SMALL, TIMES, inputs, noise, write_folder
from page_checks import check_page
from safetensors.torch import load_file, save_file

from undiffuse import load
from undiffuse.cli import main
from undiffuse.errors import CheckpointError, UndiffuseError
from undiffuse.interop import diffusers as interop
from undiffuse.interop.diffusers import import_diffusers
from undiffuse.interop.diffusers_names import from_diffusers, to_diffusers
from undiffuse.interop.importing import import_model, write
from undiffuse.interop.parity import LIMIT, Check, check_all, network_difference
from undiffuse.networks.condition import Condition

EXPECTED = load_file(GOLDEN)
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_name(name: str) -> str:
    for new, old in OLD.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


@pytest.fixture(autouse=True)
def _without_diffusers(monkeypatch):
    """Tests of this file compare with stored outputs, also where diffusers is installed."""
    monkeypatch.setitem(sys.modules, "diffusers", None)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_diffusers(case, tmp_path):
    chain = {"variance_type": "learned_range"} if case == "learned variance" else {}
    write_folder(tmp_path, case, chain)
    network = import_diffusers(tmp_path).model.network
    cond = Condition(label=torch.tensor(LABELS)) if case == "classes" else None
    computed = network(inputs(), torch.tensor(TIMES, dtype=torch.float32), cond)
    scale = EXPECTED[case].abs().max()
    assert computed.shape == EXPECTED[case].shape
    assert float((computed - EXPECTED[case]).abs().max()) < LIMIT * scale
    if cond is not None:  # the null label adds nothing
        assert torch.equal(network.embed.label.weight[0], torch.zeros(32))


def test_names_go_both_ways(tmp_path):
    for case in CASES:
        tensors = write_folder(tmp_path, case, {"variance_type": "learned_range"} if "learned" in case else {})
        network = import_diffusers(tmp_path).model.network
        back = to_diffusers(network, network.state_dict())
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
        again = from_diffusers(network, back)
        assert all(torch.equal(again[name], tensor) for name, tensor in network.state_dict().items())


@torch.no_grad()
def test_older_names_folders_and_fields(tmp_path):
    write_folder(tmp_path / "new")
    blocks = {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]}
    write_folder(tmp_path / "old", chain={"predict_epsilon": True, "tensor_format": "pt"}, rename=old_name, **blocks)
    old = tmp_path / "old"
    for path in (old / "unet" / "config.json", *(old / "unet").glob("*.safetensors")):
        path.rename(old / path.name)
    (old / "scheduler" / "scheduler_config.json").rename(old / "scheduler_config.json")
    one, two = import_diffusers(tmp_path / "new").model, import_diffusers(old).model
    assert one.config == two.config
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
    apart = import_diffusers(tmp_path / "new" / "unet", chain=old)  # the network's folder, its schedule elsewhere
    assert apart.model.config == one.config
    assert import_diffusers(tmp_path / "new" / "unet").model.config == one.config  # beside it
    write_folder(tmp_path / "x", chain={"predict_epsilon": False})
    assert import_diffusers(tmp_path / "x").model.config.target == {"name": "x"}


def test_the_process_is_that_of_the_configuration(tmp_path):
    chain = {"beta_start": 0.001, "beta_end": 0.2, "beta_schedule": "scaled_linear", "num_train_timesteps": 100}
    write_folder(tmp_path, chain={**chain, "prediction_type": "v_prediction", "variance_type": "fixed_large"})
    imported = import_diffusers(tmp_path, values=17)
    model = imported.model
    root = torch.linspace(0.001**0.5, 0.2**0.5, 100, dtype=torch.float64)
    bar = torch.cumprod(1 - root**2, 0)
    alpha = torch.stack([level.alpha for level in model.chain[::-1]])[1:]
    torch.testing.assert_close(alpha**2, bar, rtol=1e-5, atol=1e-7)
    assert (model.config.target["name"], model.config.variance, model.item_shape) == ("v", "large", (1, 8, 8))
    assert model.denoiser().preconditioning.time_input(model.chain[0]) == 99  # the step T − 1, counted from 0
    assert model.transform.num_values == 17
    assert imported.sampling == "--solver ancestral --steps 100"
    write_folder(
        tmp_path / "ddim", chain={"_class_name": "DDIMScheduler", "num_train_timesteps": 60, "set_alpha_to_one": False}
    )
    assert import_diffusers(tmp_path / "ddim").sampling == "--solver ddim --steps 50"


def test_what_sampling_here_does_not_do_is_noted(tmp_path):
    for number, (chain, note) in enumerate(
        (
            ({"clip_sample": False}, "clips predicted images not at all"),
            ({"clip_sample_range": 2.0}, "to ±2.0"),
            ({"thresholding": True}, "--threshold dynamic"),
            ({"timestep_spacing": "trailing"}, "timestep_spacing trailing"),
        )
    ):
        write_folder(tmp_path / str(number), chain=chain)
        notes = import_diffusers(tmp_path / str(number)).notes
        assert len(notes) == 2  # the first names the weights
        assert note in notes[1]
    for name, noted in (("DDIMScheduler", True), ("DDPMScheduler", False)):
        write_folder(tmp_path / name, chain={"_class_name": name, "set_alpha_to_one": False})
        notes = import_diffusers(tmp_path / name).notes
        assert any("the pipeline ends at the chain's least noise" in note for note in notes) is noted


@pytest.mark.parametrize(
    ("unet", "chain", "cause"),
    [
        ({"act_fn": "gelu"}, {}, "act_fn = 'gelu' is not supported"),
        ({"center_input_sample": True}, {}, "center_input_sample = True is not supported"),
        ({"time_embedding_type": "fourier"}, {}, "time_embedding_type = 'fourier' is not supported"),
        ({"class_embed_type": "timestep"}, {}, "class_embed_type = 'timestep' is not supported"),
        ({"_class_name": "UNet2DConditionModel"}, {}, "it is of the class 'UNet2DConditionModel', not UNet2DModel"),
        ({"new_field": 3}, {}, "new_field = 3 is not supported"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, {}, "the block 'SkipDownBlock2D' is not supported"),
        ({"up_block_types": ["UpBlock2D"]}, {}, "network.up_block_types: 1 for 2 levels"),
        ({"down_block_types": 3}, {}, "not a model that is supported"),
        ({"resnet_time_scale_shift": "spatial"}, {}, "network.resnet_time_scale_shift: 'spatial' is not supported"),
        ({"downsample_padding": 2}, {}, "network.downsample_padding: 2 is not supported"),
        ({"downsample_type": "fir"}, {}, "network.downsample_type: 'fir' is not supported"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, {}, "network.mid_block_type: "),
        ({"norm_num_groups": 3}, {}, "network.norm_num_groups: 3 does not divide the 8 channels"),
        ({"norm_eps": "small"}, {}, "network.norm_eps: 'small' is not a finite number"),
        ({"attention_head_dim": 5}, {}, "network.attention_head_dim: 5 does not divide the 16 channels"),
        ({"in_channels": 3}, {}, "out_channels: 1 with in_channels 3"),
        ({"in_channels": "three"}, {}, "not a model that is supported"),
        ({"sample_size": [8, 8, 8]}, {}, "sample_size = [8, 8, 8] is not supported"),
        ({"sample_size": None}, {}, "its sample_size is not given"),
        ({"layers_per_block": 10**9}, {}, "is above 16,777,216"),
        ({"block_out_channels": [1 << 20, 1 << 20]}, {}, "its weights alone need"),
        ({"norm_num_groups": 2}, {}, None),  # of another network, which the names and shapes do not show
        ({"layers_per_block": 2}, {}, "'down.1.0.cond.bias' is missing"),
        ({"block_out_channels": [8, 24]}, {}, "has the shape"),
        (
            {},
            {"_class_name": "PNDMScheduler"},
            "it is of the class 'PNDMScheduler', not DDPMScheduler or DDIMScheduler",
        ),
        ({}, {"prediction_type": "flow"}, "prediction_type = 'flow' is not supported"),
        ({}, {"variance_type": "learned"}, "variance_type = 'learned' is not supported"),
        ({}, {"variance_type": "learned_range"}, "out_channels: 1 with in_channels 1, variance_type learned_range"),
        ({}, {"beta_schedule": "laplace"}, "no such table of diffusers"),
        ({}, {"beta_end": 1.5}, "every beta must lie in (0, 1)"),
        ({}, {"trained_betas": [0.1, 0.2]}, "it has 2 numbers for T = 20"),
        ({}, {"num_train_timesteps": "many"}, "not a model that is supported"),
        ({}, {"rescale_betas_zero_snr": True}, "not a model that is supported"),  # eps has no x where alpha is 0
        ({}, {"use_karras_sigmas": True}, "use_karras_sigmas = True is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(unet, chain, cause, tmp_path):
    write_folder(tmp_path, chain=chain, **unet)
    if cause is None:
        import_diffusers(tmp_path)
        return
    with pytest.raises(UndiffuseError) as raised:
        import_diffusers(tmp_path)
    assert cause in str(raised.value)
    assert "\n" not in str(raised.value)


def test_fields_that_are_missing_have_the_defaults_of_diffusers(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps({"_class_name": "UNet2DModel", **SMALL}))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    before = import_diffusers(tmp_path).model
    assert (before.config.network["norm_eps"], before.config.network["attention_head_dim"]) == (1e-5, 8)
    assert before.config.schedule == {"name": "diffusers", "T": 1000, "first": 1e-4, "last": 0.02, "kind": "linear"}
    path.write_text(json.dumps({"_class_name": "UNet2DModel", **{**SMALL, "sample_size": None}}))
    assert import_diffusers(tmp_path, size=16).model.item_shape == (1, 16, 16)


def damage(folder, how):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    config = folder / "unet" / "config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "NaN":
        tensors = load_file(weights)
        tensors["conv_in.weight"][0, 0, 0, 0] = math.nan
        save_file(tensors, weights)
    elif how == "unknown tensor":
        save_file({**load_file(weights), "extra": torch.zeros(1)}, weights)
    elif how == "no weights":
        weights.unlink()
    elif how == "broken configuration":
        config.write_text("{")
    elif how == "list":
        config.write_text("[]")
    elif how == "nested":
        config.write_text("[" * 100_000)
    elif how == "large":
        config.write_text(" " * (1 << 21))
    elif how == "no schedule":
        (folder / "scheduler" / "scheduler_config.json").unlink()
    elif how == "no network":
        config.unlink()


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("truncated", "DAMAGED"),
        ("NaN", "NON_FINITE"),
        ("unknown tensor", "TENSOR"),
        ("no weights", "NO_MODEL"),
        ("broken configuration", "DESCRIPTION"),
        ("list", "DESCRIPTION"),
        ("nested", "DESCRIPTION"),
        ("large", "DESCRIPTION"),
        ("no schedule", "NO_MODEL"),
        ("no network", "NO_MODEL"),
    ],
)
def test_damage_is_one_error_and_nothing_is_written(how, code, tmp_path, capsys):
    write_folder(tmp_path / "in")
    damage(tmp_path / "in", how)
    assert main(["import", str(tmp_path / "in"), str(tmp_path / "out")]) == 4
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error[{code}]")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


class Harmful:
    """Creates a file when it is unpickled without restriction."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_weights_in_a_pickle_are_read_on_request_and_code_in_it_is_not_run(tmp_path, capsys):
    tensors = write_folder(tmp_path / "in")
    (tmp_path / "in" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    weights, touched = tmp_path / "in" / "unet" / "diffusion_pytorch_model.bin", tmp_path / "touched"
    torch.save(tensors, weights)
    command = ["import", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(command) == 4
    assert "error[PICKLE_REFUSED]" in (error := capsys.readouterr().err)
    assert "Give --unpickle to read it weights-only in a child process" in error
    assert main([*command, "--unpickle"]) == 0
    network = load(tmp_path / "out").network
    assert all(
        torch.equal(tensor, tensors[name]) for name, tensor in to_diffusers(network, network.state_dict()).items()
    )
    torch.save({**tensors, "conv_in.bias": Harmful(touched)}, weights)
    assert main([*command[:2], str(tmp_path / "other"), "--unpickle"]) == 4
    assert "error[PICKLE_REFUSED]" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1
    assert not touched.exists()
    assert not (tmp_path / "other").exists()


def test_the_command_writes_a_model_that_others_take(tmp_path, capsys):
    write_folder(tmp_path / "in", chain={"num_train_timesteps": 8, "beta_end": 0.9})
    out = tmp_path / "out"
    assert main(["import", str(tmp_path / "in"), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "diffusers is not installed" in printed
    assert f"next: undiffuse sample {out} --solver ancestral --steps 8" in printed
    assert main(["sample", str(out), "--solver", "ancestral", "--steps", "8", "--n", "2"]) == 0
    assert main(["inspect", str(out)]) == 0
    assert "from diffusers DDPMScheduler" in capsys.readouterr().out
    write_folder(tmp_path / "labelled", "classes")
    assert main(["import", str(tmp_path / "labelled"), str(tmp_path / "of-labels")]) == 0
    assert "--steps 20 --label all\n" in capsys.readouterr().out
    assert main(["import", str(tmp_path / "in"), str(out), "--json"]) == 0  # over its own files
    assert json.loads(capsys.readouterr().out)["checks"][0]["difference"] is None
    (out / "mine.txt").write_text("")
    (out / "import.json").unlink()
    assert main(["import", str(tmp_path / "in"), str(out)]) == 2
    assert "error[OUT]" in capsys.readouterr().err


def test_the_report_of_an_imported_model_names_the_data_and_calls_none_held_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).integers(256, size=(24, 1, 8, 8)).astype(np.uint8))
    write_folder(tmp_path / "in", chain={"num_train_timesteps": 8, "beta_end": 0.9})
    assert main(["import", "in", "out"]) == 0
    assert main(["report", "out", "--minutes", "0"]) == 0
    text = check_page((tmp_path / "out" / "report.html").read_text()).text
    assert "1×8×8, 256 values" in text
    assert "undiffuse evaluate out DATA" in text
    given = ["data.npy", "--num-values", "256"]
    assert main(["evaluate", "out", *given, "--estimate", "discrete", "--items", "2", "--mc-samples", "2"]) == 0
    assert main(["report", "out", *given, "--minutes", "0"]) == 0
    text = check_page((tmp_path / "out" / "report.html").read_text()).text
    assert "undiffuse evaluate out data.npy --num-values 256" in text
    assert "bits/dim, 2 items" in text
    assert "The model does not record its training data: no item of data is known to be held out." in text
    assert "fingerprint unknown" not in text
    assert capsys.readouterr().err == ""


def test_formats_are_recognized_or_refused(tmp_path):
    write_folder(tmp_path / "in")
    assert import_model(tmp_path / "in").model.item_shape == (1, 8, 8)
    (tmp_path / "empty").mkdir()
    for source, kind, code in (("no", None, "NOT_FOUND"), ("empty", None, "FORMAT"), ("in", "onnx", "FORMAT")):
        with pytest.raises(UndiffuseError) as raised:
            import_model(tmp_path / source, kind)
        assert raised.value.code == code


def test_outputs_that_differ_are_an_error_and_nothing_is_written(tmp_path, monkeypatch):
    write_folder(tmp_path / "in")
    imported = import_diffusers(tmp_path / "in")

    def other(x, time, label, change=0.0):
        return imported.model.network(x, time.float()) * (1 + change)

    same = network_difference(imported.model.network, other, (1, 8, 8), [0, 999])
    differ = network_difference(imported.model.network, lambda *a: other(*a, change=1e-4), (1, 8, 8), [0, 999])
    assert same < 1e-6
    assert differ == pytest.approx(1e-4, rel=0.1)
    assert network_difference(imported.model.network, lambda *a: other(*a) / 0, (1, 8, 8), [0]) == math.inf
    monkeypatch.setattr(interop, "compare_with_diffusers", lambda *a: [Check("outputs", "theirs", differ, LIMIT)])
    with pytest.raises(CheckpointError, match=r"outputs differ by 1.0e-04 from theirs, above 1e-05"):
        import_model(tmp_path / "in")
    check_all([Check("outputs", "theirs", None, LIMIT), Check("outputs", "theirs", LIMIT, LIMIT)], "")


def test_writing_keeps_what_the_model_is(tmp_path):
    write_folder(tmp_path / "in")
    imported = import_diffusers(tmp_path / "in")
    write(imported, tmp_path / "in", tmp_path / "out")
    x, time = noise("x", 2, 1, 8, 8), torch.tensor([3.0, 4.0])
    assert torch.equal(load(tmp_path / "out").network(x, time), imported.model.network(x, time))


def test_training_from_an_imported_model_takes_its_recipe_and_starts_at_its_loss(tmp_path, capsys):
    values = np.random.default_rng(0).integers(17, size=(24, 1, 8, 8)).astype(np.uint8)
    np.save(tmp_path / "data.npy", values)
    write_folder(tmp_path / "in", chain={"num_train_timesteps": 8, "beta_end": 0.9})
    imported, run = tmp_path / "imported", tmp_path / "run"
    data = [str(tmp_path / "data.npy"), "--num-values", "17"]
    assert main(["import", str(tmp_path / "in"), str(imported), "--values", "17"]) == 0
    recipe = ["--steps", "1", "--batch", "4", "--lr", "1e-9", "--out", str(run)]
    assert main(["train", *data, "--init", str(imported), *recipe]) == 0
    assert f"recipe '{imported}'" in capsys.readouterr().out
    before, after = load(imported), load(run)
    assert before.config == after.config
    u, eps = torch.rand(24, generator=torch.Generator().manual_seed(0)), noise("eps", 24, 1, 8, 8)
    losses = [model.loss(torch.from_numpy(values), u, eps).mean().item() for model in (before, after)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert main(["train", *data, "--init", str(imported), "--preset", "digits", "--steps", "1", "--out", "other"]) != 0
    assert "error[INIT]" in capsys.readouterr().err
