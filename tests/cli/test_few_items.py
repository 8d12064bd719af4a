"""Data of a few items through the command line: training works, and nothing is measured where nothing is held out."""

import json

import numpy as np
import pytest
from tiny_run import data as tiny

from undiffuse.data.dataset import Dataset
from undiffuse.data.from_array import from_array
from undiffuse.errors import counted
from undiffuse.model import checkpoint
from undiffuse.training.run_folder import Run

RECIPE = """
[model]
network = NETWORK
schedule = {name = "linear_log_snr", high = 6.0}
chain_length = 5
[train]
batch = 64
warmup = 1
precision = "float32"
previews = 2
"""
NETWORKS = ['{kind = "mlp", width = 8, depth = 1}', '{kind = "unet", widths = [8], blocks = 1, attention = []}']
IMAGES = np.random.default_rng(0).integers(256, size=(5, 4, 4)).astype(np.uint8)
CASES = {
    "one": (IMAGES[:1], "one item only"),
    "equal": (IMAGES[[0, 0, 0, 0]], "one distinct item only"),
    "two": (IMAGES[:2], "2 items only"),
    "pairs": (IMAGES[[0, 1, 0, 1]], "2 distinct items only"),
    "vectors": (IMAGES[:1, 0, :3].astype(np.float32), "one item only"),
}
TRAINED = ("pairs", "vectors")
"""Cases that are trained through the command line; the others differ from them in the data alone."""
NOTHING = "nothing is held out, nothing is measured"


@pytest.fixture
def train(call, tmp_path):
    """Trains on an array for two steps: its path, the run folder, and what was printed."""

    def run(values, *options, name="x"):
        path, folder = tmp_path / f"{name}.npy", tmp_path / f"run-{name}"
        np.save(path, values)
        (tmp_path / "recipe.toml").write_text(RECIPE.replace("NETWORK", NETWORKS[values.ndim > 2]))
        flags = ["--out", folder, "--steps", 2, "--config", tmp_path / "recipe.toml", "--device", "cpu", *options]
        code, out, err = call("train", path, *flags)
        assert (code, err) == (0, ""), err
        return path, folder, out

    return run


@pytest.mark.parametrize("name", CASES)
def test_the_fraction_that_can_be_held_out(name):
    values, words = CASES[name]
    data = from_array(values, num_values=256 if values.dtype == np.uint8 else None)
    assert data.held_out_fraction(0.1) == (0.0, f"{words}: {NOTHING}")


@pytest.mark.parametrize("name", TRAINED)
def test_too_few_items_to_hold_any_out(train, call, name):
    values, words = CASES[name]
    path, folder, out = train(values)
    assert f"note: {words}: {NOTHING}\n" in out
    assert f"training on {counted(len(values), 'item')} of" in out
    assert out.count("no held-out items") == 2
    assert "± nan" not in out
    assert f"next: undiffuse sample {folder}\nnext: undiffuse evaluate {folder} --part train\n" in out

    record = Run(folder).record
    assert record["finished"]
    assert record["config"]["train"]["held_out"] == 0
    assert f"{words}: {NOTHING}" in record["data"]["notes"]
    metrics = (folder / "metrics.jsonl").read_text()
    assert "NaN" not in metrics
    assert not any("bits_per_dim" in json.loads(line) for line in metrics.splitlines())
    assert f"{words}: {NOTHING}" in call("inspect", folder)[1]
    assert call("watch", folder, "--once")[0] == 0
    assert call("sample", folder, "--n", 2, "--steps", 2, "--device", "cpu")[0] == 0

    for part in ((), ("--part", "test"), ("--part", "validation")):
        code, _, err = call("evaluate", folder, path, "--device", "cpu", *part)
        cause = "nothing was held out when the model was trained. Use --part train, or other data."
        assert (code, err) == (3, f"error[EMPTY] x: {cause}\n")
    options = ["--part", "train", "--estimate", "discrete", "--mc-samples", 2, "--device", "cpu"]
    code, out, err = call("evaluate", folder, path, *options)
    assert (code, err) == (0, "")
    summary = json.loads((folder / "evaluation.json").read_text())
    assert (summary["part"], summary["estimates"]["discrete"]["items"]) == ("trained on", len(values))


def test_a_run_of_one_item_is_extended(train, call, tmp_path):
    path, folder, _ = train(IMAGES[:1])
    code, out, _ = call("train", path, "--out", folder, "--extend", "--steps", 3, "--device", "cpu")
    assert code == 0
    assert "is extended and resumes" in out
    assert checkpoint.load(folder).info["steps"] == 5
    assert Run(folder).record["config"]["train"]["held_out"] == 0


def test_three_distinct_items_are_enough(train):
    _, folder, out = train(IMAGES[:3])
    assert "nothing" not in out
    assert f"next: undiffuse evaluate {folder}\n" in out
    assert Run(folder).record["config"]["train"]["held_out"] == 0.1
    assert [r["bits_per_dim"] > 0 for r in Run(folder).read_metrics() if "bits_per_dim" in r] == [True, True]


def test_fewer_items_than_a_batch(train):
    """Epochs follow each other without a gap: five items, of which three are trained on, fill a batch of 64."""
    _, folder, out = train(IMAGES)
    assert "training on 3 items" in out
    assert checkpoint.load(folder).info["steps"] == 2


def test_what_can_be_held_out_of_more_items():
    data = tiny(10)
    assert data.held_out_fraction(0.2) == (0.2, None)
    assert from_array(data.values[:2], num_values=5).held_out_fraction(0.0) == (0.0, None)
    for items, share in ((1, 0.0), (2, 0.2)):
        official = Dataset("official", data.values, 5, test_from=items)
        fraction, reason = official.held_out_fraction(0.2)
        assert (fraction, reason is None) == (share, share > 0)
        assert len(official.split(fraction).test) == 10 - items
