"""The evaluate command on a tiny model: what it prints and writes, and that it resumes."""

import csv
import json

import numpy as np
import pytest
import torch
from evaluation_models import model_for, model_of

from undiffuse.data.sources import registry as datasets
from undiffuse.data.transform import Identity
from undiffuse.evaluation import plan as planning
from undiffuse.evaluation.plan import bit_reversed_order
from undiffuse.model import checkpoint
from undiffuse.model import likelihood_estimators as estimates
from undiffuse.model.diffusion import Diffusion
from undiffuse.process.ode_integrator import Integrator
from undiffuse.report.table import cell

QUICK = ("--items", 5, "--mc-samples", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with labelled 5×4 images and a conditional model of them."""
    folder = tmp_path_factory.mktemp("evaluate")
    values = np.random.default_rng(0).integers(256, size=(24, 1, 5, 4)).astype(np.uint8)
    np.savez(folder / "data.npz", images=values, labels=np.arange(24) % 2)
    data = datasets.load(str(folder / "data.npz"))
    model = model_for(data, network={"classes": 2}, classes=list(data.classes))
    checkpoint.save(model, folder / "model.safetensors")
    return folder


@pytest.fixture
def evaluate(place, tmp_path, call, monkeypatch):
    """evaluate(*options) runs the command into ``tmp_path``: exit code, standard output, standard error."""
    monkeypatch.setattr(estimates, "LOOSE_TOLERANCE", Integrator(rtol=0.1, atol=0.1))
    monkeypatch.setattr(planning, "calls_per_second", lambda *_: 1000.0)
    return lambda *options: call(
        "evaluate", place / "model.safetensors", place / "data.npz", "--device", "cpu", "--out", tmp_path, *options
    )


def test_a_figure_of_an_earlier_evaluation_is_removed(evaluate, tmp_path):
    """The flow has no bits per step. The figure stayed, was not listed any more, and the next command refused it."""
    assert evaluate(*QUICK, "--estimate", "discrete")[0] == 0
    (tmp_path / "notes.txt").write_text("mine")
    assert evaluate("--items", 5, "--estimate", "ode")[0] == 0
    assert not (tmp_path / "bits-per-step.png").exists()
    assert evaluate(*QUICK, "--estimate", "discrete")[0] == 0
    assert {"bits-per-step.png", "notes.txt"} <= {f.name for f in tmp_path.iterdir()}


def report(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_an_evaluation_that_the_next_one_does_not_cover_is_kept(evaluate, tmp_path):
    options = (*QUICK, "--estimate", "discrete", "--part")
    assert "kept" not in evaluate(*options, "all").out
    assert "kept" not in evaluate(*options, "all", "--seed", 1).out
    before, rows = report(tmp_path), (tmp_path / "evaluation-items.csv").read_bytes()
    kept = "kept: the earlier evaluation of data, all, including training items, as "
    assert f"{kept}evaluation.json.earlier and evaluation-items.csv.earlier\n" in evaluate(*options, "train").out
    assert json.loads((tmp_path / "evaluation.json.earlier").read_text()) == before
    assert (tmp_path / "evaluation-items.csv.earlier").read_bytes() == rows
    assert "evaluation.json.earlier-2 and" in evaluate("--items", 5, "--estimate", "ode", "--part", "train").out


def test_a_model_that_shares_its_folder_with_a_file_of_this_name(place, call, tmp_path, monkeypatch):
    """The file of the user is kept under another name; numbers of other weights are not replaced without a line."""
    monkeypatch.setattr(planning, "calls_per_second", lambda *_: 1000.0)
    data = datasets.load(str(place / "data.npz"))
    for seed, name in enumerate(("model", "other")):
        torch.manual_seed(seed)
        model = model_for(data, network={"classes": 2}, classes=list(data.classes))
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * seed
        checkpoint.save(model, tmp_path / f"{name}.safetensors")
    for name in ("evaluation.json", "evaluation.json.damaged"):
        (tmp_path / name).write_text("mine")
    arguments = (place / "data.npz", "--device", "cpu", *QUICK, "--estimate", "discrete", "--part", "all")
    said = call("evaluate", tmp_path / "model.safetensors", *arguments)
    renamed = "renamed to evaluation.json.damaged-2\n"
    assert f"damaged, edited or not ours: {tmp_path}/evaluation.json, {renamed}" in said.out
    for name in ("evaluation.json.damaged", "evaluation.json.damaged-2"):
        assert (tmp_path / name).read_text() == "mine"
    said = call("evaluate", tmp_path / "other.safetensors", *arguments)
    assert "kept: the earlier evaluation of other weights on data, all, including training items, as " in said.out
    said = call("evaluate", tmp_path / "other.safetensors", *arguments, "--exact")
    assert (said.code, said.err[:13]) == (2, "error[USAGE] ")


def test_the_table_and_the_files(place, evaluate, tmp_path):
    code, out, err = evaluate(*QUICK, "--part", "all")
    assert (code, err) == (0, "")
    summary = report(tmp_path)
    assert list(summary["estimates"]) == ["discrete", "continuous", "ode"]
    _, metadata = checkpoint.read_tensors(place / "model.safetensors")
    assert summary["digest"] == metadata["sha256"]
    order = bit_reversed_order(24)[:5]
    with open(tmp_path / "evaluation-items.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == sorted(order)
    for name, estimate in summary["estimates"].items():
        bits = np.array([float(row[name]) for row in rows])
        assert bits.mean() == pytest.approx(estimate["bits_per_dim"]["total"][0], rel=1e-12)
    title, _, head, _, chain, continuous, flow, *_ = out.splitlines()
    assert title.strip() == "data, all, including training items: bits per dimension, given labels ± standard error"
    assert head.split()[:5] == ["estimate", "prior", "diffusion", "decoder", "total"]
    for row, name in (chain, "bound of the chain, 2 of 5 steps"), (continuous, "continuous bound, 2 points"):
        assert row.strip().startswith(name)
    assert flow.strip().startswith("probability flow")
    assert out.count("≤ ") == 3
    paired = cell(tuple(summary["minus_discrete"]["ode"]["total"]))
    assert f"probability flow {paired}\n" in out
    assert "a bound, because integer data are dequantized; its divergence is estimated" in out
    assert (tmp_path / "bits-per-step.png").is_file()
    assert f"figure: {tmp_path}/bits-per-step.png\n" in out
    assert f"all numbers: {tmp_path}/evaluation.json, of each item: {tmp_path}/evaluation-items.csv\n" in out
    assert not (tmp_path / "evaluation.partial").exists()


def test_options(evaluate, tmp_path):
    code, out, _ = evaluate("--items", 5, "--estimate", "ode", "--iw-samples", 2, "--unconditional", "--seed", 3)
    assert code == 0
    summary = report(tmp_path)
    assert (summary["part"], summary["condition"], summary["seed"]) == ("held out for testing", "none", 3)
    assert summary["estimates"]["ode"]["iw_samples"] == 2
    assert "bits per dimension ± standard error" in out
    assert not (tmp_path / "bits-per-step.png").exists()
    code, out, err = evaluate("--items", 3, "--exact", "--estimate", "discrete", "--minutes", 1, "--json")
    summary = report(tmp_path)
    assert summary["estimates"]["discrete"]["mc_samples"] is None
    assert {name: value for name, value in summary.items() if name not in ("sha256", "files")} == json.loads(out) | {
        "explanations": summary["explanations"]
    }
    assert f"all numbers: {tmp_path}/evaluation.json" in err


def test_the_script_of_improved_diffusion(evaluate, tmp_path):
    code, out, _ = evaluate("--items", 4, "--mc-samples", 2, "--compat", "openai", "--estimate", "continuous")
    assert code == 0
    (line,) = (line for line in out.splitlines() if "is off by" in line)
    assert f"off by {cell(tuple(report(tmp_path)['minus_discrete']['openai']['total']))} bits/dim" in line
    (row,) = (line for line in out.splitlines() if line.strip().startswith("as improved-diffusion's script"))
    assert "≤" not in row


def test_ctrl_c_and_the_same_command_again(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "batch_size", lambda *_: 2)
    command = (*QUICK, "--estimate", "discrete", "--estimate", "continuous")
    real, count = Diffusion.nll, []

    def nll(*arguments, **more):
        count.append(more["estimate"])
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(*arguments, **more)

    monkeypatch.setattr(Diffusion, "nll", nll)
    code, _, err = evaluate(*command)
    assert (code, err.count("\n")) == (130, 1)
    assert len(list((tmp_path / "evaluation.partial").glob("*.safetensors"))) == 4
    (tmp_path / "evaluation.partial" / "notes.txt").touch()
    code, out, _ = evaluate(*command)
    assert code == 0
    assert f"resuming an interrupted evaluation; batches in {tmp_path}/evaluation.partial: 4\n" in out
    assert len(count) == 5 + 2
    assert [path.name for path in (tmp_path / "evaluation.partial").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation-items.csv", "bits-per-step.png", "notes.txt"])
def test_a_folder_of_other_files_is_refused(evaluate, tmp_path, name):
    """Results of another command or by hand are not replaced; those of this command are."""
    (tmp_path / name).write_text("mine")
    code, _, err = evaluate(*QUICK, "--part", "all")
    assert (code, err.count("\n"), err[:11]) == (2, 1, "error[OUT] ")
    assert [(f.name, f.read_text()) for f in tmp_path.iterdir()] == [(name, "mine")]


def test_other_files_beside_the_results(place, evaluate, call, tmp_path):
    options = (*QUICK, "--part", "all", "--estimate", "discrete")
    assert evaluate(*options)[0] == 0
    (tmp_path / "notes.txt").write_text("mine")
    assert evaluate(*options, "--seed", 1)[0] == 0
    assert report(tmp_path)["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    own = tmp_path / "own"  # by default the results are beside the model, where other files are
    own.mkdir()
    (own / "model.safetensors").write_bytes((place / "model.safetensors").read_bytes())
    command = ("evaluate", own / "model.safetensors", place / "data.npz", "--device", "cpu", *options)
    assert call(*command)[0] == 0
    (own / "evaluation.json").unlink()
    code, _, err = call(*command)
    assert (code, "it holds bits-per-step.png and 1 more, which were not written by" in err) == (2, True)


def test_two_evaluations_in_one_folder(evaluate, tmp_path, monkeypatch):
    options, real, others = (*QUICK, "--part", "all", "--estimate", "discrete", "--seed"), Diffusion.nll, []

    def nll(*arguments, **more):
        if not others:
            others.append(None)
            others.append(evaluate(*options, 2))
        return real(*arguments, **more)

    monkeypatch.setattr(Diffusion, "nll", nll)
    assert evaluate(*options, 1)[0] == 0
    assert (others[1].code, "is evaluating into this folder" in others[1].err) == (6, True)
    assert report(tmp_path)["seed"] == 1


def test_an_estimate_that_fails(tmp_path, call, monkeypatch):
    """The flow of a schedule without signal at its noisy end has no likelihood by a standard normal prior."""
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32))
    checkpoint.save(model_of((2,), Identity(), schedule={"name": "cosine", "T": 5}), tmp_path / "model.safetensors")
    real = Diffusion.nll

    def nll(*a, estimate="discrete", **more):
        if estimate == "ode":
            raise planning.ConfigError("ODE_END", "the noisy end", "there is no signal", "Use others")
        return real(*a, estimate=estimate, **more)

    monkeypatch.setattr(Diffusion, "nll", nll)
    code, out, _ = call("evaluate", tmp_path, tmp_path / "v.npy", "--device", "cpu", "--mc-samples", 2)
    assert (code, "probability flow (ode) is skipped: the noisy end: there is no signal\n" in out) == (0, True)
    code, _, err = call("evaluate", tmp_path, tmp_path / "v.npy", "--device", "cpu", "--estimate", "ode")
    assert (code, err) == (2, "error[ODE_END] the noisy end: there is no signal. Use others.\n")
