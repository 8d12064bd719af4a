"""Tables: their text and numbers, and escape codes on terminals only."""

import io
import math

import pytest

from undiffuse.report.table import cell, render


def table_text(rows, **more):
    out = io.StringIO()
    render(rows, file=out, **more)
    return out.getvalue()


def test_text_of_a_table(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    rows = [
        {"model": "ours [red]\x1b[31m", "bits": (1.98123, 0.0123), "items": 1800},
        {"model": "pixels", "seconds": 0.5},
    ]
    lines = table_text(rows, title="digits").splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert lines[0] == "digits"
    assert lines[2].split() == ["model", "bits", "items", "seconds"]
    assert lines[4].split() == ["ours", "[red]\\x1b[31m", "1.981", "±", "0.012", "1,800"]
    assert lines[5].split() == ["pixels", "0.5"]
    assert "\x1b" not in "".join(lines)


def test_a_terminal_gets_styles():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    render([{"a": 1}], title="t", file=out)
    assert "\x1b[" in out.getvalue()


def test_standard_output_and_long_cells(capsys):
    render([{"path": "x" * 300}])
    assert "x" * 300 in capsys.readouterr().out
    assert table_text([]).strip() == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((2.34567, 0.01234), "2.346 ± 0.012"),
        ((2.3, 0.99), "2.30 ± 0.99"),
        ((1234.5, 56.0), "1234 ± 56"),
        ((1.5, 0.0), "1.500 ± 0.000"),
        ((1.26212, math.nan), "1.262"),
        ((0.51367, 6.6e-18), "0.514 ± 0.000"),
        ((0.0, 2.5e-13), "0 ± 2e-13"),
        (3.14159, "3.142"),
        (12345, "12,345"),
        (None, ""),
    ],
)
def test_cells(value, text):
    assert cell(value) == text


def test_small_numbers_with_small_errors_have_an_exponent():
    assert cell((1.2078905132924e-06, 7.2e-18)) == "1.21e-06 ± 7e-18"
    assert cell((0.0052, 3e-05)) == "0.005200 ± 0.000030"
