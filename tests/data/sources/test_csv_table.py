"""CSV tables: what is accepted, and errors with the line and the column."""

import numpy as np
import pytest

from undiffuse.data.sources import csv_table
from undiffuse.data.sources.registry import load
from undiffuse.errors import ConfigError, DataError


@pytest.fixture
def file(tmp_path):
    def write(text, name="table.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_each_row_is_an_item(file):
    data = load(file("a, b c\n1,2.5\n\n-3,1e3\n"))
    assert (data.name, data.columns, data.num_values, data.labels) == ("table", ("a", "b c"), None, None)
    assert data.values.dtype == np.float32
    np.testing.assert_array_equal(data.values, [[1, 2.5], [-3, 1000]])
    assert data.notes == ("2 columns: a, b c",)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a;b\r\n1;2\r\n", "x.csv"),
        ("a\tb\n1\t2", "x.TSV"),
        ('"a","b"\n"1"," 2 "\n', "x.csv"),
        (b"\xef\xbb\xbfa,b\n1,2\n", "x.csv"),
    ],
)
def test_separators_quotes_and_byte_order_marks(file, text, name):
    data = load(file(text, name))
    assert data.columns == ("a", "b")
    assert data.values.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("cells", "classes", "labels"),
    [
        (["no", "yes", "no"], ("no", "yes"), [0, 1, 0]),
        (["10", "9", "10"], ("9", "10"), [1, 0, 1]),
        (["-1", "5", "2"], ("-1", "2", "5"), [0, 2, 1]),
        (["10", "9", "x"], ("10", "9", "x"), [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("name", ["label", "labels"])
def test_label_column(file, cells, classes, labels, name):
    data = load(file(f"a,{name},b\n" + "".join(f"{i},{cell},7\n" for i, cell in enumerate(cells))))
    assert (data.columns, data.classes, data.labels.tolist()) == (("a", "b"), classes, labels)
    assert data.values.tolist() == [[0, 7], [1, 7], [2, 7]]
    assert data.notes == (
        "2 columns: a, b",
        f"{len(classes)} classes from the column {name}: {', '.join(classes)}",
        "the same value everywhere in channel b; a density has no upper bound there: leave it out to measure one",
    )


def test_a_column_y_of_numbers_is_a_coordinate(file):
    """It was taken for classes, one for each number."""
    path = file("x,y\n1,0.5\n2,0.25\n3,0.125\n")
    data = load(path)
    assert (data.columns, data.labels, data.values.tolist()) == (("x", "y"), None, [[1, 0.5], [2, 0.25], [3, 0.125]])
    assert data.notes[1] == "no classes; the column y may hold them: label_column=y takes it so"
    assert load(path, label_column="y").classes == ("0.125", "0.25", "0.5")


@pytest.mark.parametrize(("labels", "pair"), [(["2", "1", "1.0"], "1 and 1.0"), (["01", "1"], "01 and 1")])
def test_numbers_that_are_written_in_two_ways_are_an_error(tmp_path, labels, pair):
    path = tmp_path / "x.csv"
    path.write_text("a,y\n" + "".join(f"{i},{label}\n" for i, label in enumerate(labels)))
    with pytest.raises(DataError, match=rf"^error\[LABELS\] .*the labels {pair} are the same number"):
        load(path, label_column="y")
    path.write_text(path.read_text() + "7,other\n")  # not all are numbers: these are names
    assert set(load(path, label_column="y").classes) == {*labels, "other"}


def test_a_column_that_float32_rounds_coarsely_gets_a_note(file):
    seconds = "".join(f"{1_700_000_000 + i},{i}\n" for i in range(300))
    note = "stored as float32, which rounds t to steps of 1.3e+02 over a range of 3e+02: subtract a constant first"
    assert note in load(file(f"t,i\n{seconds}")).notes
    assert not any("rounds" in note for note in load(file("t\n0.1\n0.2\n0.3\n", "fine.csv")).notes)


@pytest.mark.parametrize(
    ("text", "code", "cause"),
    [
        ("", "BAD_HEADER", "does not name each column once"),
        ("1,2\n3,4\n", "BAD_HEADER", "does not name each column once"),
        ("a,a\n3,4\n", "BAD_HEADER", "does not name each column once"),
        ("a,\n3,4\n", "BAD_HEADER", "does not name each column once"),
        ("label\n3\n", "BAD_HEADER", "its only column is that of the labels"),
        ("a,b\n", "TABLE", "there is no line below the names"),
        ("a,b\n1,2\n\n3\n", "TABLE", "line 4 has 1 cells, and there are 2 columns"),
        ("a,b\n1,2\n3,4,5\n", "TABLE", "line 3 has 3 cells, and there are 2 columns"),
        ("a,b\n1,x\n,1_0\n", "TABLE", "line 2, column b: 'x' is not a number (and 2 more)"),
        ("a,b\n1,\n", "TABLE", "line 2, column b: '' is not a number. "),
        ("a,b\n1,2\n1,nan\ninf,0\n", "NON_FINITE", "item 1, column b: nan (and 1 more)"),
        ("a,b\n1,1e39\n", "NON_FINITE", "item 0, column b: 1e+39 (and 0 more)"),
        ("a,label\n1,x\n2,\n", "LABELS", "1 labels are empty, the first that of item 1"),
        (b"a,b\n\xff,1\n", "TABLE", "is not text in UTF-8 or UTF-16 (byte 4)"),
        ("a,b\n" + "1" * (1 << 21), "TABLE", "a line has more than 1,048,576 characters"),
        ("a,b\n" + "1" * (1 << 18) + ",1\n", "TABLE", "cannot be read as a table (field larger than field limit"),
    ],
)
def test_invalid_tables(file, text, code, cause):
    path = file(text)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"error[{code}] {path}: ")
    assert cause in str(caught.value)


def test_paths_that_are_not_files(tmp_path):
    with pytest.raises(DataError, match="NOT_A_REGULAR_FILE"):
        csv_table.load(tmp_path)
    (tmp_path / "dead.csv").symlink_to("nothing")
    with pytest.raises(DataError, match="NOT_A_REGULAR_FILE"):
        load(tmp_path / "dead.csv")


def test_long_lines_are_refused(file, monkeypatch):
    monkeypatch.setattr(csv_table, "MAX_LINE_LENGTH", 10)
    assert load(file("a,b\n" + "1234,5678\n" * 3)).values.shape == (3, 2)
    with pytest.raises(DataError, match="more than 10 characters"):
        load(file("a,b\n" + "1234,56789\n"))


def test_the_index_that_pandas_writes_is_left_out(tmp_path):
    """By default, after it was read and written again, and as R writes it, from 1."""
    pandas = pytest.importorskip("pandas", reason="needs the extra `hub`")
    frame = pandas.DataFrame({"a": [1.5, 2, 3], "label": ["x", "y", "x"], "b": [7, 8, 9]})
    frame.to_csv(tmp_path / "once.csv")
    pandas.read_csv(tmp_path / "once.csv").to_csv(tmp_path / "twice.csv")
    (tmp_path / "r.csv").write_text('"","a","label","b"\n"1",1.5,"x",7\n"2",2,"y",8\n"3",3,"x",9\n')
    (tmp_path / "no-index.csv").write_text("a,label,b\n1.5,x,7\n2,y,8\n3,x,9\n")
    expected = load(tmp_path / "no-index.csv")
    for name, left_out in (("once", "1 column"), ("twice", "2 columns"), ("r", "1 column")):
        data = load(tmp_path / f"{name}.csv")
        assert (data.columns, data.classes, data.fingerprint) == (("a", "b"), ("x", "y"), expected.fingerprint)
        assert any(note.startswith(f"{left_out} left out that only count") for note in data.notes)


@pytest.mark.parametrize(
    ("text", "code", "cause"),
    [
        (",a\n5,1\n6,2\n", "BAD_HEADER", "its first column has no name"),
        (",a\n0,1\n0,2\n", "BAD_HEADER", "its first column has no name"),
        (",a\nx,1\ny,2\n", "TABLE", "line 2, column 1: 'x' is not a number"),
        (",label\n0,x\n1,y\n", "BAD_HEADER", "its only column counts the lines"),
        (",\n0,1\n", "BAD_HEADER", "does not name each column once"),
    ],
)
def test_first_columns_without_a_name(file, text, code, cause):
    with pytest.raises(DataError) as caught:
        load(file(text))
    assert caught.value.code == code
    assert cause in caught.value.cause


def test_columns_that_pandas_named_and_that_do_not_count(file):
    assert load(file("Unnamed: 0,a\n7,1\n9,2\n")).columns == ("Unnamed: 0", "a")


@pytest.mark.parametrize("name", ["target", "Class", "LABEL", "category"])
def test_columns_that_may_hold_classes_are_offered(file, name):
    data = load(file(f"a,{name}\n1,0\n2,1\n"))
    assert data.columns == ("a", name)
    assert f"no classes; the column {name} may hold them: label_column={name} takes it so" in data.notes
    with pytest.raises(
        DataError, match=rf"'cat' is not a number.*If {name} holds the classes, give label_column={name}"
    ):
        load(file(f"a,{name}\n1,cat\n2,dog\n"))
    data = load(file(f"a,{name}\n1,cat\n2,dog\n"), label_column=name)
    assert (data.columns, data.classes) == (("a",), ("cat", "dog"))
    with pytest.raises(ConfigError, match="'kind' is not one of the columns a, b"):
        load(file("a,b\n1,2\n"), label_column="kind")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_encodings_of_spreadsheets(file, encoding, separator):
    text = f"größe{separator}label\n1{separator}ö\n"
    data = load(file(text.encode(encoding)))
    assert (data.columns, data.classes) == (("größe",), ("ö",))
