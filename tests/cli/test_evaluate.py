"""The evaluate command on a tiny model: what it measures, says and writes, and that it goes on to the same bits."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse import checkpoint
from undiffuse import data as datasets
from undiffuse import estimate as estimates
from undiffuse.cli import evaluate as evaluation
from undiffuse.cli import main, partial, results
from undiffuse.codec import Identity, Pixels
from undiffuse.config import ModelConfig
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError, DataError
from undiffuse.likelihood import Integrator
from undiffuse.likelihood.nll import nll as result_of

QUICK = ("--items", 5, "--draws", 2)
NETWORK = {"kind": "unet", "widths": [8], "blocks": 1, "attention": []}
SCHEDULE = {"name": "linear_log_snr", "high": 8.0}


def model_of(shape, codec, steps=5, schedule=SCHEDULE, **info):
    network = NETWORK if len(shape) > 1 else {"kind": "mlp", "width": 8, "depth": 1}
    torch.manual_seed(0)
    model = Diffusion(ModelConfig(network=network, steps=steps, schedule=schedule), shape, codec, info)
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 4×4 images and a model of them that is wider than the exact divergence is for."""
    folder = tmp_path_factory.mktemp("evaluate")
    np.save(folder / "data.npy", np.random.default_rng(0).integers(256, size=(24, 5, 4)).astype(np.uint8))
    data = datasets.load(str(folder / "data.npy"))
    about = {"levels": 256, "fingerprint": data.fingerprint, "held_out": 0.4, "name": "data"}
    checkpoint.save(model_of((1, 5, 4), Pixels(256), **about), folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _fast_flow(monkeypatch):
    monkeypatch.setattr(estimates, "COARSE", Integrator(rtol=0.1, atol=0.1))


@pytest.fixture
def evaluate(place, tmp_path, capsys):
    """evaluate(*options) runs the command into ``tmp_path``: exit code, standard output, standard error."""

    def run(*options, out=tmp_path, data="data.npy"):
        capsys.readouterr()
        arguments = ["evaluate", place / "model.safetensors", place / data, "--device", "cpu", "--out", out, *options]
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


def report(folder):
    return json.loads((folder / "evaluation.json").read_text())


def bits(folder):
    """The estimates' numbers, without what the clock says."""
    return {name: {**e, "seconds": None} for name, e in report(folder)["estimates"].items()}


def items_of(folder):
    with open(folder / "evaluation-items.csv") as file:
        return list(csv.DictReader(file))


def test_three_estimates_of_the_same_items(place, evaluate, tmp_path):
    code, out, err = evaluate(*QUICK, "--part", "all")
    assert (code, err) == (0, "")
    found = report(tmp_path)
    assert list(found["estimates"]) == ["discrete", "continuous", "ode"]
    assert (found["part"], found["chain"], found["seed"]) == ("all, training data among them", 5, 0)
    _, metadata = checkpoint.read_tensors(place / "model.safetensors")
    assert found["digest"] == metadata["sha256"]
    values = np.load(place / "data.npy")[:, None]
    order = evaluation.spread_out(24)[:5]
    model = checkpoint.load(place / "model.safetensors")
    rows = items_of(tmp_path)
    assert [int(row["index"]) for row in rows] == sorted(order)
    for name, draws in (("discrete", 2), ("continuous", 2), ("ode", 1)):
        nll = model.nll(torch.from_numpy(values[order]), draws=draws, estimate=name)
        ours = nll.bits_per_dim(20).numpy()
        told = found["estimates"][name]
        assert (told["items"], told["calls"], told["draws"]) == (5, nll.calls, draws)
        assert told["bits_per_dim"]["total"] == pytest.approx([ours.mean(), ours.std(ddof=1) / math.sqrt(5)], rel=1e-12)
        assert sum(told["bits_per_dim"][p][0] for p in ("prior", "steps", "decoder")) == pytest.approx(ours.mean())
        assert [float(row[name]) for row in rows] == [ours[i] for i in np.argsort(order)]
    apart = np.array([float(row["ode"]) - float(row["discrete"]) for row in rows])
    pair = found["minus_discrete"]["ode"]["total"]
    assert pair == pytest.approx([apart.mean(), apart.std(ddof=1) / math.sqrt(5)])
    assert f"probability flow {results.table.cell(tuple(pair))}\n" in out
    assert out.count("≤ ") == 3
    assert "bound of the chain, 2 of 5 steps" in out
    assert "a bound, since levels are dequantised; its divergence is estimated" in out
    assert (tmp_path / "bits-per-step.png").is_file()
    assert not (tmp_path / "evaluation.partial").exists()


def test_parts_estimates_and_draws_of_the_flow(evaluate, tmp_path):
    evaluate(*QUICK, "--estimate", "ode", "--iw", 2)
    found = report(tmp_path)
    assert found["part"] == "held out for testing"
    assert list(found["estimates"]) == ["ode"]
    assert found["estimates"]["ode"]["draws"] == 2
    assert not (tmp_path / "bits-per-step.png").exists()
    code, out, _ = evaluate("--items", 3, "--exact", "--estimate", "continuous", "--estimate", "discrete")
    assert code == 0
    assert {n: e["draws"] for n, e in report(tmp_path)["estimates"].items()} == {"discrete": None, "continuous": 5}
    assert "all 5 steps" in out


def test_numbers_are_a_function_of_the_seed(evaluate, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert evaluate(*QUICK, "--seed", seed, out=tmp_path / name)[0] == 0
    assert bits(tmp_path / "a") == bits(tmp_path / "b")
    for estimate in ("discrete", "continuous", "ode"):
        a, c = (bits(tmp_path / name)[estimate]["bits_per_dim"]["total"] for name in "ac")
        assert a[0] != c[0]


def test_more_items_begin_with_the_same(evaluate, tmp_path):
    evaluate("--items", 3, "--draws", 2, "--part", "all", out=tmp_path / "few")
    evaluate("--items", 7, "--draws", 2, "--part", "all", out=tmp_path / "many")
    many = {row["index"]: row for row in items_of(tmp_path / "many")}
    for row in items_of(tmp_path / "few"):
        for name in ("discrete", "continuous", "ode"):
            assert float(row[name]) == pytest.approx(float(many[row["index"]][name]), rel=1e-3)


def test_how_far_the_common_script_is_off(place, evaluate, tmp_path):
    code, out, _ = evaluate("--items", 4, "--draws", 2, "--compat", "openai", "--estimate", "continuous")
    assert code == 0
    found = report(tmp_path)
    assert list(found["estimates"]) == ["discrete", "openai", "continuous"]
    assert found["estimates"]["discrete"]["draws"] is found["estimates"]["openai"]["draws"] is None
    rows = items_of(tmp_path)
    apart = np.array([float(row["openai"]) - float(row["discrete"]) for row in rows])
    mean, stderr = found["minus_discrete"]["openai"]["total"]
    assert mean == pytest.approx(apart.mean(), abs=1e-12)
    assert stderr == pytest.approx(apart.std(ddof=1) / 2, rel=1e-6)
    (line,) = (line for line in out.splitlines() if "is off by" in line)
    assert f"off by {results.table.cell((mean, stderr))} bits/dim" in line
    for why in ("tanh", "1e-12", "float32", "clips", "decoder"):
        assert why in line
    shown = {line.split("  ")[1].strip(): line for line in out.splitlines() if line.startswith("  ")}
    assert "≤" not in shown["as improved-diffusion's script"]


def stopped_after(monkeypatch, calls):
    """Makes a model stop as by Ctrl-C instead of measuring its batch number ``calls``, and counts the batches."""
    real, count = Diffusion.nll, []

    def nll(*arguments, **more):
        if len(count) == calls:
            raise KeyboardInterrupt
        count.append(more["estimate"])
        return real(*arguments, **more)

    monkeypatch.setattr(Diffusion, "nll", nll)
    monkeypatch.setattr(evaluation, "batch_size", lambda *_: 2)
    monkeypatch.setattr(evaluation, "speed", lambda *_: 1000.0)
    return count


@pytest.mark.parametrize("calls", [0, 1, 4, 8])
def test_an_interrupted_evaluation_goes_on_to_the_same_bits(evaluate, tmp_path, monkeypatch, calls):
    with monkeypatch.context() as patch:
        assert len(stopped_after(patch, None)) == 0
        evaluate(*QUICK, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_after(patch, calls)
        code, _, err = evaluate(*QUICK)
        assert (code, err) == (130, "stopped; all is saved, and the same command goes on from here\n")
    assert (tmp_path / "evaluation.partial" / "plan.json").is_file()
    with monkeypatch.context() as patch:
        count = stopped_after(patch, None)
        patch.setattr(evaluation, "affordable", None)  # the plan is that of the first sitting
        code, out, _ = evaluate(*QUICK)
    assert code == 0
    assert f"an interrupted evaluation goes on; batches kept in {tmp_path}/evaluation.partial: {calls}\n" in out
    assert len(count) == 9 - calls  # three batches of two, of each estimate
    assert bits(tmp_path) == bits(tmp_path / "whole")
    assert items_of(tmp_path) == items_of(tmp_path / "whole")
    assert not (tmp_path / "evaluation.partial").exists()


def test_what_is_kept_is_used_only_if_it_is_whole_and_of_this_evaluation(evaluate, tmp_path, monkeypatch):
    folder = tmp_path / "evaluation.partial"
    evaluate(*QUICK, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_after(patch, 4)
        evaluate(*QUICK)
        first, second = sorted(folder.glob("discrete-*"))[:2]
        first.write_bytes(first.read_bytes()[:-8])
        (folder / "discrete-00000004.safetensors").write_bytes(second.read_bytes())
        (folder / "notes.txt").touch()
    with monkeypatch.context() as patch:
        count = stopped_after(patch, None)
        code, out, _ = evaluate(*QUICK)
    assert code == 0
    assert "measured again: discrete-00000000.safetensors, not a whole safetensors file" in out
    assert "measured again: discrete-00000004.safetensors, it belongs to another evaluation" in out
    assert count.count("discrete") == 2
    assert [f.name for f in folder.iterdir()] == ["notes.txt"]
    total, whole = (bits(f)["discrete"]["bits_per_dim"]["total"] for f in (tmp_path, tmp_path / "whole"))
    assert total == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("damage", ["{", "[]", '{"sha256": 1}', '{"asked": {}, "plan": {}, "sha256": "0"}'])
def test_a_damaged_plan_is_discarded(tmp_path, damage):
    said = []
    partial.begin(tmp_path, {"seed": 0}, lambda: {"a": 1}, said.append)
    (tmp_path / "discrete-00000000.safetensors").touch()
    (tmp_path / "plan.json").write_text(damage)
    assert partial.begin(tmp_path, {"seed": 0}, lambda: {"a": 2}, said.append)[0] == {"a": 2}
    assert said == [f"begun anew: the plan in {tmp_path} is damaged"]
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]


def test_another_question_is_begun_anew(tmp_path):
    said = []
    _, first = partial.begin(tmp_path, {"seed": 0, "items": (1, 2)}, lambda: {"a": 1}, said.append)
    assert partial.begin(tmp_path, {"seed": 0, "items": (1, 2)}, lambda: {"a": 2}, said.append) == ({"a": 1}, first)
    assert said.pop() == f"an interrupted evaluation goes on; batches kept in {tmp_path}: 0"
    plan, key = partial.begin(tmp_path, {"seed": 1, "items": (1, 2)}, lambda: {"a": 1}, said.append)
    assert said == [f"begun anew: what was begun in {tmp_path} differs in seed"]
    assert (plan, key != first) == ({"a": 1}, True)


def test_the_first_items_are_spread_over_all():
    for n in (1, 2, 3, 10, 64, 1000):
        order = evaluation.spread_out(n)
        assert sorted(order) == list(range(n))
        for k in (2, 5, 16, 100):
            if k <= n:  # no stretch of three k-ths of them is left out
                gaps = np.diff(np.concatenate([[-1], np.sort(order[:k]), [n]]))
                assert gaps.max() <= 3 * n / k + 1


IMAGES = torch.zeros(10_000, 1, 32, 32, dtype=torch.uint8)


def planned(monkeypatch, speed, names, *, values=IMAGES, items=None, draws=None, exact=False, iw=1, minutes=1.0):
    monkeypatch.setattr(evaluation, "speed", lambda *_: speed)
    model = model_of((1, 32, 32), Pixels(256), steps=1000)
    plan = evaluation.affordable(model, values, names, items, draws, exact, iw, minutes)
    return {name: (job["items"], job["draws"], job["fit"]) for name, job in plan.items()}, plan


ALL = ["discrete", "continuous", "ode"]


def test_what_is_affordable(monkeypatch):
    # 51 seconds of a minute: 5, 4 and 4 thirteenths
    sizes, plan = planned(monkeypatch, 1300.1, ALL)
    assert sizes == {"discrete": (1275, 20, True), "continuous": (1275, 16, True), "ode": (10_000, 1, True)}
    assert sum(job["expected"] for job in plan.values()) == pytest.approx(51, rel=0.01)
    assert planned(monkeypatch, 1.0, ALL)[0] == {
        "discrete": (64, 16, True),
        "continuous": (64, 16, True),
        "ode": (10_000, 1, True),
    }
    # where sixteen items of the flow take longer than its share, the bounds have less, but never less than half
    assert planned(monkeypatch, 100.0, ALL)[1]["ode"]["expected"] == 25.5
    assert planned(monkeypatch, 16 * 400 / 20, ALL)[1]["ode"]["expected"] == pytest.approx(20)
    assert planned(monkeypatch, 16 * 400 / 20, ALL)[1]["discrete"]["expected"] == pytest.approx(31 * 5 / 9, rel=0.1)
    assert planned(monkeypatch, 100.0, ["ode"])[1]["ode"]["expected"] == 51
    whole = {"discrete": (10_000, None, False), "continuous": (10_000, 1000, False), "ode": (10_000, 1, False)}
    assert planned(monkeypatch, 1.0, ALL, exact=True)[0] == whole
    assert planned(monkeypatch, 1.0, ALL, draws=3)[0]["continuous"] == (10_000, 3, False)
    assert planned(monkeypatch, 1e9, ALL)[0]["discrete"] == (10_000, None, True)
    assert planned(monkeypatch, 1e9, ALL)[0]["continuous"] == (10_000, 256, True)
    sizes, plan = planned(monkeypatch, 1300.1, ALL, values=IMAGES[:100], items=100, iw=3)
    assert sizes == {"discrete": (100, 255, False), "continuous": (100, 204, False), "ode": (100, 3, False)}
    assert plan["ode"]["expected"] == pytest.approx(100 * 3 * evaluation.GUESS / 1300.1)


def test_a_whole_chain_for_the_common_script_on_fewer_items(monkeypatch):
    names = ["discrete", "openai", "continuous"]
    sizes, _ = planned(monkeypatch, 14001.0, names)  # 5, 5 and 4 fourteenths of 51 seconds
    assert sizes == {"discrete": (255, None, False), "openai": (255, None, False), "continuous": (10_000, 20, True)}
    assert planned(monkeypatch, 1.0, names)[0]["openai"] == (16, None, False)


@pytest.mark.parametrize("name", ["continuous", "ode"])
def test_the_batches_say_how_many_items_fit(evaluate, tmp_path, monkeypatch, name):
    monkeypatch.setattr(evaluation, "batch_size", lambda *_: 2)
    monkeypatch.setattr(evaluation, "speed", lambda *_: 1e6)
    clock, later = [0.0], [1]
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock[0])

    def nll(_, values, *a, **more):  # a second a batch, of 7 calls an item or 2
        clock[0] += later[0] if more["first"] else 1
        zero = torch.zeros(len(values), dtype=torch.float64)
        return result_of(zero, zero + 0, zero + 0, 7 if more["first"] else 2, zero.new_zeros(len(values), 5))

    monkeypatch.setattr(Diffusion, "nll", nll)
    for budget, items in ((4.1, 8), (0.1, 2), (100, 24)):
        code, _, err = evaluate("--estimate", name, "--part", "all", "--minutes", budget / 51)
        assert (code, err) == (0, "")
        found = report(tmp_path)["estimates"][name]
        assert (found["items"], found["seconds"]) == (items, math.ceil(items / 2))
        assert found["calls"] == math.ceil((2 * 2 + (items - 2) * 7) / items)
    later[0] = 2  # slower than the first batch was
    evaluate("--estimate", name, "--part", "all", "--minutes", 4.1 / 51)
    assert report(tmp_path)["estimates"][name]["items"] == 4
    later[0] = 1
    evaluate("--draws", 2, "--part", "all", "--minutes", 4.1 * 13 / 4 / 51)
    found = report(tmp_path)["estimates"]
    assert [found[n]["items"] for n in ("discrete", "continuous", "ode")] == [24, 24, 8]
    assert [row["ode"] == "" for row in items_of(tmp_path)].count(False) == 8
    assert report(tmp_path)["minus_discrete"]["ode"]["total"] == [0, 0]


def test_an_estimate_that_a_model_has_not_is_left_out_unless_it_was_asked_for(tmp_path, capsys):
    model = model_of((2,), Identity(), schedule={"name": "cosine", "T": 5})
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32))
    data = datasets.load(str(tmp_path / "v.npy"))
    real = model.nll

    def nll(*a, estimate="discrete", **more):
        if estimate == "ode":
            raise ConfigError("ODE_END", "the noisy end", "there is no signal", "Use others")
        return real(*a, estimate=estimate, **more)

    model.nll = nll
    found = evaluation.evaluate_model(model, data, tmp_path, draws=2)
    assert list(found["estimates"]) == ["discrete", "continuous"]
    assert "no estimate 'ode': the noisy end: there is no signal" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="ODE_END"):
        evaluation.evaluate_model(model, data, tmp_path, estimates=["ode"])


def test_parts_with_one_item_or_none(place, tmp_path, monkeypatch):
    model = checkpoint.load(place / "model.safetensors")
    data = datasets.load(str(place / "data.npy"))
    for n in (1, 0):
        monkeypatch.setattr(evaluation, "choose_items", lambda *_, n=n: (np.arange(n), "held out for testing"))
        if n:
            found = evaluation.evaluate_model(model, data, tmp_path, estimates=["discrete"], draws=2)
            assert np.isnan(found["estimates"]["discrete"]["bits_per_dim"]["total"][1])
        else:
            with pytest.raises(DataError, match="no items in this part"):
                evaluation.evaluate_model(model, data, tmp_path)


def test_what_is_a_bound():
    images, few, vectors = (
        model_of((1, 5, 4), Pixels(256)),
        model_of((1, 4, 4), Pixels(256)),
        model_of((2,), Identity()),
    )
    for model, name, draws, bound in (
        (images, "ode", 1, True),
        (images, "ode", 2, False),  # noise of the divergence makes weights too heavy
        (few, "ode", 2, True),
        (vectors, "ode", 1, False),
        (vectors, "discrete", 2, True),
        (images, "openai", None, False),
    ):
        assert results.is_bound(model, name, draws) is bound
    assert "no bound: 2 draws" in results.remarks(images, ["ode"], 2)[0]
    assert "its divergence is exact" in results.remarks(few, ["ode"], 2)[1]
    wide = model_of((17,), Identity())
    assert "likelihood itself up to noise" in results.remarks(wide, ["ode"], 1)[1]
    assert len(results.remarks(images, ["openai"], 1)) == 0


@pytest.mark.parametrize("schedule", [SCHEDULE, {"name": "linear", "T": 100}, {"name": "cosine", "T": 100}])
def test_areas_of_the_picture_are_bits(schedule):
    model = model_of((1, 5, 4), Pixels(256), steps=100, schedule=schedule)
    values = torch.randint(0, 256, (3, 1, 5, 4), generator=torch.Generator().manual_seed(1))
    whole, some = (model.nll(values, draws=draws) for draws in (None, 7))
    points = model.nll(values, draws=100, estimate="continuous")
    for found in ({"discrete": whole}, {"discrete": some}, {"discrete": some, "continuous": points}):
        axes = results.bits_picture(model, found).axes[0]
        assert (
            axes.get_title("left")
            == f"at most {results.with_error(model, found['discrete'].total)[0]:.3f} bits per dimension"
        )
        drawn = [patch for patch in axes.patches if patch.get_label() and not patch.get_label().startswith("_")]
        assert [p.get_label().split(":")[0] for p in drawn] == [{"discrete": "chain"}.get(n, n) for n in found]
        for patch, result in zip(drawn, found.values(), strict=True):
            density, edges, _ = patch.get_data()
            assert len(density) <= 61
            assert (np.diff(edges) > 0).all()
            steps = float(result.steps.mean()) / 20 / math.log(2)
            assert (density * np.diff(edges)).sum() == pytest.approx(steps, rel=1e-12)


def test_a_conditional_model_is_measured_given_what_the_data_tell(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "batch_size", lambda *_: 3)
    values = np.random.default_rng(0).integers(5, size=(12, 1, 2, 2))
    labelled = datasets.from_array(values, np.arange(12) % 3, levels=5)
    network = NETWORK | {"classes": 3}
    torch.manual_seed(0)
    about = {"levels": 5, "fingerprint": labelled.fingerprint, "classes": ["0", "1", "2"]}
    model = Diffusion(ModelConfig(network=network, steps=5, schedule=SCHEDULE), (1, 2, 2), Pixels(5), about)
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.3)
    model.eval()

    def told(data, **more):
        chosen = {"part": "all", "estimates": ["discrete"], "items": 7, "draws": 5}
        found = evaluation.evaluate_model(model, data, tmp_path, **chosen, **more)
        return found["given"], found["estimates"]["discrete"]["bits_per_dim"]["total"][0], capsys.readouterr().out

    items = evaluation.spread_out(12)[:7]
    picked = torch.from_numpy(labelled.values[items])
    given, untold = (
        float(model.nll(picked, cond=cond).bits_per_dim(4).mean()) for cond in (labelled.condition(items), None)
    )
    assert abs(given - untold) > 0.01
    what, found, said = told(labelled)
    assert (what, found) == ("labels", pytest.approx(given, abs=1e-5))
    assert "bits per dimension, given labels ± standard error" in said
    what, found, said = told(labelled, untold=True)
    assert (what, found) == ("nothing", pytest.approx(untold, abs=1e-5))
    assert "bits per dimension ± standard error" in said
    others = [
        datasets.from_array(values, levels=5),
        datasets.from_array(values, np.arange(12) % 4, levels=5),
        datasets.from_array(values, np.arange(12) % 3, levels=5, cond=np.ones((12, 2))),
        replace(labelled, classes=("a", "b", "c")),
    ]
    for data in others:
        what, found, said = told(data)
        assert (what, found) == ("nothing", pytest.approx(untold, abs=1e-5))
        assert "the model hears labels, and these data have not the same: it is told nothing" in said
    unconditional = model_of((1, 2, 2), Pixels(5), levels=5)
    assert evaluation.known(unconditional, labelled) == ("nothing", None)
    both = model_of((1, 2, 2), Pixels(5), levels=5, classes=["0", "1", "2"])
    both.config.network.update(classes=3, vector=2)
    assert evaluation.known(both, others[2]) == ("labels and vectors", None)
    both.config.network.update(vector=0, classes=0, tokens=2)
    assert evaluation.known(both, datasets.from_array(values, levels=5, cond=np.ones((12, 1, 2))))[0] == "nothing"
    del both.info["classes"]
    assert evaluation.known(both, datasets.from_array(values, levels=5, cond=np.ones((12, 1, 2))))[0] == "tokens"
