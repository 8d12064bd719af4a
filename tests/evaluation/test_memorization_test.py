"""Tests of memorization: their false-alarm rates by enumeration, their power, and the line that a run prints."""

import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from undiffuse.data.dataset import Split
from undiffuse.data.from_array import from_array
from undiffuse.errors import DataError
from undiffuse.evaluation.distances import nearest
from undiffuse.evaluation.memorization_test import FALSE_ALARM_RATE, copying_test, generalization_gap, matched_items
from undiffuse.likelihood.nll import NLL
from undiffuse.model.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.model.diffusion import Diffusion
from undiffuse.sampling.trajectory import check_finite
from undiffuse.training.diffusion_task import fit_diffusion as fit
from undiffuse.training.monitor import Monitor
from undiffuse.training.run_folder import Run


def test_the_gap_of_known_bits():
    held_out, trained_on = torch.tensor([3.0, 5.0, 4.0, 4.5]), torch.tensor([2.0, 2.5, 2.5, 2.5])
    gap = generalization_gap(held_out, trained_on, 1)
    d = [1.0, 2.5, 1.5, 2.0]
    assert gap.mean == pytest.approx(1.75)
    assert gap.stderr == pytest.approx(np.std(d, ddof=1) / 2)
    assert not gap.significant  # four pairs never are: 2 < √(2 ln 1000)
    assert generalization_gap(held_out.repeat(4), trained_on.repeat(4), 1).significant
    assert not generalization_gap(trained_on.repeat(4), held_out.repeat(4), 1).significant
    assert not generalization_gap(held_out, held_out, 1).significant
    assert math.isnan(generalization_gap(held_out[:1], trained_on[:1], 1).stderr)


@pytest.mark.parametrize("num_tests", [1, 9])
@pytest.mark.parametrize("sizes", [torch.ones(18), torch.logspace(0, 3, 18), torch.linspace(1, 2, 18)])
def test_false_alarms_of_the_gap_by_all_signs(num_tests, sizes):
    """Of all 2^18 choices of signs of given differences at most a share r/num_tests is significant."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9)), dtype=torch.float64)
    halves = [(signs * part.double()).sum(1) for part in (sizes[:9], sizes[9:])]
    sums = (halves[0][:, None] + halves[1]).flatten()
    threshold = math.sqrt(2 * math.log(num_tests / FALSE_ALARM_RATE)) * float((sizes.double() ** 2).sum().sqrt())
    alarms = float((sums >= threshold).double().mean())
    assert alarms <= FALSE_ALARM_RATE / num_tests
    at = sums[sums >= threshold].min() if alarms else None
    if at is not None:  # the least significant choice is significant
        pattern = int((sums == at).nonzero()[0])
        d = torch.cat([signs[pattern // 512], signs[pattern % 512]]) * sizes.double()
        assert generalization_gap(d, torch.zeros(18), num_tests).significant


def test_power_of_the_gap():
    """64 pairs of normal bits, 0.9 standard deviations apart: significant in nine of ten runs of nine tests."""
    g = torch.Generator().manual_seed(0)
    significant = [
        generalization_gap(torch.randn(64, generator=g) + 0.9, torch.zeros(64), 9).significant for _ in range(200)
    ]
    assert sum(significant) > 180
    assert not generalization_gap(torch.randn(64, generator=g) + 0.1, torch.zeros(64), 9).significant


def test_matched_items():
    data = from_array(np.arange(150, dtype=np.float32)[:, None], name="numbers")
    split = Split(np.arange(100, 150), np.arange(20), np.arange(60, 70))
    held_out, trained_on = matched_items(data, split, 64)
    assert sorted(held_out) == list(range(20))
    assert len(set(trained_on)) == 20
    assert set(trained_on) <= set(range(100, 150))
    assert list(held_out) != sorted(held_out)
    again = matched_items(data, split, 64)
    assert list(again[0]) == list(held_out)
    assert list(again[1]) == list(trained_on)
    assert [len(part) for part in matched_items(data, split, 7)] == [7, 7]
    assert [len(part) for part in matched_items(data, Split(np.arange(9), np.arange(0), np.arange(0)), 64)] == [0, 0]


def test_of_equal_items_one_is_matched():
    values = np.concatenate([np.arange(60), np.zeros(40)]).astype(np.float32)[:, None]
    data = from_array(values, name="numbers")
    split = data.split(0.2)
    for part, chosen in zip((split.validation, split.train), matched_items(data, split, 64), strict=True):
        assert set(chosen) <= set(part)
        assert len(np.unique(data.values[chosen])) == len(chosen)


DATA = from_array(np.random.default_rng(0).normal(size=(80, 2)).astype(np.float32), name="vectors")
CONFIG = Config(
    ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, chain_length=5),
    TrainConfig(batch=8, max_steps=4, warmup=2, lr=0.01, precision="float32", previews=2, held_out=0.3, snapshots=0),
)


@pytest.mark.parametrize("memorized", [False, True])
def test_a_run_reports_memorization(tmp_path, monkeypatch, memorized):
    """The bound is that of a model which has memorized the training items, or of one that has not."""
    trained = {tuple(row) for row in DATA.values[DATA.split(0.3).train].tolist()}
    calls, lines = [], []

    def nll(model, values, **settings):
        calls.append((settings["seed"], settings["mc_samples"]))
        easy = torch.tensor([memorized and tuple(row) in trained for row in values.tolist()])
        bits = torch.where(easy, 1.0, 2.0) + 0.1 * torch.randn(len(values), generator=torch.Generator().manual_seed(3))
        zero = torch.zeros(len(values))
        return NLL(prior=bits, diffusion_nats=zero, decoder=zero, stderr=torch.tensor(0.1), calls=1, per_step=None)

    monkeypatch.setattr(Diffusion, "nll", nll)
    monkeypatch.setattr(Monitor, "_draw", lambda *_: None)
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
    folder = fit(CONFIG, DATA, tmp_path / "run", device="cpu", quiet=True)
    records = [r for r in Run(folder).read_metrics() if "gap" in r]
    assert [r["overfit"] for r in records] == [memorized] * 2
    assert calls == [(0, 8)] * 4 + [(0, 32)]  # the same noise and times for both and at each look, and once more draws
    assert [[name for name in r if name.startswith("final")] for r in records] == [
        [],
        ["final_bits_per_dim", "final_stderr", "final_items", "final_mc_samples"],
    ]
    assert records[0]["bits_per_dim"] == records[1]["bits_per_dim"]
    assert sum(line.strip().startswith("overfitting: ") for line in lines) == 2 * memorized
    official = replace(DATA, validation_from=70)  # may differ from training items without any memorization
    other = fit(CONFIG, official, tmp_path / "official", device="cpu", quiet=True)
    assert not any(r.get("overfit") for r in Run(other).read_metrics())
    if memorized:
        assert records[0]["gap"] == pytest.approx(0.5 / math.log(2), abs=1e-6)
    none = fit(replace_train(CONFIG, held_out=0.0), DATA, tmp_path / "none", device="cpu", quiet=True)
    assert not any("gap" in r for r in Run(none).read_metrics())


def test_missing_numbers_are_not_printed(tmp_path, monkeypatch):
    """There is no loss before fifty steps, and no standard error of a single held-out item."""
    lines = []
    monkeypatch.setattr(Monitor, "_draw", lambda *_: None)
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
    few = from_array(DATA.values[:3], name="three")
    folder = fit(replace_train(CONFIG, held_out=0.4), few, tmp_path / "run", device="cpu", quiet=True)
    first, last, exact = (re.sub(r"\d[\d.,]*", "#", line.strip()) for line in lines[1:])
    assert first == "#:#  step       #  held out ≤ # bits/dim"
    assert last == "#:#  step       #  loss #  held out ≤ # bits/dim  # items/s"
    assert exact == "final, with # noise levels per item: ≤ # bits/dim"
    assert "NaN" not in (folder / "metrics.jsonl").read_text()


def test_samples_that_are_not_finite_cost_the_run_only_its_image(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Diffusion, "sample", lambda model, n, **_: check_finite(torch.full((n, 2), math.inf)))
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
    folder = fit(CONFIG, DATA, tmp_path / "run", device="cpu", quiet=True)
    failures = [line for line in lines if line.startswith("no picture of the model: ")]
    assert len(failures) == 3
    assert all("became NaN or infinite" in line for line in failures)
    assert Run(folder).read_metrics()[-1]["step"] == 4
    assert not (folder / "pictures" / "samples.png").exists()


def line(*positions):
    """Features of one dimension."""
    return torch.tensor(positions, dtype=torch.float64)[:, None]


def copying(counts, held_out):
    """The test for items in groups (g, r + 1), of which item k is nearest to ``counts[g][k]`` samples.

    ``held_out[g]`` is the item of group g that was held out.
    """
    groups, size = len(counts), len(counts[0])
    positions = np.arange(groups * size, dtype=float).reshape(groups, size)
    samples = line(*np.repeat(positions.ravel(), np.ravel(counts)))
    mask = np.arange(size) == np.array(held_out)[:, None]
    train = positions[~mask].reshape(groups, size - 1).T.ravel()  # round by round: item g, g + m, ...
    return copying_test(samples, line(*train), line(*positions[mask]))


COUNTS = {
    "pairs": [[1, 0]] * 7,
    "uneven pairs": [[5, 0], [0, 4], [3, 1], [1, 2], [7, 0], [2, 0], [6, 0]],
    "threes": [[1, 0, 0], [2, 1, 0], [0, 0, 5], [3, 3, 1], [4, 0, 0]],
}


@pytest.mark.parametrize("name", COUNTS)
def test_false_alarms_of_the_copying_test_by_all_choices(name):
    """With every choice of the held-out items, P(p-value ≤ α) ≤ α at every attained α: for these and all counts."""
    counts = COUNTS[name]
    choices = itertools.product(range(len(counts[0])), repeat=len(counts))
    results = [copying(counts, choice) for choice in choices]
    p_values = np.array([result.p_value for result in results])
    for alpha in np.unique(p_values.round(12)) + 1e-11:
        assert (p_values <= alpha).mean() <= alpha
    assert p_values.min() < 0.05  # the bound is not vacuous
    assert np.mean([result.share for result in results]) == pytest.approx(results[0].expected)
    assert all(result.expected == pytest.approx(results[0].expected) for result in results)


def gaussian(n, seed, dims=8):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_power_of_the_copying_test(seed):
    """350 held-out and 1,400 training items, 500 samples: 60 % of copies are significant.

    Samples that are fresh, too smooth or near held-out items are not, though smooth ones are nearer to training items
    than held-out items are.
    """
    train, held_out, fresh = gaussian(1400, 3 * seed), gaussian(350, 3 * seed + 1), gaussian(500, 3 * seed + 2)
    copies = torch.cat([train[:300] + 0.01 * fresh[:300], fresh[300:]])
    result = copying_test(copies[torch.randperm(500, generator=torch.Generator().manual_seed(0))], train, held_out)
    assert result.significant
    assert result.share > 0.85
    assert result.expected == pytest.approx(0.8, abs=0.03)
    smooth = 0.5 * fresh
    assert nearest(smooth, train)[0].mean() < 0.8 * nearest(held_out, train)[0].mean()
    for samples in (fresh, smooth, held_out[:200] + 0.01 * fresh[:200]):
        result = copying_test(samples, train, held_out)
        assert not result.significant
        assert result.p_value > 1e-4


def test_all_training_items_belong_to_a_group():
    """Three held-out and seven training items: groups of 4, 3 and 3 items."""
    train, held_out = line(*range(0, 70, 10)), line(100, 110, 120)
    result = copying_test(train, train, held_out)
    assert (result.share, result.training, result.held_out) == (1, 7, 3)
    assert result.expected == pytest.approx((3 * 3 / 4 + 2 * 2 / 3 * 2) / 7)
    with pytest.raises(DataError, match="no items of a part"):
        copying_test(train, train, held_out[:0])


def test_of_equal_items_the_held_out_one_counts():
    """Then ties make no false alarm, however the items are ordered."""
    result = copying_test(line(0, 0, 5, 5), line(0, 5, 0, 5), line(0, 5))
    assert (result.share, result.p_value) == (0, 1)
