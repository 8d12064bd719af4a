"""``undiffuse check``: everything it reports about data, as text and as JSON."""

import json

import numpy as np
import pytest
from PIL import Image

from undiffuse.cli import check
from undiffuse.cli.check import data_facts, describe_facts
from undiffuse.data.from_array import from_array
from undiffuse.data.sources.registry import OPTIONS, load


@pytest.fixture
def folder(tmp_path):
    """Two classes of PNG and JPEG files, one file twice, one that is not an image, one hidden."""
    rng = np.random.default_rng(0)
    for name in ("cats/0.png", "cats/1.png", "cats/2.jpg", "dogs/0.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).save(path)
    (tmp_path / "dogs" / "1.png").write_bytes((tmp_path / "cats" / "1.png").read_bytes())
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden").touch()
    return tmp_path


def test_json(folder, call):
    code, out, _ = call("check", folder, "--json")
    assert code == 0
    facts = json.loads(out)
    split, notes = facts.pop("split"), facts.pop("notes")
    assert sum(split.values()) == 5
    assert "1 of 5 items repeats another one exactly" in notes
    assert facts == {
        "name": folder.name,
        "items": 5,
        "item_shape": [3, 6, 6],
        "num_values": 256,
        "bytes": 540,
        "formats": {"PNG": 4, "JPEG": 1},
        "sizes": {"6 x 6": 5},
        "classes": {"cats": 3, "dogs": 2},
        "conditions": None,
        "captions": None,
        "duplicates": 1,
        "ignored": 1,
        "hidden": 1,
        "skipped": [],
        "fingerprint": load(folder).fingerprint,
    }


def test_text(folder, call):
    (folder / "dogs" / "bad.png").touch()
    code, out, _ = call("check", folder, "--on-bad", "skip", "--out", folder / "sheet.png")
    assert code == 0
    for text in (
        "5 of 3×6×6",
        "integers 0 to 255 (8 bits); 540 bytes in total",
        "PNG (4), JPEG (1)",
        "6 x 6 (5)",
        "cats (3), dogs (2)",
        "1 repetition of another item",
        "1 ignored, 1 hidden, 1 skipped",
        "note: 1 of 5 items repeats another one exactly",
        f"skipped: [EMPTY_FILE] {folder}/dogs/bad.png: the file is empty",
        "contact sheet of 5 evenly spaced items",
    ):
        assert text in out
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width > 60
    assert call("check", folder, "--on-bad", "skip", "--out", folder / "sheet.png")[0] == 0  # its own file
    image = next((folder / "cats").iterdir())
    before = image.read_bytes()
    code, _, err = call("check", folder, "--on-bad", "skip", "--out", image)
    assert (code, "Give another name, or move the file away" in err, image.read_bytes() == before) == (2, True, True)


def test_a_contact_sheet_of_large_items_has_fewer_and_is_square(tmp_path, monkeypatch):
    data = from_array(np.zeros((9, 1, 700, 700), np.uint8), num_values=256)
    for values, count in ((4 * 700**2, 4), (700**2 - 1, 1)):
        monkeypatch.setattr(check, "MAX_SHEET_VALUES", values)
        assert check.write_contact_sheet(data, tmp_path / "sheet.png") == count
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width == sheet.height < 710 * count**0.5


def test_facts_of_arrays():
    values = np.arange(60, dtype=np.float32).reshape(30, 2) / 7
    facts = data_facts(from_array(values, np.arange(30)))
    assert facts["split"] == {name: len(getattr(from_array(values).split(), name)) for name in facts["split"]}
    lines = describe_facts(facts)
    assert (lines["items"], lines["values"]) == ("30 vectors of 2 numbers", "continuous; 240 bytes in total")
    assert lines["labels"].startswith("0 (1), 1 (1), ")
    assert lines["labels"].endswith("11 (1) and 18 more")
    assert not {"channels", "files", "sizes in files", "unused files"} & set(lines)
    assert (lines["duplicates"], lines["conditions"]) == ("none", "none")
    few = data_facts(from_array(np.array([[0, 1], [0, 1], [16, 3]], np.uint8), num_values=17))
    assert (few["split"], few["classes"], few["duplicates"]) == (None, {}, 1)
    assert describe_facts(few)["values"] == "integers 0 to 16; 6 bytes in total"
    assert describe_facts(few)["split"] == "none"


@pytest.mark.parametrize(
    ("shape", "text"), [((5, 3), "a vector of 3 numbers"), ((5, 4, 3), "up to 4 tokens of 3 numbers")]
)
def test_conditions(shape, text):
    data = from_array(np.zeros((5, 2), np.uint8), cond=np.zeros(shape))
    assert describe_facts(data_facts(data))["conditions"] == text


@pytest.mark.parametrize("command", ["train", "evaluate", "check", "pack", "train-classifier", "advise", "ema"])
def test_every_command_that_reads_data_has_all_options(command, call):
    code, out, _ = call(command, "--help")
    assert code == 0
    for option in OPTIONS.values():
        assert (option.flag or f"--{option.name.replace('_', '-')}") in out
    assert "--value-range LOW HIGH" in out


def test_many_files_that_are_not_square_are_listed_in_part_with_the_option_that_keeps_them(folder, call):
    for i in range(22):
        Image.fromarray(np.full((6, 8, 3), i, np.uint8)).save(folder / "dogs" / f"wide{i:02}.png")
    code, out, _ = call("check", folder, "--size", 6, "--on-bad", "skip")
    assert code == 0
    assert "22 ASPECT; --crop keeps those that are not square" in out
    assert out.count("skipped: [ASPECT]") == 20
    assert "skipped: 2 more; --json lists all" in out
    assert "27 of 3×6×6" in call("check", folder, "--size", 6, "--crop")[1]
