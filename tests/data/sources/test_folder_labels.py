"""``labels.csv`` as spreadsheets and other systems write it, and folders called train and test."""

import os
import unicodedata

import numpy as np
import pytest
from bad_inputs import encoded
from test_webdataset import PIXELS, png, tar

from undiffuse.cli import main
from undiffuse.data.sources.registry import load
from undiffuse.errors import ConfigError, DataError

RNG = np.random.default_rng(0)


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(RNG.integers(0, 256, (5, 5, 3), np.uint8), "PNG"))
    return path


@pytest.fixture
def labelled(tmp_path):
    """Three images of two classes, and a function that writes their table."""
    for name in ("a.png", "d/b.png", "d/gr\u00fcn.png"):
        image(tmp_path / name)

    def write(text, encoding="utf-8"):
        (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return tmp_path

    return write


PLAIN = "file,label\na.png,x\nd/b.png,caf\u00e9\nd/gr\u00fcn.png,x\n"


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace("/", "\\"),
        PLAIN.replace("d/", ".\\d\\"),
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "\t"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("file,label", " File , LABEL "),
        PLAIN.replace("file,label", "file_name,class"),
        PLAIN.replace("file,label", "filename,label,more")
        .replace("\na", "\n\na")
        .replace("x\n", "x,\n")
        .replace("é\n", "é,\n"),
        PLAIN.replace("file,label", "file,label,path").replace("\n", ",1\n").replace("path,1", "path"),
        unicodedata.normalize("NFD", PLAIN),
        PLAIN.replace("x\n", '"x"\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_tables_whose_meaning_is_clear(labelled, text, encoding):
    data = load(labelled(text, encoding))
    assert (data.classes, data.labels.tolist()) == (("caf\u00e9", "x"), [1, 0, 1])


def test_equal_texts_are_one_class(labelled):
    text = f"file,label\na.png,caf\u00e9\nd/b.png,{unicodedata.normalize('NFD', 'café')}\nd/gr\u00fcn.png,x\n"
    assert load(labelled(text)).labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (PLAIN.encode("latin-1"), "is not text in UTF-8 or UTF-16"),
        ("image,label\na.png,x\n", "does not name the columns file and label: 'image,label'"),
        ("filename,path,label\na.png,a.png,x\n", "does not name the columns file and label"),
        ("file,label\na,b.png,x\n", "line 2 has 3 cells, and there are 2 columns"),
        (PLAIN.replace("a.png", "A.PNG"), "no such image for 1 file: A.PNG (a.png is there)"),
        ("", "does not name the columns file and label"),
    ],
)
def test_what_is_wrong_with_others(labelled, text, cause):
    folder = labelled(text)
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"error[LABELS] {folder}/labels.csv: ")
    assert cause in caught.value.cause
    assert "whole number" not in caught.value.fix  # the remedy for arrays of labels


def test_two_files_that_differ_in_their_unicode_form(tmp_path):
    names = ["\u00e9.png", "e\u0301.png"]
    for name in names:
        image(tmp_path / name)
    table = tmp_path / "labels.csv"
    table.write_text(f"file,label\n{names[0]},x\n{names[1]},y\n")
    assert load(tmp_path).classes == ("x", "y")
    os.rename(tmp_path / names[0], tmp_path / "E.png")
    table.write_text(f"file,label\n{names[0]},x\nE.png,y\n")
    assert load(tmp_path).labels.tolist() == [1, 0]
    image(tmp_path / names[0])
    (tmp_path / "d").mkdir()
    for name in names:
        os.rename(tmp_path / name, tmp_path / "d" / name)
    table.write_text(f"file,label\nd\\{names[0]},x\nE.png,y\n")
    with pytest.raises(DataError, match="several images that differ only in their Unicode form for 1 file"):
        load(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_table_that_is_no_file(labelled, make):
    """Reading it would not end."""
    folder = labelled("")
    (folder / "labels.csv").unlink()
    make(folder / "labels.csv")
    with pytest.raises(DataError, match=r"^error\[NOT_A_REGULAR_FILE\] .*labels.csv: is a pipe, a socket or a device"):
        load(folder)


PARTS = {"train": 4, "test": 2, "val": 3}


@pytest.fixture
def parts(tmp_path):
    """Folders called train, test and val, with two classes in each."""
    for part, count in PARTS.items():
        for i in range(2 * count):
            image(tmp_path / part / "ab"[i % 2] / f"{i}.png")
    return tmp_path


def test_train_and_test_as_classes_are_noted(parts):
    data = load(parts)
    assert data.classes == ("test", "train", "val")
    note = "the folders test and train and val are read as one data set, not as its parts; split_folders=True"
    assert any(n.startswith(note) for n in data.notes)
    for part in ("train", "val"):
        assert not any("split_folders" in n for n in load(parts / part).notes)


def test_folders_as_parts(parts):
    data = load(parts, split_folders=True)
    split = data.split()
    assert (split.train.tolist(), split.validation.tolist()) == (list(range(8)), list(range(8, 14)))
    assert split.test.tolist() == list(range(14, 18))
    assert [name.split("/")[0] for name in data.names] == ["train"] * 8 + ["val"] * 6 + ["test"] * 4
    assert (data.classes, data.labels.tolist()) == (("a", "b"), [0] * 4 + [1] * 4 + [0] * 3 + [1] * 3 + [0, 0, 1, 1])
    assert "parts from folders: train (8), validation (6), test (4)" in data.notes
    assert data.held_out_fraction(0.1) == (0.1, None)
    assert data.num_distinct == 8
    assert data.split(0).train.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("removed", "train", "validation", "test"), [("val", 7, 1, 4), ("test", 7, 6, 1), (None, 8, 6, 4)]
)
def test_a_part_that_is_missing_is_drawn(parts, removed, train, validation, test):
    if removed:
        (parts / removed).rename(parts.parent / f"{parts.name}-{removed}")
    data = load(parts, split_folders=True)
    split = data.split(0.01)
    assert [len(split.train), len(split.validation), len(split.test)] == [train, validation, test]
    assert sorted(np.concatenate([split.train, split.validation, split.test])) == list(range(len(data)))
    if removed:
        drawn = split.validation if removed == "val" else split.test
        assert set(drawn) < set(range(8))


def test_a_table_of_labels_and_parts(parts):
    names = [path.relative_to(parts).as_posix() for path in sorted(parts.rglob("*.png"))]
    (parts / "labels.csv").write_text("file,label\n" + "".join(f"{name},{name[-5]}\n" for name in names))
    data = load(parts, split_folders=True)
    assert [data.classes[k] for k in data.labels] == [name[-5] for name in data.names]
    assert data.test_from == 14


def test_images_that_are_in_no_part(parts):
    image(parts / "more" / "x.png")
    with pytest.raises(ConfigError, match=r"^error\[OPTION\] split_folders: .*train, val, test: more/x.png is in none"):
        load(parts, split_folders=True)
    alone = image(parts / "alone" / "train" / "0.png").parent.parent
    with pytest.raises(ConfigError, match="there are no two of them"):
        load(alone, split_folders=True)


def test_parts_without_a_usable_training_image(parts):
    for path in (parts / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"^error\[NO_IMAGES\] .*: no image in the folder of training images can be"):
        load(parts, split_folders=True, on_bad="skip")


def test_shards_called_train_and_test_are_noted(tmp_path):
    for name in ("x-train-0.tar", "x-test-0.tar"):
        tar(tmp_path / name, [("0.png", png(PIXELS[0]))])
    assert "shards called test and train are read as one data set, not as its parts" in load(tmp_path).notes


def test_packed_data_keep_their_parts(parts):
    assert main(["pack", str(parts), str(parts.parent / f"{parts.name}.npy"), "--split-folders"]) == 0
    data, packed = load(parts, split_folders=True), load(parts.parent / f"{parts.name}.npy")
    assert (packed.validation_from, packed.test_from) == (8, 14)
    assert packed.fingerprint == data.fingerprint
