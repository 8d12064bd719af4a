"""Folders of pictures, from drawing them to a measured model, with no flag but the path and the minutes."""

import importlib.util
import json
from pathlib import Path

import pytest

from undiffuse import data
from undiffuse.cli import main

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.py"
SHAPES = {"square": (1, 32, 32), "wide": (1, 24, 40), "colour": (3, 32, 32)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = importlib.util.spec_from_file_location("shapes", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    shapes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shapes)
    out = tmp_path_factory.mktemp("shapes")
    shapes.main(out)
    return out


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", SHAPES)
def test_each_folder_is_300_pictures_of_three_classes(folders, name):
    found = data.load(folders / name)
    assert (len(found), found.item_shape, found.levels) == (300, SHAPES[name], 256)
    assert found.classes == ("boxes", "discs", "stripes")


@pytest.mark.release
@pytest.mark.parametrize("name", SHAPES)
def test_train_sample_evaluate_take_no_flags(folders, name, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    assert main(["train", name, "--minutes", "0.5"]) == 0
    assert main(["sample", f"runs/{name}"]) == 0
    assert main(["evaluate", f"runs/{name}", name]) == 0
    assert not capsys.readouterr().err
    assert len(list(Path(f"runs/{name}/samples").rglob("0*.png"))) == 64
    report = json.loads(Path(f"runs/{name}/evaluation.json").read_text())
    total, stderr = report["estimates"]["discrete"]["bits_per_dim"]["total"]
    assert total > 0  # half a minute says nothing of quality: a hardly trained bound can pass 8 bits
    assert 0 < stderr < 1
