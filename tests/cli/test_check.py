"""``undiffuse check``: everything that it says of data, in words and as JSON."""

import json

import numpy as np
import pytest
from PIL import Image

from undiffuse.cli import main
from undiffuse.cli.check import found, in_words
from undiffuse.data import from_array, load


@pytest.fixture
def folder(tmp_path):
    """Two classes of PNG and JPEG files, one file twice, one that is none, one hidden."""
    rng = np.random.default_rng(0)
    for name in ("cats/0.png", "cats/1.png", "cats/2.jpg", "dogs/0.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).save(path)
    (tmp_path / "dogs" / "1.png").write_bytes((tmp_path / "cats" / "1.png").read_bytes())
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden").touch()
    return tmp_path


def test_as_json(folder, capsys):
    assert main(["check", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    split, notes = facts.pop("split"), facts.pop("notes")
    assert sum(split.values()) == 5
    assert "1 of 5 items repeat another one exactly" in notes
    assert facts == {
        "name": folder.name,
        "items": 5,
        "item_shape": [3, 6, 6],
        "levels": 256,
        "bytes": 540,
        "formats": {"PNG": 4, "JPEG": 1},
        "sizes": {"6 x 6": 5},
        "classes": {"cats": 3, "dogs": 2},
        "told_beside": None,
        "duplicates": 1,
        "ignored": 1,
        "hidden": 1,
        "skipped": [],
        "fingerprint": load(folder).fingerprint,
    }


def test_in_words(folder, capsys):
    (folder / "dogs" / "bad.png").touch()
    assert main(["check", str(folder), "--on-bad", "skip", "--out", str(folder / "sheet.png")]) == 0
    said = capsys.readouterr().out
    for words in (
        "5 of 3×6×6",
        "256 levels, 8 bits; 540 bytes as packed",
        "PNG (4), JPEG (1)",
        "6 x 6 (5)",
        "cats (3), dogs (2)",
        "1 items repeat another one",
        "1 ignored files, 1 hidden files, 1 skipped files",
        f"skipped: [EMPTY_FILE] {folder}/dogs/bad.png: holds no bytes",
        "contact sheet of 5 items",
    ):
        assert words in said, said
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 60


def test_of_arrays():
    values = np.arange(60, dtype=np.float32).reshape(30, 2) / 7
    facts = found(from_array(values, np.arange(30)))
    assert facts["split"] == {name: len(getattr(from_array(values).split(), name)) for name in facts["split"]}
    words = in_words(facts)
    assert (words["items"], words["values"]) == ("30 of 2", "continuous; 240 bytes as packed")
    assert words["labels"].startswith("0 (1), 1 (1), ")
    assert words["labels"].endswith("11 (1) and 18 more")
    assert not {"channels", "files", "sizes in files", "left aside"} & set(words)
    assert (words["duplicates"], words["told beside"]) == ("none", "nothing")
    few = found(from_array(np.array([[0, 1], [0, 1], [16, 3]], np.uint8), levels=17))
    assert (few["split"], few["classes"], few["duplicates"]) == (None, {}, 1)
    assert in_words(few)["values"] == "17 levels; 6 bytes as packed"
    assert in_words(few)["split"] == "none"


def test_options_are_those_of_every_command_that_reads_data(capsys):
    for command in ("train", "evaluate", "check", "train-classifier", "advise", "ema"):
        assert main([command, "--help"]) == 0
        said = capsys.readouterr().out
        for option in ("--background", "--frames", "--allow-upscale", "--on-bad", "--value-range", "--layout"):
            assert option in said, (command, option)
