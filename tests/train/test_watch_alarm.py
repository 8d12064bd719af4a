"""The alarm for overfitting: how often it is false, exactly; what it finds; and the line of a run."""

import itertools
import math
import re

import numpy as np
import pytest
import torch

from undiffuse.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.data import Split, from_array
from undiffuse.diffusion import Diffusion
from undiffuse.likelihood import NLL
from undiffuse.sample import numbers
from undiffuse.train import Run, fit
from undiffuse.train.alarm import FALSE, gap, pairs
from undiffuse.train.watch import Watch


def test_what_it_says():
    held_out, trained_on = torch.tensor([3.0, 5.0, 4.0, 4.5]), torch.tensor([2.0, 2.5, 2.5, 2.5])
    said = gap(held_out, trained_on, 1)
    d = [1.0, 2.5, 1.5, 2.0]
    assert said.mean == pytest.approx(1.75)
    assert said.stderr == pytest.approx(np.std(d, ddof=1) / 2)
    assert not said.significant  # four pairs cannot be: 2 < √(2 ln 1000)
    assert gap(held_out.repeat(4), trained_on.repeat(4), 1).significant
    assert not gap(trained_on.repeat(4), held_out.repeat(4), 1).significant
    assert not gap(held_out, held_out, 1).significant
    assert math.isnan(gap(held_out[:1], trained_on[:1], 1).stderr)


@pytest.mark.parametrize("looks", [1, 9])
@pytest.mark.parametrize("sizes", [torch.ones(18), torch.logspace(0, 3, 18), torch.linspace(1, 2, 18)])
def test_false_alarms_by_all_signs(looks, sizes):
    """With every choice of signs of given differences, 2^18 of them, at most FALSE/looks alarm: for every law."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=9)), dtype=torch.float64)
    halves = [(signs * part.double()).sum(1) for part in (sizes[:9], sizes[9:])]
    sums = (halves[0][:, None] + halves[1]).flatten()
    threshold = math.sqrt(2 * math.log(looks / FALSE)) * float((sizes.double() ** 2).sum().sqrt())
    alarms = float((sums >= threshold).double().mean())
    assert alarms <= FALSE / looks
    at = sums[sums >= threshold].min() if alarms else None
    if at is not None:  # and the code draws the line there
        pattern = int((sums == at).nonzero()[0])
        d = torch.cat([signs[pattern // 512], signs[pattern % 512]]) * sizes.double()
        assert gap(d, torch.zeros(18), looks).significant


def test_what_it_finds():
    """Of 64 pairs of normal bits, 0.9 standard deviations of their difference apart: more than 9 of 10, at 9 looks."""
    g = torch.Generator().manual_seed(0)
    found = [gap(torch.randn(64, generator=g) + 0.9, torch.zeros(64), 9).significant for _ in range(200)]
    assert sum(found) > 180
    assert not gap(torch.randn(64, generator=g) + 0.1, torch.zeros(64), 9).significant


def test_pairs():
    split = Split(np.arange(100, 150), np.arange(20), np.arange(60, 70))
    held_out, trained_on = pairs(split, 64)
    assert sorted(held_out) == list(range(20))
    assert len(set(trained_on)) == 20
    assert set(trained_on) <= set(range(100, 150))
    assert list(held_out) != sorted(held_out)
    again = pairs(split, 64)
    assert list(again[0]) == list(held_out)
    assert list(again[1]) == list(trained_on)
    assert [len(part) for part in pairs(split, 7)] == [7, 7]
    assert [len(part) for part in pairs(Split(np.arange(9), np.arange(0), np.arange(0)), 64)] == [0, 0]


DATA = from_array(np.random.default_rng(0).normal(size=(80, 2)).astype(np.float32), name="vectors")
CONFIG = Config(
    ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, steps=5),
    TrainConfig(batch=8, steps=4, warmup=2, lr=0.01, precision="float32", previews=2, held_out=0.3, snapshots=0),
)


@pytest.mark.parametrize("remembers", [False, True])
def test_a_run_says_it(tmp_path, monkeypatch, remembers):
    """The bound is that of a model which knows the training items by heart, or of one that knows none."""
    known = {tuple(row) for row in DATA.values[DATA.split(0.3).train].tolist()}
    asked, said = [], []

    def nll(model, values, **settings):
        asked.append((settings["seed"], settings["draws"]))
        easy = torch.tensor([remembers and tuple(row) in known for row in values.tolist()])
        bits = torch.where(easy, 1.0, 2.0) + 0.1 * torch.randn(len(values), generator=torch.Generator().manual_seed(3))
        zero = torch.zeros(len(values))
        return NLL(prior=bits, steps=zero, decoder=zero, stderr=torch.tensor(0.1), calls=1, per_step=None)

    monkeypatch.setattr(Diffusion, "nll", nll)
    monkeypatch.setattr(Watch, "_draw", lambda *_: None)
    monkeypatch.setattr(Watch, "say", lambda watch, line: said.append(line))
    folder = fit(CONFIG, DATA, tmp_path / "run", device="cpu", quiet=True)
    looks = [r for r in Run(folder).read_metrics() if "gap" in r]
    assert [r["overfit"] for r in looks] == [remembers] * 2
    assert asked == [(0, 8)] * 4 + [(0, 32)]  # the same noise and times for both and at each look, and once more draws
    assert [[name for name in r if name.startswith("final")] for r in looks] == [
        [],
        ["final_bits_per_dim", "final_stderr"],
    ]
    assert looks[0]["bits_per_dim"] == looks[1]["bits_per_dim"]
    assert sum("it begins to remember its training items" in line for line in said) == 2 * remembers
    if remembers:
        assert looks[0]["gap"] == pytest.approx(0.5 / math.log(2), abs=1e-6)
    none = fit(replace_train(CONFIG, held_out=0.0), DATA, tmp_path / "none", device="cpu", quiet=True)
    assert not any("gap" in r for r in Run(none).read_metrics())


def test_what_is_not_known_is_not_said(tmp_path, monkeypatch):
    """Before fifty steps there is no loss yet, and of one held-out item there is no error."""
    said = []
    monkeypatch.setattr(Watch, "_draw", lambda *_: None)
    monkeypatch.setattr(Watch, "say", lambda watch, line: said.append(line))
    few = from_array(DATA.values[:3], name="three")
    folder = fit(replace_train(CONFIG, held_out=0.4), few, tmp_path / "run", device="cpu", quiet=True)
    first, last, exact = (re.sub(r"\d[\d.,]*", "#", line.strip()) for line in said[1:])
    assert first == "#:#  step       #  held out ≤ # bits/dim"
    assert last == "#:#  step       #  loss #  held out ≤ # bits/dim  # items/s"
    assert exact == "at the end, of # draws and not #: ≤ # bits/dim"
    assert "NaN" not in (folder / "metrics.jsonl").read_text()


def test_samples_that_are_no_numbers_cost_the_run_its_picture_alone(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Diffusion, "sample", lambda model, n, **_: numbers(torch.full((n, 2), math.inf)))
    monkeypatch.setattr(Watch, "say", lambda watch, line: said.append(line))
    folder = fit(CONFIG, DATA, tmp_path / "run", device="cpu", quiet=True)
    lost = [line for line in said if line.startswith("no picture of the samples: ")]
    assert len(lost) == 3
    assert all("grew beyond all numbers" in line for line in lost)
    assert Run(folder).read_metrics()[-1]["step"] == 4
    assert not (folder / "pictures" / "samples.png").exists()
