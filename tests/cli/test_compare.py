"""The compare command: its table, its files and its errors."""

import json

import numpy as np
import pytest
from evaluation_models import model_for

from undiffuse import load_data
from undiffuse.evaluation.features import EXTRACTORS
from undiffuse.evaluation.metrics import METRICS
from undiffuse.model import checkpoint
from undiffuse.report.comparison_report import DEFAULTS
from undiffuse.report.sample_folder import write_samples

RNG = np.random.default_rng(0)
VALUES = RNG.integers(0, 17, size=(400, 1, 8, 8)).astype(np.uint8)


@pytest.fixture
def place(tmp_path):
    np.save(tmp_path / "data.npy", VALUES)
    write_samples(tmp_path / "samples", RNG.integers(0, 17, size=(60, 1, 8, 8)).astype(np.uint8), 17, {"seed": 1})
    return tmp_path


def test_the_table_and_the_files(place, call):
    command = ["compare", place / "samples", place / "data.npy", "--num-values", 17, "--out", place / "out"]
    code, out, err = call(*command)
    assert (code, err) == (0, "")
    assert "n = 60, features raw" in out
    for metric in METRICS.values():
        assert metric.title in out
    assert "no evidence that training items are copied" in out
    assert f"written: {place}/out/compare.json, {place}/out/nearest.png\n" in out
    assert (place / "out" / "nearest.png").is_file()
    summary = json.loads((place / "out" / "compare.json").read_text())
    assert list(summary["metrics"]) == list(METRICS)
    assert {name: value for name, value in summary["options"].items() if value is not None} == DEFAULTS
    assert summary["samples"] == str(place / "samples")
    assert (summary.pop("files"), len(summary.pop("sha256"))) == (["nearest.png"], 64)
    code, out, _ = call(*command[:-2], "--json")
    assert json.loads(out) == summary
    assert call(*command).code == 0  # again, into its own folder


@pytest.mark.parametrize("name", ["compare.json", "nearest.png", "notes.txt"])
def test_a_folder_of_other_files_is_refused(place, call, name):
    (place / "out").mkdir()
    (place / "out" / name).write_text("mine")
    said = call("compare", place / "samples", place / "data.npy", "--num-values", 17, "--out", place / "out")
    assert (said.code, said.err.count("\n"), said.err[:11]) == (2, 1, "error[OUT] ")
    assert [(f.name, f.read_text()) for f in (place / "out").iterdir()] == [(name, "mine")]


def test_metrics_and_features_by_name(place, call):
    np.save(place / "copies.npy", VALUES[:200])
    command = ["compare", place / "copies.npy", place / "data.npy", "--num-values", 17, "--features", "random_conv"]
    code, out, _ = call(*command, "--metric", "kernel", "--metric", "recall", "--items", 30, "--json")
    summary = json.loads(out)
    assert (code, list(summary["metrics"]), summary["n"]) == (0, ["kernel", "recall"], 30)
    assert summary["features"] == "random_conv"
    given = {"metric": ["kernel", "recall"], "features": "random_conv", "items": 30, "held_out": None, "seed": 0}
    assert summary["options"] == given
    for option, names in (("--metric", METRICS), ("--features", EXTRACTORS)):
        code, _, err = call(*command, option, "fid")
        assert (code, err.count("\n")) == (2, 1)
        assert ", ".join(names) in err
        assert ", ".join(names) in " ".join(call("compare", "--help").out.replace("│", " ").split())


def test_a_run_that_is_not_there(place, call):
    said = call("compare", place / "samples", place / "data.npy", "--num-values", 17, "--run", place / "none")
    fix = "Name a run folder or a model file"
    assert (said.code, said.err) == (2, f"error[NOT_FOUND] --run {place}/none: no such run. {fix}.\n")


def test_the_fraction_that_the_model_of_the_samples_held_out(place, call):
    """A lone model file has no run.json, but says what was held out; a cascade holds out what all its stages do."""
    data = load_data(place / "data.npy", num_values=17)
    for name, held_out in (("one", 0.2), ("two", 0.3)):
        (place / name).mkdir()
        model = model_for(data, name=data.name, fingerprint=data.fingerprint, held_out=held_out)
        checkpoint.save(model, place / name / "model.safetensors")

    def held_out(**manifest):
        folder = place / str(len(list(place.iterdir())))
        write_samples(folder, VALUES[:60], 17, {"seed": 1, **manifest})
        said = call("compare", folder, place / "data.npy", "--num-values", 17, "--metric", "kernel", "--json")
        return json.loads(said.out)["held_out"]

    one, two = (str(place / name / "model.safetensors") for name in ("one", "two"))
    assert (held_out(), held_out(model=one), held_out(model=two, then=[one])) == (0.1, 0.2, 0.2)
    said = call("compare", place / "samples", place / "data.npy", "--num-values", 17, "--run", place)
    assert (said.code, said.err[:16]) == (4, "error[NO_MODEL] ")


def test_options_of_data_for_samples(place, call):
    """--layout is for both; what labels, captions and parts are called is not for samples."""
    for name in ("d", "s"):
        np.save(place / f"{name}.npy", VALUES.transpose(0, 2, 3, 1))
    command = ("compare", place / "s.npy", place / "d.npy", "--num-values", 17, "--layout", "NHWC")
    assert call(*command, "--metric", "kernel").code == 0
    rows = "".join(f"{a},{b},{i % 2}\n" for i, (a, b) in enumerate(RNG.normal(size=(300, 2))))
    (place / "d.csv").write_text(f"u,v,group\n{rows}")
    (place / "s.csv").write_text("u,v\n" + "".join(f"{a},{b}\n" for a, b in RNG.normal(size=(60, 2))))
    command = ("compare", place / "s.csv", place / "d.csv", "--label-column", "group")
    assert call(*command, "--metric", "kernel").code == 0


def test_an_image_of_an_earlier_comparison_is_removed(place, call):
    np.save(place / "vectors.npy", RNG.normal(size=(300, 2)).astype(np.float32))
    options = ["--metric", "kernel", "--out", place / "out"]
    assert call("compare", place / "samples", place / "data.npy", "--num-values", 17, *options).code == 0
    assert (place / "out" / "nearest.png").is_file()
    (place / "out" / "notes.txt").write_text("mine")
    for _ in range(2):  # the second time into what the first one left
        assert call("compare", place / "vectors.npy", place / "vectors.npy", *options).code == 0
        assert sorted(f.name for f in (place / "out").iterdir()) == ["compare.json", "notes.txt"]


def test_vectors_and_samples_of_another_kind(place, call):
    np.save(place / "vectors.npy", RNG.normal(size=(300, 2)).astype(np.float32))
    command = ["compare", place / "vectors.npy", place / "vectors.npy", "--out", place / "out", "--metric", "kernel"]
    code, out, _ = call(*command)
    assert code == 0
    assert "no image of nearest items" in out
    code, _, err = call("compare", place / "samples", place / "vectors.npy")
    assert (code, err.count("\n")) == (3, 1)
