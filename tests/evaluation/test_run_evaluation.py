"""Evaluation as a function: what it estimates, that it prints nothing, and that it resumes to the same bits."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from evaluation_models import integers, model_for, model_of
from oracles import GaussianData

import undiffuse
from undiffuse.data.from_array import from_array
from undiffuse.data.lazy_array import LazyArray, cast_to_array
from undiffuse.data.transform import Identity, IntegerLevels, Standardized
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation import batches, resumable
from undiffuse.evaluation import plan as planning
from undiffuse.evaluation.plan import bit_reversed_order
from undiffuse.evaluation.run_evaluation import density_warning, evaluate
from undiffuse.likelihood.nll import make_nll
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.model import checkpoint
from undiffuse.model import likelihood_estimators as estimates
from undiffuse.model.diffusion import Diffusion
from undiffuse.process import schedule as S
from undiffuse.process.ode_integrator import Integrator
from undiffuse.runtime.distributed_group import single_process
from undiffuse.runtime.side_files import read_record, write_record
from undiffuse.sampling.time_grids import time_grid

DATA = integers()
QUICK = {"items": 5, "mc_samples": 2}
ESTIMATES = ("discrete", "continuous", "ode")


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(estimates, "LOOSE_TOLERANCE", Integrator(rtol=0.1, atol=0.1))


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(planning, "batch_size", lambda *_: 2)
    monkeypatch.setattr(planning, "calls_per_second", lambda *_: 1000.0)


@pytest.fixture(scope="module")
def model():
    return model_for(DATA)


def numbers(result):
    """All numbers of a result that do not depend on the clock."""
    summary = result.summary()
    for numbers in summary["estimates"].values():
        del numbers["seconds"]
    return summary, {name: nll.total.tolist() for name, nll in result.nll.items()}


def test_batches_are_halved_where_the_memory_of_a_gpu_is_too_small(model, monkeypatch):
    expected, nll, tried, said = numbers(evaluate(model, DATA, part="all", items=24, mc_samples=2)), model.nll, [], []

    def small_gpu(values, seed, mc_samples, batch, **options):
        tried.append(batch)
        if batch > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return nll(values, seed, mc_samples, batch, **options)

    monkeypatch.setattr(planning, "batch_size", lambda *_: 12)
    monkeypatch.setattr(planning, "calls_per_second", lambda *_: 1000.0)
    monkeypatch.setattr(model, "nll", small_gpu)
    found = numbers(evaluate(model, DATA, part="all", items=24, mc_samples=2, on_message=said.append))
    assert tried == [12, 6, 6] * 3
    assert sum("too little memory" in line for line in said) == 3
    for name, total in found[1].items():
        assert total == pytest.approx(expected[1][name], rel=1e-5)


def test_only_the_items_that_are_measured_are_read(monkeypatch):
    """Data that are read on access may be larger than the memory.

    A file that changes between two estimates ends the evaluation, also for an estimate that could be skipped.
    """
    monkeypatch.setattr(planning, "calls_per_second", lambda *_: 1000.0)
    monkeypatch.setattr(planning, "batch_size", lambda *_: 16)
    stored, read, most = integers(n=400), [], 10**9

    def rows(indices):
        read.append(len(indices))
        if sum(read) > most:
            raise DataError("CHANGED_DURING_RUN", "integers", "it changed", "Start again")
        return stored.values[indices]

    data = replace(stored, values=cast_to_array(LazyArray(stored.values.shape, stored.values.dtype, rows)))
    model = model_for(data)  # which reads all items once, for the fingerprint
    read.clear()
    expected = numbers(evaluate(model, stored, part="all", items=32, mc_samples=2))
    assert numbers(evaluate(model, data, part="all", items=32, mc_samples=2)) == expected
    assert read == [32] + [16] * 6
    read.clear()
    result = evaluate(model, data, part="all", minutes=0.0001)
    assert read[:2] == [1, planning.SPEED_ITEMS]  # the first batch of the flow, which counts
    assert sum(read) - read[1] == sum(len(nll.total) for nll in result.nll.values()) < 400
    read.clear()
    most = 64
    with pytest.raises(DataError, match="it changed"):
        evaluate(model, data, part="all", items=32, mc_samples=2)


def test_all_estimates_of_the_same_items(model, capfd):
    assert undiffuse.evaluate is evaluate
    result = evaluate(model, DATA, part="all", **QUICK)
    assert capfd.readouterr() == ("", "")
    summary = result.summary()
    assert list(summary["estimates"]) == list(ESTIMATES)
    assert {key: summary[key] for key in ("data", "part", "chain_length", "seed", "condition")} == {
        "data": "integers",
        "part": "all, including training items",
        "chain_length": 5,
        "seed": 0,
        "condition": "none",
    }
    assert summary["digest"] == checkpoint.fingerprint(model)
    assert list(result.items) == list(bit_reversed_order(24)[:5])
    totals = {}
    for name, mc_samples in (("discrete", 2), ("continuous", 2), ("ode", 1)):
        values = torch.from_numpy(DATA.values[result.items])
        nll = model.nll(values, mc_samples=mc_samples, estimate=name)
        bits = totals[name] = nll.bits_per_dim(20).numpy()
        estimate = summary["estimates"][name]
        assert (estimate["items"], estimate["calls"]) == (5, nll.calls)
        assert estimate["iw_samples" if name == "ode" else "mc_samples"] == mc_samples
        mean, stderr = estimate["bits_per_dim"]["total"]
        assert [mean, stderr] == pytest.approx([bits.mean(), bits.std(ddof=1) / math.sqrt(5)], rel=1e-12)
        assert result.bits_per_dim(name) == (mean, stderr)
        assert sum(estimate["bits_per_dim"][part][0] for part in ("prior", "diffusion", "decoder")) == pytest.approx(
            mean
        )
        diffusion = float(nll.diffusion_nats.mean()) / 20 / math.log(2)
        assert estimate["bits_per_dim"]["diffusion"][0] == pytest.approx(diffusion)
    paired = totals["ode"] - totals["discrete"]
    expected = [paired.mean(), paired.std(ddof=1) / math.sqrt(5)]
    assert summary["minus_discrete"]["ode"]["total"] == pytest.approx(expected)


def test_results_depend_on_the_seed_alone(model):
    first, again, other = (evaluate(model, DATA, seed=seed, **QUICK) for seed in (1, 1, 2))
    assert numbers(first) == numbers(again)
    for name in ESTIMATES:
        assert first.bits_per_dim(name)[0] != other.bits_per_dim(name)[0]


def test_more_items_start_with_the_same(model):
    few, many = (evaluate(model, DATA, items=items, mc_samples=2, part="all") for items in (3, 7))
    assert list(many.items[:3]) == list(few.items)
    for name in ESTIMATES:
        assert few.nll[name].total == pytest.approx(many.nll[name].total[:3], rel=1e-3)


def test_the_script_of_improved_diffusion(model):
    result = evaluate(model, DATA, items=4, mc_samples=2, compat="openai", estimates=["continuous"])
    assert result.mc_samples == {"discrete": None, "openai": None, "continuous": 2}
    difference = (result.nll["openai"].total - result.nll["discrete"].total) / (20 * math.log(2))
    expected = [float(difference.mean()), float(difference.std()) / 2]
    assert result.summary()["minus_discrete"]["openai"]["total"] == pytest.approx(expected)


def test_exact_estimates_and_importance_samples(model):
    result = evaluate(model, DATA, items=3, exact=True, estimates=["continuous", "discrete"])
    assert result.mc_samples == {"discrete": None, "continuous": 5}
    assert evaluate(model, DATA, estimates=["ode"], iw_samples=2, items=QUICK["items"]).mc_samples == {"ode": 2}


def interrupted_after(monkeypatch, calls):
    """Interrupts as Ctrl-C does in the place of batch number ``calls``; the list of batches that were computed."""
    real, computed = Diffusion.nll, []

    def nll(*arguments, **more):
        if len(computed) == calls:
            raise KeyboardInterrupt
        computed.append(more["estimate"])
        return real(*arguments, **more)

    monkeypatch.setattr(Diffusion, "nll", nll)
    return computed


def interrupt(model, folder, calls):
    """Evaluates into ``folder`` until ``calls`` batches are finished."""
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(patch, calls)
        with pytest.raises(KeyboardInterrupt):
            evaluate(model, DATA, folder=folder, **QUICK)


@pytest.mark.parametrize("calls", [0, 1, 4, 8])
def test_an_interrupted_evaluation_resumes_to_the_same_bits(model, tmp_path, monkeypatch, small_batches, calls):
    whole = evaluate(model, DATA, **QUICK)
    interrupt(model, tmp_path, calls)
    messages = []
    with monkeypatch.context() as patch:
        computed = interrupted_after(patch, None)
        patch.setattr(planning, "plan_evaluation", None)  # the first plan is kept
        resumed = evaluate(model, DATA, folder=tmp_path, on_message=messages.append, **QUICK)
    assert messages == [f"resuming an interrupted evaluation; batches in {tmp_path}: {calls}"]
    assert len(computed) == 9 - calls  # three batches for each estimate
    assert numbers(resumed) == numbers(whole)
    assert len(list(tmp_path.glob("*.safetensors"))) == 9
    resumable.remove(tmp_path)
    assert not tmp_path.exists()


def test_batches_of_another_kind_of_device_are_not_continued(model, tmp_path, monkeypatch, small_batches):
    interrupt(model, tmp_path, 4)
    plan = read_record(tmp_path / resumable.PLAN)
    plan["request"]["device"] = "cuda"
    write_record(tmp_path / resumable.PLAN, plan)
    messages, computed = [], interrupted_after(monkeypatch, None)
    evaluate(model, DATA, folder=tmp_path, on_message=messages.append, **QUICK)
    assert messages == [f"starting over: the evaluation in {tmp_path} differs in device"]
    assert len(computed) == 9


def test_unusable_batches_are_computed_again(model, tmp_path, monkeypatch, small_batches):
    whole = evaluate(model, DATA, **QUICK)
    interrupt(model, tmp_path, 4)
    first, second, third = sorted(tmp_path.glob("discrete-*"))
    first.write_bytes(first.read_bytes()[:-8])
    third.write_bytes(second.read_bytes())
    messages, computed = [], interrupted_after(monkeypatch, None)
    assert numbers(evaluate(model, DATA, folder=tmp_path, on_message=messages.append, **QUICK)) == numbers(whole)
    assert messages[1].startswith("computed again: discrete-00000000.safetensors, not a whole safetensors file")
    assert messages[2] == "computed again: discrete-00000004.safetensors, it belongs to another job"
    assert computed.count("discrete") == 2


@pytest.mark.parametrize("name", ["continuous", "ode"])
def test_the_pace_of_batches_decides_how_many_items_fit(model, monkeypatch, small_batches, name):
    monkeypatch.setattr(planning, "calls_per_second", lambda *_: 1e6)
    clock, seconds = [0.0], [1]
    monkeypatch.setattr(planning.time, "perf_counter", lambda: clock[0])

    def nll(_, values, *a, **more):
        """A batch of a second, of two calls for each item or (after the first batch) seven."""
        clock[0] += seconds[0] if more["first"] else 1
        zero = torch.zeros(len(values), dtype=torch.float64)
        return make_nll(zero, zero + 0, zero + 0, 7 if more["first"] else 2, zero.new_zeros(len(values), 5))

    monkeypatch.setattr(Diffusion, "nll", nll)
    monkeypatch.setattr(planning, "first_flow_items", lambda _: 2)
    for budget, items in ((4.1, 8), (0.1, 2), (100, 24)):
        result = evaluate(model, DATA, estimates=[name], part="all", minutes=budget / 51)
        assert (len(result.nll[name].total), result.seconds[name]) == (items, math.ceil(items / 2))
        assert result.nll[name].calls == math.ceil((2 * 2 + (items - 2) * 7) / items)
    seconds[0] = 2
    result = evaluate(model, DATA, estimates=[name], part="all", minutes=4.1 / 51)
    assert len(result.nll[name].total) == 4
    seconds[0] = 1
    result = evaluate(model, DATA, mc_samples=2, part="all", minutes=4.1 * 13 / 4 / 51)
    # 16 items of the flow would take 8 s, more than half of 13.3
    assert [len(result.nll[n].total) for n in ESTIMATES] == [6, 4, 12]
    assert result.summary()["minus_discrete"]["ode"]["total"] == [0, 0]


@pytest.mark.parametrize("stored", [True, False])
def test_the_first_batch_of_the_flow_sets_its_share_and_counts(model, monkeypatch, tmp_path, stored):
    """Of a flow whose items take long, few are measured, and the plan states their time."""
    monkeypatch.setattr(planning, "calls_per_second", lambda *_: 1000.0)
    monkeypatch.setattr(planning, "batch_size", lambda _, slow: 16)
    clock, measured = [0.0], []
    monkeypatch.setattr(batches.time, "perf_counter", lambda: clock[0])

    def nll(_, values, *a, first, estimate, **more):
        clock[0] += 67 * len(values) if estimate == "ode" else 0.001
        measured.append((estimate, first, len(values)))
        zero = torch.zeros(len(values), dtype=torch.float64)
        return make_nll(zero, zero + 0, zero + 0, 2, zero.new_zeros(len(values), 5))

    monkeypatch.setattr(Diffusion, "nll", nll)
    said, folder = [], tmp_path / "batches" if stored else None
    result = evaluate(model, DATA, part="all", minutes=1, folder=folder, on_message=said.append)
    assert [m for m in measured if m[0] == "ode"] == [("ode", 0, 1), ("ode", 1, 1)]
    assert (len(result.nll["ode"].total), result.seconds["ode"]) == (2, 134)
    assert [line.split(",")[:3:2] for line in said] == [["probability flow (ode): 2 items", " take about 3 minutes"]]


def test_progress_adds_up(model, small_batches):
    seen = []
    evaluate(model, DATA, on_progress=seen.append, **QUICK)
    assert list(dict.fromkeys(p.estimate for p in seen)) == list(ESTIMATES)
    assert all(p.total >= p.spent and p.left == pytest.approx(p.total - p.spent) for p in seen)
    assert [p.spent for p in seen] == sorted(p.spent for p in seen)
    assert seen[-1].left == pytest.approx(0, abs=1e-9)


def test_an_estimate_that_fails_is_skipped_unless_it_was_requested():
    model = model_of((2,), Identity(), schedule={"name": "cosine", "T": 5})
    data = from_array(np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32), name="v")
    real, messages = model.nll, []

    def nll(*a, estimate="discrete", **more):
        if estimate == "ode":
            raise ConfigError("ODE_END", "the noisy end", "there is no signal", "Use others")
        return real(*a, estimate=estimate, **more)

    model.nll = nll
    result = evaluate(model, data, mc_samples=2, on_message=messages.append)
    assert list(result.nll) == ["discrete", "continuous"]
    assert messages == ["probability flow (ode) is skipped: the noisy end: there is no signal"]
    with pytest.raises(ConfigError, match="ODE_END"):
        evaluate(model, data, estimates=["ode"])


def test_a_single_item_has_no_error_and_no_items_are_refused(model, monkeypatch):
    for n in (1, 0):
        monkeypatch.setattr(planning, "select_items", lambda *_, n=n: (np.arange(n), "held out for testing"))
        if n:
            assert np.isnan(evaluate(model, DATA, estimates=["discrete"], mc_samples=2).bits_per_dim("discrete")[1])
        else:
            with pytest.raises(DataError, match="no items in this part"):
                evaluate(model, DATA)


def test_several_processes_need_a_folder(model):
    with pytest.raises(ConfigError, match="several processes need a folder in common"):
        evaluate(model, DATA, group=single_process()._replace(world_size=2))


def test_a_conditional_model_is_evaluated_given_the_condition(small_batches):
    values = np.random.default_rng(0).integers(5, size=(12, 3))
    labelled = from_array(values, np.arange(12) % 3, num_values=5)
    info = {"num_values": 5, "fingerprint": labelled.fingerprint, "classes": ["0", "1", "2"]}
    model = model_of((3,), IntegerLevels(5), std=0.3, network={"classes": 3}, **info)
    chosen = bit_reversed_order(12)[:7]
    picked = torch.from_numpy(labelled.values[chosen])
    conditional, unconditional = (
        float(model.nll(picked, cond=cond).bits_per_dim(3).mean()) for cond in (labelled.condition(chosen), None)
    )
    assert abs(conditional - unconditional) > 0.01
    settings = {"part": "all", "estimates": ["discrete"], "items": 7, "mc_samples": 5}
    result = evaluate(model, labelled, **settings)
    assert result.facts["condition"] == "labels"
    assert result.bits_per_dim("discrete")[0] == pytest.approx(conditional, abs=1e-5)
    others = [from_array(values, num_values=5), replace(labelled, classes=("a", "b", "c"))]
    for data, more in ((labelled, {"unconditional": True}), *((data, {}) for data in others)):
        result = evaluate(model, data, **settings, **more)
        assert result.facts["condition"] == "none"
        assert result.bits_per_dim("discrete")[0] == pytest.approx(unconditional, abs=1e-5)
        noted = any("no condition is used" in line for line in result.explanations())
        assert noted == (data is not labelled)


def test_a_constant_column_is_told_beside_a_density():
    """It has no upper bound; the probability of an integer has."""
    values = np.random.default_rng(1).normal(size=(30, 3)).astype(np.float32)
    values[:, 1] = 2.5
    constant = replace(from_array(values, name="table"), columns=("a", "b", "c"))
    varying = from_array(np.delete(values, 1, 1), name="table")
    said = [
        [
            line
            for line in evaluate(of, data, part="all", estimates=["discrete"], **QUICK).explanations()
            if "upper" in line
        ]
        for of, data in (
            (model_of((3,), Standardized((0.0, 2.5, 0.0), (1.0, 1.0, 1.0))), constant),
            (model_of((2,), Identity()), varying),
            (model_of((3,), Identity()), from_array(values[:1], name="one")),
        )
    ]
    assert [len(lines) for lines in said] == [2, 1, 1]  # "≤: an upper bound" is said of each
    assert "channel b (1 of 3 channels) has the same value in all items, so its density has no" in said[0][0]
    values = integers(num_values=17).values.copy()
    values[:, 3] = 5
    integer = from_array(values, num_values=17, name="integers")
    assert integer.constant_channels.tolist() == [3]
    assert density_warning(model_of((20,), IntegerLevels(17)), integer) is None


def test_the_density_of_a_constant_column_has_no_upper_bound():
    """The bound of the exact denoiser falls by log 10 nats where the cleanest noise is ten times smaller."""
    data, totals = GaussianData(torch.zeros(1), torch.tensor([1e-30])), []
    for sigma in (1e-2, 1e-3, 1e-4):
        schedule = S.VarianceExploding(sigma, 10.0)
        chain = ReverseChain(data.denoiser(schedule), time_grid(schedule, 4))
        totals.append(float(vlb(chain, torch.zeros(1, 1, dtype=torch.float64), lambda n: torch.ones(n, 1, 1)).total))
    steps = [b - a for a, b in pairwise(totals)]
    assert steps == pytest.approx([-math.log(10)] * 2, rel=1e-3)


def test_the_time_left_is_that_of_the_missing_items_at_the_pace_of_the_finished_ones():
    """Batches of 1, 1, 2 and 4 of 8 items, the first ones at 3 s an item."""
    job, shown = {"items": 8, "first": 1, "batch": 4, "fit": False, "expected": 9.0}, []
    done = batches.compute_batches(
        job,
        lambda start: (None, 3.0) if start < 2 else None,
        lambda start, stop: (None, 6.0 * (stop - start)),
        single_process(),
        lambda spent, left: shown.append((spent, left)),
    )
    assert [seconds for _, seconds in done] == [3.0, 3.0, 12.0, 24.0]
    assert shown == [(6.0, 18.0), (18.0, 18.0), (42.0, 0.0)]
