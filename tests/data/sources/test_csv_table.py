"""CSV tables: what is accepted, and errors with the line and the column."""

import numpy as np
import pytest

from undiffuse.data.sources import csv_table
from undiffuse.data.sources.registry import load
from undiffuse.errors import DataError


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
@pytest.mark.parametrize("name", ["label", "labels", "y"])
def test_label_column(file, cells, classes, labels, name):
    data = load(file(f"a,{name},b\n" + "".join(f"{i},{cell},7\n" for i, cell in enumerate(cells))))
    assert (data.columns, data.classes, data.labels.tolist()) == (("a", "b"), classes, labels)
    assert data.values.tolist() == [[0, 7], [1, 7], [2, 7]]
    assert data.notes == (
        "2 columns: a, b",
        f"{len(classes)} classes from the column {name}: {', '.join(classes)}",
        "the same value everywhere in channel b",
    )


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
        (b"a,b\n\xff,1\n", "TABLE", "is not UTF-8 text"),
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
