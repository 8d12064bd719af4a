"""The report of a run: written at the end of training, from what is stored, for runs of every state."""

import json
import os
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from latent_models import tiny_autoencoder
from page_checks import check_page
from tiny_run import data, recipe, stopping_at, train

from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model import autoencoder, checkpoint
from undiffuse.model.config import Config, from_dict, read
from undiffuse.model.presets import PRESETS, get
from undiffuse.report.sample_folder import write_samples
from undiffuse.report.table import cell
from undiffuse.runtime.precision import resolve_precision
from undiffuse.runtime.side_files import write_record
from undiffuse.sampling.sampler import Sampler
from undiffuse.training import monitor, run_report
from undiffuse.training.repeat_command import repeat
from undiffuse.training.run_folder import Run

DATA = data()
AUTO = resolve_precision("auto", torch.device("cpu"))
OTHER = "float32" if AUTO == "bfloat16" else "bfloat16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(recipe(), tmp_path_factory.mktemp("run") / "a run", DATA)


def collected(folder, dataset=DATA, **settings):
    split = None if dataset is None else dataset.split(0.2)
    return run_report.collect(Run(folder), checkpoint.load(folder), dataset, split, **settings)


def page_of(content):
    return check_page(run_report.run_report.page(content))


def test_every_training_writes_a_page(folder):
    page = check_page((folder / "report.html").read_text())
    headings = [text for tag, text in page.texts if tag == "h2"]
    assert headings[:4] == ["Samples", "Between data and noise", "Solvers from the same noise", "Training"]
    assert "Its training has not finished." not in page.text
    assert "64 samples by ddim in 5 steps, seed 0." in page.text
    assert "200 network calls do not fit into the time" not in page.text
    final = [r for r in Run(folder).read_metrics() if "final_bits_per_dim" in r][-1]
    assert f"≤ {cell((final['final_bits_per_dim'], final['final_stderr']))}" in page.text
    assert "No likelihood is measured" in page.text
    command = f"undiffuse evaluate {shlex.quote(str(folder))} DATA"  # an array of Python has no name
    assert ("code", command) in page.texts


@pytest.mark.parametrize(
    ("measured", "options"),
    [
        ({"part": "held out for testing", "seed": 0}, ""),
        ({"part": "trained on", "seed": 5}, " --part train --seed 5"),
        ({"part": "all, including training items"}, " --part all"),
        ({"part": "held out for testing", "options": {"items": None, "minutes": 5.0, "exact": False}}, ""),
        (
            {"part": "all", "options": {"estimate": ["ode", "discrete"], "items": 30, "exact": True, "minutes": 0.5}},
            " --part all --estimate ode --estimate discrete --items 30 --exact --minutes 0.5",
        ),
        ({"part": "test part of other data than the training data"}, " --part test"),
        ({"part": "held out for testing", "precision": AUTO}, ""),
        ({"part": "held out for testing", "precision": "float64"}, ""),
        (
            {"part": "held out for testing", "precision": OTHER, "options": {"items": 3}},
            f" --items 3 --precision {OTHER}",
        ),
    ],
)
def test_the_command_of_an_evaluation_has_its_options(folder, measured, options):
    commands = run_report.measuring_commands(Run(folder), checkpoint.load(folder), DATA, " --own", " d.npy", measured)
    assert commands["evaluation"] == f"undiffuse evaluate {shlex.quote(str(folder))} d.npy{options} --own"


def test_the_command_of_a_comparison_has_its_options(folder):
    record = {"weights": checkpoint.fingerprint(checkpoint.load(folder)), "samples": "s", "files": []}
    given = {"metric": ["recall", "kernel"], "features": "pca", "items": 30, "held_out": None, "seed": 0}
    try:
        for options, words in (
            (given, " --metric recall --metric kernel --features pca --items 30"),
            (given | {"metric": [], "features": None, "items": 2000, "seed": 4}, " --seed 4"),
            (None, ""),
        ):
            (folder / "comparison").mkdir(exist_ok=True)
            write_record(folder / "comparison" / "compare.json", record | {"options": options})
            command = collected(folder).commands["comparison"]
            assert command == f"undiffuse compare s DATA{words} --out {shlex.quote(str(folder / 'comparison'))}"
    finally:
        shutil.rmtree(folder / "comparison")


def test_a_page_is_a_function_of_the_run_and_has_all_its_pictures(folder):
    content = collected(folder)
    assert {name: len(d.images) for name, d in content.drawings.items()} == {
        "data": 1,
        "samples": 1,
        "forward": 1,
        "reverse": 1,
        "solvers": 5,
    }
    assert "Conditions, in turn: 0, 1, 2." in content.drawings["solvers"].caption
    assert ("weights", checkpoint.fingerprint(checkpoint.load(folder))) in content.model
    page_of(content)
    assert run_report.run_report.page(content) == run_report.run_report.page(collected(folder))


def test_pictures_that_cost_too_much_are_left_out_with_the_command_that_adds_them(folder):
    content = collected(folder, max_calls=20)  # four items by five steps
    assert content.drawings["reverse"].images
    assert not content.drawings["solvers"].images
    page = page_of(content)
    assert "Solvers are not shown side by side" in page.text
    assert ("code", f"undiffuse report {shlex.quote(str(folder))} DATA") in page.texts


def test_stored_results_are_shown_only_if_they_are_whole_and_of_these_weights(folder, tmp_path):
    weights = checkpoint.fingerprint(checkpoint.load(folder))
    record = {"digest": weights, "data": "d", "part": "all", "files": []}
    record["estimates"] = {"discrete": {"bits_per_dim": {"total": [1.25, 0.125]}, "items": 3, "calls": 4}}
    path = folder / "evaluation.json"
    try:
        write_record(path, record)
        assert collected(folder).evaluation["estimates"] == record["estimates"]
        write_record(path, record | {"digest": "0" * 64})
        assert (collected(folder).evaluation, collected(folder).why["evaluation"]) == (
            None,
            "the stored one is of other weights",
        )
        assert "evaluation" in run_report.missing_parts(Run(folder), checkpoint.load(folder))[0]
        path.write_text(path.read_text().replace("1.25", "0.25"))
        assert "damaged or was edited" in collected(folder).why["evaluation"]
    finally:
        path.unlink()


def test_the_newest_samples_of_these_weights_are_shown(folder, tmp_path):
    run, model = tmp_path / "copy", checkpoint.load(folder)
    shutil.copytree(folder, run)
    plan = {"weights": checkpoint.fingerprint(model), "seed": 3, "sampler": Sampler("ddim", 2, guidance=1.5).to_dict()}
    shown = []
    for age, (name, changes) in enumerate(
        [("old", {}), ("new", {"label": ["all"]}), ("other", {"weights": "0"}), ("report", {"seed": 0}), ("last", {})]
    ):
        values = model.sample(2 + age, sampler=Sampler("ddim", 2)).numpy()
        write_samples(run / "samples" / name, values, model.info["num_values"], plan | changes)
        os.utime(run / "samples" / name / "manifest.json", (age, age))
        shown.append(collected(run).drawings["samples"].caption)
    assert shown == [
        "2 samples of 2, ddim in 2 steps, guidance 1.5, seed 3, from samples/old.",
        "3 samples of 3, ddim in 2 steps, label all, guidance 1.5, seed 3, from samples/new.",
        "3 samples of 3, ddim in 2 steps, label all, guidance 1.5, seed 3, from samples/new.",
        "5 samples of 5, ddim in 2 steps, guidance 1.5, seed 0, from samples/report.",
        "5 samples of 5, ddim in 2 steps, guidance 1.5, seed 0, from samples/report.",
    ]


def test_a_file_of_the_user_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("<!doctype html>\n<p>mine</p>")
    with pytest.raises(ConfigError, match="this file is not a report"):
        run_report.check_page(path)
    printed = []
    monkeypatch.setattr(monitor.Monitor, "log", lambda self, line: printed.append(line))
    place = tmp_path / "run"
    real = run_report.collect

    def with_a_file(run, *arguments, **options):
        (run.folder / "report.html").write_text("mine")
        return real(run, *arguments, **options)

    monkeypatch.setattr(monitor, "collect", with_a_file)
    train(recipe(max_steps=3, snapshots=0), place, DATA)
    assert (place / "report.html").read_text() == "mine"
    assert "no report: this file is not a report" in printed
    assert Run(place).finished


def test_a_run_killed_while_it_writes_its_report_writes_it_when_resumed(tmp_path, monkeypatch):
    settings = recipe(max_steps=3, snapshots=0)

    def dies(path, content):
        (path.parent / "report.html.partial").write_text("<html>")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(monitor, "write_page", dies)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path, DATA)
    assert not Run(tmp_path).finished
    train(settings, tmp_path, DATA)
    assert Run(tmp_path).finished
    assert (tmp_path / "report.html").is_file()
    assert not list(tmp_path.rglob("*.partial"))
    assert [record["step"] for record in Run(tmp_path).read_metrics() if "bits_per_dim" in record] == [2, 3]


def test_runs_without_data_without_a_model_and_unfinished(folder, tmp_path):
    content = collected(folder, None)
    page = page_of(content)
    assert "The forward process is not drawn: it needs the data of the run." in page.text
    with stopping_at(2):
        train(recipe(max_steps=40, snapshots=0), tmp_path, DATA)
    page = page_of(run_report.collect(Run(tmp_path), None, DATA, DATA.split(0.2)))
    assert "Its training has not finished." in page.text
    assert "No samples are drawn yet" in page.text
    assert "tiny: diffusion model" in page.text


def test_a_damaged_run_is_one_error(folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        run_report.load_model(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError):
        run_report.collect(Run(tmp_path), None)


def test_an_autoencoder_is_loaded_onto_the_device(tmp_path, monkeypatch):
    autoencoder.save(tiny_autoencoder(), tmp_path / "model.safetensors")
    assert isinstance(run_report.load_model(tmp_path), autoencoder.Autoencoder)
    monkeypatch.setattr(autoencoder, "load", lambda path, device="": (path.name, device))
    assert run_report.load_model(tmp_path / "model.safetensors", "cpu:0") == ("model.safetensors", "cpu:0")


@pytest.mark.parametrize("base", sorted(PRESETS)[:3])
def test_the_recipe_on_a_page_is_that_of_the_run(folder, tmp_path, base):
    record = Run(folder).record
    lines, text = repeat(record, "diffusion model")
    assert lines[1].split() == [
        "undiffuse",
        "train",
        "DATA",
        "--config",
        "recipe.json",
        "--seed",
        "4",
        "--out",
        "NEW",
    ] or ("--network FILE.py:NAME" in lines[1])
    (tmp_path / "recipe.json").write_text(text)
    assert read(tmp_path / "recipe.json", get(base)) == from_dict(Config, record["config"])
    shown = "".join(
        text for tag, text in check_page((folder / "report.html").read_text()).texts if text.startswith("{")
    )
    assert json.loads(shown) == record["config"]


def test_the_command_names_data_and_options_without_their_folders():
    record = {"config": {"model": {"network": {"kind": "unet"}, "schedule": {}}, "train": {"max_steps": 5, "seed": 7}}}
    record["data"] = {"source": "/home/me/secret/photos x", "options": {"size": 32, "captions": True}}
    record |= {"init": "f" * 64, "extended": [{}]}
    lines, _ = repeat(record, "diffusion model")
    assert lines[1] == (
        "undiffuse train 'photos x' --size 32 --captions --config recipe.json --seed 7 --init INIT --out NEW"
    )
    assert "secret" not in "".join(lines)
    record["data"]["source"] = "/home/me/digits"  # a folder, not the built-in data set
    assert "train ./digits --size" in repeat(record, "diffusion model")[0][1]
    assert any("extended 1 time" in line for line in lines)
    config = record["config"] | {"teacher": "e" * 64, "method": "lagrangian", "pairs": "data", "guidance": 1.00000025}
    config |= {"both_ways": True, "model": {"calls": 2, "network": {"kind": "Mine"}, "schedule": {}}}
    config |= {"train": {"max_steps": None, "minutes": 2.50000025, "seed": 0}}
    lines, text = repeat(record | {"config": config}, "")
    assert lines[:2] == [
        "TEACHER is the run with the weights eeeeeeeeeeeeeeee. Run in the folder of the data:",
        "undiffuse distill TEACHER ./digits --size 32 --captions --calls 2 --method lagrangian --pairs data "
        "--guidance 1.00000025 --both-ways --seed 0 --minutes 2.50000025 --network FILE.py:NAME --out NEW",
    ]
    assert text == ""


def test_data_in_words(folder):
    facts = dict(run_report.data_facts(Run(folder).record["data"], DATA, DATA.split(0.2), {}))
    assert facts["item"] == "1×4×4, 5 values"
    assert dict(run_report.data_facts({"item_shape": [2]}, None, None, {}))["item"] == "2 columns, continuous values"
    counts = np.bincount(DATA.labels)
    assert facts["classes"] == f"3: 0 ({counts[0]}), 1 ({counts[1]}), 2 ({counts[2]})"
    assert re.fullmatch(r"\d+ training, \d+ validation, \d+ test", facts["parts"])
