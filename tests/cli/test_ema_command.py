"""`undiffuse ema`: another length of a finished run, and the best length by the bound of held-out items."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from undiffuse.cli import main
from undiffuse.data.from_array import from_array
from undiffuse.data.sources.registry import load as load_data
from undiffuse.errors import ConfigError, DataError
from undiffuse.model.checkpoint import load, save
from undiffuse.model.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.sampling.sampler import Sampler
from undiffuse.training import posthoc_ema
from undiffuse.training.diffusion_task import fit_diffusion as fit
from undiffuse.training.monitor import Monitor
from undiffuse.training.posthoc_ema import compare_lengths, with_ema_length
from undiffuse.training.run_folder import Run

VALUES = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
CONFIG = Config(
    ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, chain_length=5),
    TrainConfig(batch=8, max_steps=30, warmup=2, lr=0.01, precision="float32", held_out=0.2, snapshots=3),
)


def spread(held_out, n=8):
    """``n`` of the items, spread evenly from the first to the last."""
    return held_out[[round(i * (len(held_out) - 1) / (n - 1)) for i in range(n)]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder and the file of its data."""
    place = tmp_path_factory.mktemp("ema")
    np.save(place / "vectors.npy", VALUES)

    def finish(monitor):
        save(monitor.ema_model, monitor.run.model)
        monitor.run.finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "evaluate_now", lambda *_: None)
        patch.setattr(Monitor, "finish", finish)
        fit(CONFIG, load_data(str(place / "vectors.npy")), place / "run", device="cpu", quiet=True)
    return place / "run", place / "vectors.npy"


def test_another_length(trained, capsys):
    run, _ = trained
    assert main(["ema", str(run), "--length", "0.08"]) == 0
    path = run / "model-ema-0.08.safetensors"
    _, error = posthoc_ema.combine_profiles(
        posthoc_ema.Profile(0.08, 30), list(posthoc_ema.list_snapshots(run / "snapshots"))
    )
    assert capsys.readouterr().out == f"average of length 0.08, {error:.2%} error of its profile: {path}\n"
    model, own = load(path), load(run)
    assert (model.info["ema"], model.info["steps"], model.info["ema_error"]) == (0.08, 30, error)
    assert model.config == own.config
    average, _, _ = posthoc_ema.reconstruct_average(run / "snapshots", 0.08)
    assert all(torch.equal(average[name], tensor) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(model.state_dict()[name], tensor) for name, tensor in own.state_dict().items())
    assert model.sample(2, sampler=Sampler(num_steps=3)).shape == (2, 3)


def test_the_best_length_by_the_bound_of_held_out_items(trained, capsys):
    run, data = trained
    options = ["--length", "0.05", "--length", "0.15", "--items", "8", "--mc-samples", "5"]
    assert main(["ema", str(run), str(data), "--best", *options, "--out", str(run / "best.safetensors")]) == 0
    output = capsys.readouterr().out
    assert main(["ema", str(run), str(data), "--best", *options, "--out", str(run / "j.safetensors"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    dataset = load_data(str(data))
    scores = compare_lengths(Run(run), dataset, (0.05, 0.15), items=8, mc_samples=5)
    held_out = torch.from_numpy(dataset.values[spread(dataset.split(0.2).validation)])
    bits = [
        with_ema_length(Run(run), each)[0].nll(held_out, mc_samples=5).bits_per_dim(3).double() for each in (0.05, 0.15)
    ]
    better = int(bits[1].mean() < bits[0].mean())
    paired = bits[1 - better] - bits[better]
    assert [one.bits for one in scores] == pytest.approx([float(b.mean()) for b in bits])
    assert [one.stderr for one in scores] == pytest.approx([float(b.std()) / 8**0.5 for b in bits])
    assert scores[better][4:] == (0, 0)
    assert [(row["length"], row["bits_per_dim"], row["stderr"]) for row in printed["scores"]] == [
        (one.length, one.bits, one.stderr) for one in scores
    ]
    assert (printed["length"], printed["out"]) == (scores[better].length, str(run / "j.safetensors"))
    assert scores[1 - better][4:] == pytest.approx((float(paired.mean()), float(paired.std()) / 8**0.5))
    assert f"best: {scores[better].length:g}" in output
    tie = scores[1 - better].regret < 2 * scores[1 - better].regret_stderr
    assert ("within two standard errors of it" in output) == tie
    assert load(run / "best.safetensors").info["ema"] == scores[better].length
    for score in scores:
        assert f"{score.bits:.4f} ± {score.stderr:.4f}" in output


def test_lengths_far_from_the_snapshots(trained, capsys):
    run, data = trained
    kept = list(posthoc_ema.list_snapshots(run / "snapshots"))
    errors = {
        each: posthoc_ema.combine_profiles(posthoc_ema.Profile(each, 30), kept)[1] for each in posthoc_ema.CANDIDATES
    }
    near = [each for each, error in errors.items() if error <= 0.1]
    assert 3 < len(near) < len(errors)
    assert [one.length for one in compare_lengths(Run(run), load_data(str(data)), items=2, mc_samples=1)] == near
    assert main(["ema", str(run), "--length", "0.03"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert f"{errors[0.03]:.2%} error of its profile" in output[0]
    assert output[1].startswith("note: more snapshots")
    assert main(["ema", str(run), "--length", "1e-9"]) == 2
    assert "the stored snapshots give its profile with an error" in capsys.readouterr().err
    assert not (run / "model-ema-1e-09.safetensors").exists()


def test_items_have_their_labels_where_the_run_was_conditional(tmp_path, monkeypatch):
    monkeypatch.setattr(Monitor, "evaluate_now", lambda *_: None)
    monkeypatch.setattr(Monitor, "finish", lambda monitor: save(monitor.ema_model, monitor.run.model))
    labels = np.arange(80) % 2
    data = from_array(VALUES + 3 * labels[:, None].astype(np.float32), labels=labels)
    fit(replace_train(CONFIG, conditional=True, max_steps=6), data, tmp_path, device="cpu", quiet=True)
    model, _ = with_ema_length(Run(tmp_path), 0.1)
    validation = spread(data.split(0.2).validation)
    held_out = torch.from_numpy(data.values[validation])
    conditional = model.nll(held_out, mc_samples=5, cond=data.condition(validation)).bits_per_dim(3).double().mean()
    unconditional = model.nll(held_out, mc_samples=5).bits_per_dim(3).double().mean()
    (score,) = compare_lengths(Run(tmp_path), data, (0.1,), items=8, mc_samples=5)
    assert score.bits == pytest.approx(float(conditional))
    assert abs(float(conditional - unconditional)) > 1e-4


def test_swapped_and_foreign_snapshots(trained, tmp_path, capsys):
    run, data = trained
    other = fit(replace_train(CONFIG, seed=5), load_data(str(data)), tmp_path / "other", device="cpu", quiet=True)
    own = tmp_path / "own"
    shutil.copytree(run, own)
    shutil.copy(own / "snapshots" / "0.050-00000030.safetensors", own / "snapshots" / "0.100-00000030.safetensors")
    assert main(["ema", str(own), "--length", "0.08"]) == 4
    assert "it says that it is the average of length 0.05 at step 30" in capsys.readouterr().err
    shutil.copy(other / "snapshots" / "0.100-00000030.safetensors", own / "snapshots")
    assert main(["ema", str(own), "--length", "0.08"]) == 4
    assert "it is a snapshot of another run" in capsys.readouterr().err
    shutil.copy(run / "snapshots" / "0.100-00000030.safetensors", own / "snapshots")
    (own / "snapshots" / "best.safetensors").write_bytes(b"mine")
    assert main(["ema", str(own), "--length", "0.08"]) == 0
    (own / "snapshots" / "0.100-00000030.safetensors").write_bytes(b"x")
    assert main(["ema", str(own), "--length", "0.08"]) == 4
    assert capsys.readouterr().err.count("\n") == 1


def test_refusals(trained, tmp_path, capsys):
    run, data = trained
    for options in ([], [str(data)], ["--length", "0.1", "--length", "0.2"], ["--length", "0.4"]):
        assert main(["ema", str(run), *options]) == 2, options
        assert capsys.readouterr().err.count("\n") == 1
    model = load(run)
    (tmp_path / "plain").mkdir()
    (tmp_path / "distilled").mkdir()
    save(model, tmp_path / "plain" / "model.safetensors")
    model.config = replace(model.config, calls=1)
    save(model, tmp_path / "distilled" / "model.safetensors")
    for place, said in (
        (tmp_path / "plain", "no snapshots of averages were stored in training. Train with snapshots = 4"),
        (tmp_path / "distilled", "it is a distilled run, and distillation stores no snapshots of averages"),
        (run / "model.safetensors", "it is a file, and averages are stored in the folder of a run"),
        (tmp_path, "no model.safetensors in this folder"),
        (tmp_path / "nothing", "no such file"),
    ):
        assert main(["ema", str(place), "--length", "0.1"]) == 4
        assert said in capsys.readouterr().err
    with pytest.raises(DataError, match="the run was trained on other data"):
        compare_lengths(Run(run), from_array(VALUES[:50]))
    with pytest.raises(ConfigError, match="none is given"):
        compare_lengths(Run(run), load_data(str(data)), ())


def test_no_items_to_compare_with(tmp_path, monkeypatch):
    monkeypatch.setattr(Monitor, "evaluate_now", lambda *_: None)
    monkeypatch.setattr(Monitor, "finish", lambda monitor: save(monitor.ema_model, monitor.run.model))
    data = from_array(VALUES)
    fit(replace_train(CONFIG, held_out=0.0, max_steps=2), data, tmp_path, device="cpu", quiet=True)
    with pytest.raises(DataError, match="fewer than two items are held out"):
        compare_lengths(Run(tmp_path), data)
    assert (
        posthoc_ema.CANDIDATES[0]
        < posthoc_ema.SNAPSHOT_LENGTHS[0]
        < posthoc_ema.SNAPSHOT_LENGTHS[1]
        < posthoc_ema.CANDIDATES[-1]
    )


def test_the_folder_of_out_is_made(trained, tmp_path, call):
    out = tmp_path / "new" / "folder" / "m.safetensors"
    assert call("ema", trained[0], "--length", "0.08", "--out", out).code == 0
    assert load(out).info["ema"] == 0.08


def test_a_length_takes_no_data(trained, call):
    run, data = trained
    for options, named in (
        ([data], data),
        (["--num-values", 5], "--num-values 5"),
        (["--items", 9, "--mc-samples", 3], "--items 9 --mc-samples 3"),
    ):
        said = call("ema", run, *options, "--length", "0.08")
        cause = "with --length nothing is measured on data. Leave it out, or give --best"
        assert (said.code, said.err) == (2, f"error[USAGE] {named}: {cause}.\n")


def test_a_file_that_exists_is_never_replaced(trained, tmp_path, call):
    run, _ = trained
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path / "notes.txt", run / "model.safetensors"):
        before = out.read_bytes()
        answer = call("ema", run, "--length", "0.08", "--out", out)
        assert answer.code == 2
        assert answer.err == f"error[OUT] --out {out}: exists already. Give another name, or delete it.\n"
        assert out.read_bytes() == before


def test_a_file_of_the_user_at_the_default_path_is_renamed(trained, call):
    run, _ = trained
    path = run / "model-ema-0.09.safetensors"
    path.write_text("mine")
    said = call("ema", run, "--length", "0.09")
    assert said.code == 0
    assert f"note: {path} was not a model of undiffuse; renamed to model-ema-0.09.safetensors.earlier" in said.out
    assert path.with_name("model-ema-0.09.safetensors.earlier").read_text() == "mine"
    assert "note" not in call("ema", run, "--length", "0.09").out  # an own file is replaced
    assert load(path).info["ema"] == 0.09
