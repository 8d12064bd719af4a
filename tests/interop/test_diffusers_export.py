"""Models as folders of diffusers: they are imported again with equal outputs; what diffusers lacks is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers_models import MODELS, model

from undiffuse.cli import main
from undiffuse.data.transform import Standardized
from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.interop import diffusers_export
from undiffuse.interop.diffusers import import_diffusers
from undiffuse.interop.diffusers_export import check_expressible, export_diffusers
from undiffuse.interop.exporting import export
from undiffuse.model import checkpoint
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition

FILES = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(autouse=True)
def _without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_exported_model_is_imported_with_the_same_outputs_and_levels(name, tmp_path):
    before = model(name)
    checks = export_diffusers(before, tmp_path)
    assert [(check.difference is None, check.holds) for check in checks] == [(False, True), (False, True), (True, True)]
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == FILES
    after = import_diffusers(tmp_path).model
    x, time = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 7.0, 19.0])
    cond = Condition(label=torch.tensor([2, 0, 1])) if name == "classes" else None
    one, two = before.network(x, time, cond), after.network(x, time, cond)
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5 * float(one.abs().max()))
    for level, other in zip(before.chain, after.chain, strict=True):
        assert float(level.alpha**2) == pytest.approx(float(other.alpha**2), rel=1e-6, abs=2e-7)
    kept = ("target", "variance", "loss", "chain_length", "preconditioning", "output")
    assert all(getattr(before.config, part) == getattr(after.config, part) for part in kept)


def test_the_fields_of_an_imported_model_are_written_again(tmp_path):
    chain = {"clip_sample": False, "timestep_spacing": "trailing", "clip_sample_range": 2.0}
    before = model()
    before.info["imported"] = {"scheduler": {**chain, "set_alpha_to_one": True, "prediction_type": "v_prediction"}}
    export_diffusers(before, tmp_path)
    written = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert {name: written[name] for name in chain} == chain
    assert written["prediction_type"] == "sample"  # the model's own
    assert "set_alpha_to_one" not in written
    assert written["_diffusers_version"] == diffusers_export.VERSION


@pytest.mark.parametrize("imported", ["x", {}, None])
def test_an_imported_model_without_a_scheduler_has_the_defaults(imported):
    before = model()
    before.info["imported"] = imported
    assert diffusers_export.chain_fields(before) == diffusers_export.chain_fields(model())


def test_the_numbers_of_a_table_without_a_name_are_written(tmp_path):
    export_diffusers(
        model(schedule={"name": "tabulated", "beta": [0.05 * (k + 1) for k in range(19)] + [0.96]}), tmp_path
    )
    written = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert written["trained_betas"] == pytest.approx([0.05 * (k + 1) for k in range(19)] + [0.96], rel=1e-12)
    named = model("ho")
    assert diffusers_export.chain_fields(named)["beta_schedule"] == "linear"
    assert diffusers_export.chain_fields(named)["trained_betas"] is None


UNET = {"kind": "unet", "widths": (128, 128), "blocks": 1}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"network": {**UNET, "patch": 2}}, "model.network.patch = 2"),
        ({"network": {**UNET, "norm": "layer"}}, "model.network.norm = 'layer'"),
        ({"network": {**UNET, "fourier": [2]}}, "model.network.fourier = (2,)"),
        ({"network": {**UNET, "two_times": True}}, "model.network.two_times = True"),
        ({"network": {**UNET, "vector": 3}}, "model.network.vector = 3"),
        ({"network": {**UNET, "text": 8}}, "model.network.text = 8"),
        ({"network": {**UNET, "learned_resampling": False}}, "model.network.learned_resampling = False"),
        ({"network": {**UNET, "widths": (32, 128)}}, "model.network.widths = '[32, 128] with ["),
        ({"network": {**UNET, "widths": (128, 256), "attention": (0,), "heads": 4}}, "model.network.heads = 4"),
        ({"network": {**UNET, "widths": (128,) * 5}}, "model.item_shape = (1, 8, 8)"),
        ({"network": {**UNET, "widths": (3,), "attention": ()}}, "model.network.widths = [3]"),
        ({"target": {"name": "flow"}}, "model.target = 'flow'"),
        ({"schedule": {"name": "linear_log_snr"}, "times": {"name": "uniform"}}, "model.schedule = 'linear_log_snr'"),
        ({"preconditioning": {"scale": "none", "time": "log_snr"}}, "model.preconditioning = {'scale': 'none', 'time'"),
        ({"output": "categorical"}, "model.output = 'categorical'"),
    ],
)
def test_what_diffusers_cannot_express_is_refused_by_name(changes, cause, tmp_path):
    refused = model("ho", **changes)
    with pytest.raises(ConfigError) as raised:
        export_diffusers(refused, tmp_path / "out")
    assert str(raised.value).startswith("error[EXPORT] ")
    assert cause in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_data_without_a_range_are_refused():
    before = model()
    with pytest.raises(ConfigError, match=r"model.transform = 'Standardized'"):
        check_expressible(Diffusion(before.config, (1, 8, 8), Standardized((0.0,), (1.0,))))


def test_the_command(tmp_path, capsys):
    run, out = tmp_path / "model.safetensors", tmp_path / "out"
    checkpoint.save(model(), run)
    command = ["export", str(run), str(out), "--format", "diffusers"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "diffusers itself, which is not installed" in printed
    assert f"written into {out}: model_index.json, scheduler/scheduler_config.json" in printed
    assert main(command) == 2  # nothing is overwritten
    assert "it exists and is not an empty folder" in capsys.readouterr().err
    assert main([*command[:2], str(tmp_path / "new"), "--format", "pickle"]) == 2
    assert "error[FORMAT] --format pickle: no such format. Use one of diffusers" in capsys.readouterr().err


@pytest.mark.parametrize("is_there", [False, True])
def test_outputs_that_differ_are_an_error_and_nothing_is_left(is_there, tmp_path, monkeypatch):
    run, out = tmp_path / "model.safetensors", tmp_path / "out"
    checkpoint.save(model(), run)
    if is_there:
        out.mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(diffusers_export, "LIMIT", -1.0)
    with pytest.raises(CheckpointError, match="outputs of the network differ"):
        export(run, out, "diffusers")
    assert sorted(tmp_path.iterdir()) == before
    assert not is_there or not list(out.iterdir())


@pytest.mark.parametrize("is_there", [False, True])
def test_a_disk_that_fails_leaves_nothing(is_there, tmp_path, monkeypatch):
    run, out = tmp_path / "model.safetensors", tmp_path / "out"
    checkpoint.save(model(), run)
    if is_there:
        out.mkdir()
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("undiffuse.runtime.atomic_file.os.fsync", full)
        with pytest.raises(ResourceError, match="No space left on device"):
            export(run, out, "diffusers")
    assert sorted(tmp_path.iterdir()) == before
    export(run, out, "diffusers")
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "out"}
