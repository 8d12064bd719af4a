"""An evaluation as rows, sentences, a figure and files, from numbers that are known."""

import csv
import math

import numpy as np
import pytest
import torch
from evaluation_models import model_of

from undiffuse.data.transform import IntegerLevels
from undiffuse.evaluation.run_evaluation import EvaluationResult
from undiffuse.likelihood.nll import make_nll
from undiffuse.report import evaluation_report as report

MODEL = model_of((20,), IntegerLevels(256))
UNIT = 20 * math.log(2)


def nll(*bits, calls=7):
    """An estimate whose total is ``bits`` of each item, one of them in the prior and one in the decoder."""
    total = torch.tensor(bits, dtype=torch.float64)
    one = torch.ones_like(total)
    per_step = ((total - 2) / 5)[:, None].expand(-1, 5)
    return make_nll(UNIT * one, UNIT * (total - 2), UNIT * one, calls, UNIT * per_step)


FACTS = {"data": "d", "part": "held out", "condition": "labels"}
RESULT = EvaluationResult(
    MODEL,
    FACTS,
    np.array([8, 0, 4]),
    {"discrete": nll(3.0, 5.0, 4.0), "ode": nll(3.5, 4.5), "openai": nll(3.1, 5.1, 4.1)},
    {"discrete": 1234.0, "ode": 2.0, "openai": 3.0},
    {"discrete": 2, "ode": 2, "openai": None},
)


def test_rows():
    (chain, flow, script), title = report.evaluation_rows(RESULT.summary())
    assert chain == {
        "estimate": "bound of the chain, 2 of 5 steps",
        "prior": (pytest.approx(1), pytest.approx(0)),
        "diffusion": (pytest.approx(2), pytest.approx(1 / math.sqrt(3))),
        "decoder": (pytest.approx(1), pytest.approx(0)),
        "total": "≤ 4.00 ± 0.58",
        "items": 3,
        "calls per item": 7,
        "time": "1,234 s",
    }
    assert flow["total"] == "  4.00 ± 0.50"  # several importance samples with an estimated divergence are no bound
    assert script["total"].startswith("  4.10")
    assert title == "d, held out: bits per dimension, given labels ± standard error"


def test_differences_are_paired():
    paired, script = report.describe_differences(RESULT.summary()["minus_discrete"])
    assert paired == "difference to the bound of the chain, paired by item: probability flow 0.00 ± 0.50"
    assert (
        "script is off by 0.100 ± 0.000 bits/dim over the same steps and noise, of which 0.000 ± 0.000 is in" in script
    )
    for cause in ("tanh", "1e-12", "float32", "clips"):
        assert cause in script
    assert report.describe_differences({}) == []


def test_the_figure_names_the_parts():
    axes = report.bits_figure(MODEL, {"discrete": RESULT.nll["discrete"]}).axes[0]
    assert axes.get_title("left") == "at most 4.000 bits per dimension"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["chain: 4.000 = prior 1 + diffusion 2.000 + decoder 1.000"]


def test_items_are_written_in_the_order_of_the_data(tmp_path):
    report.write_items(tmp_path / "items.csv", RESULT)
    with open(tmp_path / "items.csv") as file:
        header, *rows = csv.reader(file)
    assert header == ["index", "discrete", "ode", "openai"]
    assert [row[0] for row in rows] == ["0", "4", "8"]
    assert [float(row[1]) for row in rows] == pytest.approx([5, 4, 3])
    assert [row[2] == "" for row in rows] == [False, True, False]


def test_without_matplotlib_there_is_no_figure(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    first, last = report.write_evaluation(RESULT, tmp_path)
    assert first.startswith("no figure: error[MISSING] matplotlib")
    assert last.startswith(f"all numbers: {tmp_path}/evaluation.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation-items.csv", "evaluation.json"]
