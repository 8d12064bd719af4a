"""The report command on a run of the command line: what it measures, stores, prints and refuses."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from page_checks import check_page
from tiny_run import NET

from undiffuse.cli import report
from undiffuse.data.sources.registry import load as load_data
from undiffuse.evaluation import plan
from undiffuse.model import checkpoint, presets
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.report.table import cell
from undiffuse.training import diffusion_task

RECIPE = Config(
    ModelConfig(network=NET, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=5),
    TrainConfig(batch=8, warmup=1, precision="float32", previews=1, snapshots=0, held_out=0.3),
)


@pytest.fixture
def place(tmp_path, monkeypatch, call):
    """A folder with data and a run of three steps on them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets, "get", lambda name: RECIPE)
    monkeypatch.setattr(plan, "PLANNED_FRACTION", 0.01)
    monkeypatch.setattr(diffusion_task, "FINAL_ITEMS", 4)
    values = np.random.default_rng(0).integers(5, size=(100, 4, 4, 1)).astype(np.uint8)
    np.savez(tmp_path / "items.npz", x=values, y=np.arange(100) % 2)
    code, _, err = call("train", "items.npz", "--num-values", 5, "--steps", 3, "--out", "run", "--conditional")
    assert (code, err) == (0, "")
    return tmp_path


def test_it_measures_what_the_run_lacks_and_shows_it(place, call):
    code, out, err = call("report", "run", "--minutes", 0.1)
    assert (code, err) == (0, "")
    commands = [line for line in out.splitlines() if line.startswith("$ ")]
    assert commands[0] == "$ undiffuse evaluate run --minutes 0.05"
    n = int(commands[1].split("--n ")[1].split()[0])
    assert commands[1:] == [
        f"$ undiffuse sample run --n {n} --label all --out run/samples/report",
        "$ undiffuse compare run/samples/report --out run/comparison",
    ]
    written = (place / "run" / "report.html").read_bytes()
    page = check_page(written.decode())
    shown = {text for _, text in page.texts}
    evaluation = json.loads((place / "run" / "evaluation.json").read_text())
    assert "undiffuse evaluate run --minutes 0.05" in shown
    for numbers in evaluation["estimates"].values():
        assert f"{'≤ ' * numbers['is_bound']}{cell(tuple(numbers['bits_per_dim']['total']))}".replace("-", "−") in shown
    comparison = json.loads((place / "run" / "comparison" / "compare.json").read_text())
    for metric in comparison["metrics"].values():
        assert cell(tuple(metric["value"][:2])).replace("-", "−") in shown
    assert f"p ≤ {comparison['copying']['p_value']:.1g}" in page.text
    assert comparison["weights"] == evaluation["digest"]
    assert {line.removeprefix("$ ") for line in commands} <= shown
    assert "Samples, drawn by dpm++2m_sde in 5 steps, label all, seed 0, compared with items" in page.text
    printed = call("report", "run", "--minutes", 0, "--json")
    assert json.loads(printed.out)["evaluation"]["estimates"] == evaluation["estimates"]
    assert printed.err.startswith("report: run/report.html")
    assert len(page.all("img")) == 1 + 2 + 5 + 1 + 1  # samples, strips, solvers, nearest items, data

    code, out, _ = call("report", "run", "--minutes", 0.1)  # nothing is measured again
    assert (code, "$ " in out) == (0, False)
    assert (place / "run" / "report.html").read_bytes() == written


def test_what_does_not_fit_into_the_time_is_a_line_with_the_minutes_that_suffice(place, call):
    code, out, err = call("report", "run", "--minutes", 1e-9)
    assert (code, err) == (0, "")
    lines = " ".join(out.split())
    assert "not measured: distances and copies, because 20 samples do not fit into the time: give --minutes 1" in lines
    assert "Solvers are not shown side by side: " in lines
    assert "undiffuse report run --minutes 1 adds it" in lines


def test_samples_have_no_label_where_classes_are_of_unequal_frequency(place, call):
    """Samples with each label in turn are as far from such data as their frequencies are."""
    values = np.load(place / "items.npz")["x"]
    np.savez(place / "items.npz", x=values, y=np.arange(100) % 10 == 0)
    command = ("train", "items.npz", "--num-values", 5, "--steps", 3, "--out", "uneven", "--conditional")
    assert call(*command).code == 0
    commands = [line for line in call("report", "uneven", "--minutes", 0.1).out.splitlines() if line[:2] == "$ "]
    assert ["--label" in line for line in commands] == [False] * 3


@pytest.mark.parametrize(("data", "words"), [("digits", " digits"), ("./digits", " ./digits"), (None, "")])
def test_a_folder_with_the_name_of_a_built_in_data_set(data, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = functools.partial(load_data)
    assert report._Measuring(None, None, data, read, {}).words == words
    if data:
        assert report._Measuring(None, None, str(tmp_path / "digits"), read, {}).words == " ./digits"


@pytest.mark.parametrize(("counts", "in_turn"), [([4, 5], True), ([4, 6], False), ([0, 5], False), (None, True)])
def test_labels_in_turn_are_for_classes_within_a_quarter(counts, in_turn):
    model = SimpleNamespace(trained_condition_sizes={"classes": 2}, condition_sizes={"classes": 2})
    data = SimpleNamespace(labels=None if counts is None else np.repeat([0, 1], counts))
    assert report._labels_in_turn(model, data) is in_turn
    assert not report._labels_in_turn(SimpleNamespace(trained_condition_sizes={}), data)


def test_files_of_the_user_and_data_that_are_not_those_of_the_run(place, call):
    (place / "mine.html").write_text("mine")
    code, _, err = call("report", "run", "--minutes", 0, "--out", "mine.html")
    assert (code, err.count("\n"), "this file is not a report" in err) == (2, 1, True)
    assert (place / "mine.html").read_text() == "mine"
    (place / "items.npz").rename(place / "moved.npz")
    code, out, err = call("report", "run", "--minutes", 0, "--out", "new.html")
    assert (code, err) == (0, "")
    assert "Without the data of the run: the data that the run was trained on are not there." in out
    assert "Without the data of the run" in check_page((place / "new.html").read_text()).text
    code, _, err = call("report", "run", "moved.npz", "--num-values", 5, "--minutes", 0, "--out", "new.html")
    assert (code, err) == (0, "")
    assert "Without the data" not in (place / "new.html").read_text()
    code, _, err = call("report", "run", "moved.npz", "--num-values", 6, "--minutes", 0)
    assert (code, err.count("\n"), "not the data that the run was trained on" in err) == (3, 1, True)


def test_data_of_another_shape_than_those_of_a_model_without_facts(place, call):
    model = checkpoint.load(place / "run")
    model.info = {"num_values": 5}
    (place / "bare").mkdir()
    checkpoint.save(model, place / "bare" / "model.safetensors")
    np.save(place / "wide.npy", np.zeros((30, 1, 9, 9), np.uint8))
    said = call("report", "bare/model.safetensors", "wide.npy", "--num-values", 5, "--minutes", 0)
    assert (said.code, said.err.count("\n"), "its items are 1×9×9" in said.err) == (3, 1, True)


def test_another_model_in_the_folder_of_a_run_has_its_report_in_a_folder_of_its_own(place, call):
    """Its measurements would replace those of the run's model."""
    model = checkpoint.load(place / "run")
    with torch.no_grad():
        next(model.network.parameters()).add_(1)
    checkpoint.save(model, place / "run" / "model-ema-0.08.safetensors")
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    said = call("report", "run/model-ema-0.08.safetensors", "--minutes", 0.1)
    assert (said.code, said.out) == (2, "")
    assert said.err == (
        "error[RUN] run/model-ema-0.08.safetensors: a report is of a folder, and this is not its model.safetensors. "
        "Copy it to model.safetensors in a new folder, and give that folder and DATA with its options.\n"
    )
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    (place / "other").mkdir()
    checkpoint.save(model, place / "other" / "model.safetensors")
    said = call("report", "other", "items.npz", "--num-values", 5, "--minutes", 0.1)
    assert (said.code, said.err) == (0, "")
    assert json.loads((place / "other" / "evaluation.json").read_text())["digest"] == checkpoint.fingerprint(model)


@pytest.mark.parametrize(
    ("arguments", "code"), [(("nothing",), 4), (("run", "--minutes", -1), 2), (("run", "--minutes", "nan"), 2)]
)
def test_errors_are_one_line(place, call, arguments, code):
    said = call("report", *arguments)
    assert (said.code, said.err.count("\n"), said.err[:6]) == (code, 1, "error[")


def test_damaged_results_are_measured_again_where_nothing_else_is_in_the_way(place, call):
    (place / "run" / "evaluation.json").write_text('{"estimates": {}}')
    damaged = place / "run" / "comparison" / "compare.json"
    damaged.parent.mkdir()
    damaged.write_text('{"metrics": {}}')
    code, out, err = call("report", "run", "--minutes", 0.1)
    assert (code, err) == (0, "")
    assert "not measured: error[OUT] run/comparison: its compare.json is damaged, edited or not ours" in out
    page = check_page((place / "run" / "report.html").read_text())
    assert "No distances are measured: its compare.json is damaged, edited or not ours" in page.text
    assert "No likelihood is measured" not in page.text
    assert damaged.read_text() == '{"metrics": {}}'


def test_training_names_a_report_only_where_it_wrote_one(place, call):
    again = ("train", "items.npz", "--num-values", 5, "--conditional", "--out", "run", "--extend", "--steps", 1)
    code, out, _ = call(*again)
    assert (code, "done: run/model.safetensors; report: run/report.html" in out) == (0, True)
    (place / "run" / "report.html").write_text("mine")
    code, out, _ = call(*again)
    assert (code, "done: run/model.safetensors\n" in out, "; report:" in out) == (0, True, False)
