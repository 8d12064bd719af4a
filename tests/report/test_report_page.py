"""The page of a run from content that is known: its numbers, what is missing, hostile names, its size, its bytes."""

import json

import numpy as np
import pytest
import torch
from page_checks import check_page
from PIL import Image

from undiffuse.evaluation.memorization_test import MIN_GAP_ITEMS, generalization_gap
from undiffuse.report import run_report, run_sections
from undiffuse.report.run_report import Drawing, RunContent
from undiffuse.report.table import cell

HOSTILE = "<script>alert(1)</script>\"'&\u202e</style><!--"
RECORDS = [
    {"step": 50, "seconds": 30.0, "loss": 0.5},
    {"step": 60, "seconds": 40.0, "bits_per_dim": 2.5, "stderr": 0.25, "items": 64, "mc_samples": 8, "gap": -0.0312}
    | {"gap_stderr": 0.0444, "overfit": False, "final_bits_per_dim": 2.4321, "final_stderr": 0.0987}
    | {"final_items": 63, "final_mc_samples": 31},
]
EVALUATION = {
    "data": HOSTILE,
    "part": "held out for testing",
    "condition": "labels",
    "estimates": {
        "discrete": {
            "title": "bound of the chain, 7 of 10 steps",
            "is_bound": True,
            "bits_per_dim": {
                "prior": [0.1, 0.01],
                "diffusion": [1.5, 0.02],
                "decoder": [0.2, 0.03],
                "total": [1.8, 0.04],
            },
            "items": 77,
            "calls": 8,
            "mc_samples": 7,
        },
        "ode": {"bits_per_dim": {"total": [-1.75, 0.05]}, "items": 9, "calls": 123, "iw_samples": 1},
    },
    "bits_by_log_snr": {"discrete": {"edges": [-5.0, 0.0, 5.0], "bits": [0.5, 1.0]}},
    "explanations": ["<b>meaning</b>"],
}
METRIC = {"value": [2.59, 0.19, 2.22, 2.96], "floor": [2.54, 0.42, 1.7, 3.4], "n": 100, "features": "raw"}
METRIC |= {"title": "Fréchet distance", "better": "lower", "error": "jackknife of 10 groups", "units": "u"}
COPYING = {"share": 0.801, "expected": 0.805, "p_value": 0.5, "training": 1446, "held_out": 351, "significant": False}
COMPARISON = {
    "data": "d",
    "metrics": {"frechet": METRIC},
    "copying": COPYING | {"false_alarm_rate": 1e-6},
    "sampler": HOSTILE,
    "features": "raw",
    "nearest": [
        {"sample": 73, "items": [3, 4, 5], "training": [HOSTILE, "b.png", "c.png"], "distances": [1.5, 2.25, 3]}
    ],
}


def noise(side):
    return Image.fromarray(np.random.default_rng(0).integers(256, size=(side, side, 3)).astype(np.uint8))


def content(**changes):
    settings = {
        "run": "runs/x",
        "name": HOSTILE,
        "kind": "diffusion model",
        "record": {"finished": True, "config": {"train": {"lr": 0.001, "minutes": None, "on_nonfinite": HOSTILE}}},
        "records": RECORDS,
        "info": {"notes": [HOSTILE] * 30},
        "model": [("kind", "unet"), ("parameters", "1,234")],
        "evaluation": EVALUATION,
        "comparison": COMPARISON,
        "data": [("name", HOSTILE)],
        "drawings": {"samples": Drawing([noise(8)], [HOSTILE], HOSTILE), "solvers": Drawing(caption="No solvers")},
        "commands": {"evaluation": "undiffuse evaluate runs/x", "comparison": "undiffuse compare s"},
        "repeat": [HOSTILE, "undiffuse train d", "more"],
        "recipe": run_sections.recipe_json({"model": {"a": [1, None], "b": HOSTILE}, "x": True}),
    }
    return RunContent(**(settings | changes))


def test_numbers_are_those_that_are_stored():
    page = check_page(run_report.page(content()))
    shown = {text for _, text in page.texts}
    numbers = EVALUATION["estimates"]["discrete"]["bits_per_dim"]
    for part in ("prior", "diffusion", "decoder"):
        assert cell(tuple(numbers[part])) in shown
    assert "≤ 1.800 ± 0.040" in shown
    assert "−1.750 ± 0.050" in shown  # an estimate that is no bound
    for words in ("2.59 ± 0.19", "2.22 to 2.96", "2.54 ± 0.42", "100", "raw", "jackknife of 10 groups", "123", "77"):
        assert words in shown, words
    for words in (
        "1,446 training and 351",
        "80.1%",
        "80.5%",
        "p ≤ 0.5",
        "false-alarm rate of 1e-06",
        "≤ 2.432 ± 0.099",
    ):
        assert words in page.text, words
    assert "63 held-out items, 31 noise levels each" in page.text
    assert (
        "items, on the same noise and times, is −0.031 ± 0.044 bits/dim; the test has a false-alarm rate of 0.001"
        in page.text
    )
    assert {"≤ 2.50 ± 0.25", "b.png, at 2.25", "undiffuse evaluate runs/x", "undiffuse compare s"} <= shown
    assert "area below a curve" in page.text


@pytest.mark.parametrize("found", [True, False])
def test_the_flags_of_copies_and_overfitting(found):
    records = [r | ({"overfit": found} if "overfit" in r else {}) for r in RECORDS]
    comparison = COMPARISON | {"copying": COMPARISON["copying"] | {"significant": found}}
    page = check_page(run_report.page(content(records=records, comparison=comparison)))
    assert ("Training items are copied" in page.text) == found
    assert ("Overfitting: " in page.text) == found
    assert [p.get("class") for p in page.all("p")].count("bad") == 2 * found


@pytest.mark.parametrize(
    ("lowest", "stderr", "words"),
    [
        (2.4, 0.25, "Lowest: 2.40 ± 0.25 at step 20, within the standard error of the last, 2.50 ± 0.25."),
        (2.4, None, "Lowest: 2.400 at step 20."),  # of one item
        (2.0, 0.25, "Best: 2.00 ± 0.25 at step 20."),
        (2.6, 0.25, "Best: 2.50 ± 0.25 at step 60."),
    ],
)
def test_a_difference_within_the_standard_error_makes_no_best(lowest, stderr, words):
    earlier = {"step": 20, "bits_per_dim": lowest} | ({} if stderr is None else {"stderr": stderr})
    assert words in check_page(run_report.page(content(records=[earlier, *RECORDS]))).text


def test_overfitting_is_not_tested_with_few_items():
    d = torch.ones(MIN_GAP_ITEMS, dtype=torch.float64)
    assert generalization_gap(d, 0 * d, 1).significant
    assert not generalization_gap(d[1:], 0 * d[1:], 1).significant
    for items, proved in ((3, False), (MIN_GAP_ITEMS, True)):
        page = check_page(run_report.page(content(records=[RECORDS[0], RECORDS[1] | {"items": items}]))).text
        assert ("No overfitting is proved" in page) == proved
        assert ("Overfitting cannot be tested with 3 held-out items, at least 14 are needed" in page) != proved


def test_names_are_text_wherever_they_come_from():
    written = run_report.page(content())
    page = check_page(written)
    assert "<script" not in written
    assert "\u202e" not in written
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert len([text for tag, text in page.texts if tag == "li" and text.startswith("<script")]) == 20  # of 30 notes
    assert "and 10 more notes" in page.text
    assert json.loads(run_sections.recipe_json({"model": {"a": [1, None], "b": HOSTILE}, "x": True})) == {
        "model": {"a": [1, None], "b": HOSTILE},
        "x": True,
    }


def test_what_is_missing_says_so_with_the_command_that_adds_it():
    why = {"evaluation": "the stored one is of other weights"}
    page = check_page(run_report.page(content(evaluation=None, comparison=None, drawings={}, why=why, records=[])))
    lines = [text for _, text in page.texts]
    first = lines.index("No likelihood is measured: the stored one is of other weights. ")
    assert lines[first + 1 : first + 3] == ["undiffuse evaluate runs/x", " adds it."]
    assert "No distances are measured. " in lines
    assert "Whether training items are copied is not tested. " in lines
    assert "No steps are recorded yet." in lines


def test_results_of_other_commands_need_the_report_again():
    commands = {"evaluation": "evaluate r", "comparison": "report r", "report": "report r"}
    drawings = {"samples": Drawing(caption="No samples", command="sample r")}
    settings = {"evaluation": None, "comparison": None, "drawings": drawings, "commands": commands}
    page = check_page(run_report.page(content(**settings)))
    lines = [text for _, text in page.texts]
    for command in ("evaluate r", "sample r"):
        at = lines.index(command)
        assert lines[at + 1 : at + 4] == [", and then ", "report r", "."]
    at = lines.index("No distances are measured. ")
    assert lines[at + 1 : at + 3] == ["report r", " adds it."]


def test_a_page_of_large_pictures_is_within_its_size(monkeypatch):
    monkeypatch.setattr(run_report, "BUDGET", dict.fromkeys(run_report.BUDGET, 30_000))
    drawings = {name: Drawing([noise(120)] * 2, ["a"] * 2, "c", ["t"] * 2) for name in run_report.BUDGET}
    written = run_report.page(content(drawings=drawings))
    assert 150_000 < len(written) <= 6 * 30_000 * 4 / 3 + 30_000
    assert len(check_page(written).all("img")) == 2 * 6  # reconstructions are those of autoencoders
    monkeypatch.setattr(run_report, "MAX_BYTES", len(written) - 1)
    smaller = run_report.page(content(drawings=drawings))
    assert len(smaller) < len(written)


def test_the_pictures_of_a_page_have_room_in_it():
    assert 4 / 3 * sum(run_report.BUDGET.values()) - 4 / 3 * run_report.BUDGET["reconstructions"] < 0.9 * 3_000_000
    assert run_report.MAX_BYTES == 3_000_000


def test_only_held_out_items_are_called_so():
    page = check_page(run_report.page(content(evaluation=EVALUATION | {"part": "trained on"})))
    assert "bits/dim, 77 items" in page.text
    assert "bits/dim, 77 held-out items" in check_page(run_report.page(content())).text


def test_the_same_content_gives_the_same_bytes():
    assert run_report.page(content()) == run_report.page(content())


@pytest.mark.parametrize("kind", ["classifier", "autoencoder"])
def test_pages_of_other_models(kind):
    accuracy = [{"log_snr": 1.5, "accuracy": 0.875, "stderr": 0.0123, "items": 99}]
    records = [{"step": 9, "seconds": 1.0, "accuracy": 0.75, "items": 5}, {"step": 9, "l1": 0.125, "kl": 0.5}]
    page = check_page(run_report.page(content(kind=kind, info={"accuracy": accuracy}, records=records)))
    assert "Likelihood" not in [text for tag, text in page.texts if tag == "h2"]
    assert ("0.875 ± 0.012" in page.text) == (kind == "classifier")
    assert "0.125" in page.text
    empty = check_page(run_report.page(content(kind=kind, info={}, records=[])))
    assert ("No accuracy on test items is recorded." in empty.text) == (kind == "classifier")
