"""The example of image folders, and train, sample and evaluate on them without flags."""

import json
from pathlib import Path

import pytest
from test_any_data import load_example

from undiffuse import load_data
from undiffuse.cli import main

SHAPES = {"square": (1, 32, 32), "wide": (1, 24, 40), "colour": (3, 32, 32)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = load_example("shapes")
    out = tmp_path_factory.mktemp("shapes")
    shapes.main(out)
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_each_folder_has_300_images_of_three_classes(folders, name):
    data = load_data(folders / name)
    assert (len(data), data.item_shape, data.num_values) == (300, SHAPES[name], 256)
    assert data.classes == ("boxes", "discs", "stripes")


@pytest.mark.release
@pytest.mark.parametrize("name", SHAPES)
def test_train_sample_and_evaluate_need_no_flags(folders, name, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    assert main(["train", name, "--minutes", "0.5"]) == 0
    assert main(["sample", f"runs/{name}"]) == 0
    assert main(["evaluate", f"runs/{name}", name]) == 0
    assert not capsys.readouterr().err
    assert len(list(Path(f"runs/{name}/samples").rglob("0*.png"))) == 64
    report = json.loads(Path(f"runs/{name}/evaluation.json").read_text())
    total, stderr = report["estimates"]["discrete"]["bits_per_dim"]["total"]
    assert total > 0  # after half a minute of training the bound can still exceed 8 bits
    assert 0 < stderr < 1
