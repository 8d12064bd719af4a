"""``labels.csv`` as spreadsheets and other systems write it, and folders called train and test."""

import os
import unicodedata

import numpy as np
import pytest
from bad_inputs import encoded

from undiffuse.data.sources.registry import load
from undiffuse.errors import DataError

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
