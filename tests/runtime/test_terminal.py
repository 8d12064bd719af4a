"""Output in any encoding, to closed and full outputs, with text as it is."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from undiffuse.cli import run
from undiffuse.report import table
from undiffuse.runtime import terminal

SOURCE = Path(terminal.__file__).parent.parent
LINE = "3×32×32: log₂ p ≤ 2.5 ± 0.1, α → café, [bold]red[/bold] :smile: ▁█ \udcff 日"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "3x32x32: log2 p <= 2.5 +- 0.1, alpha ? cafe, [bold]red[/bold] :smile: _# \\udcff ?"),
        ("cp1252", "3×32×32: log2 p <= 2.5 ± 0.1, alpha ? café, [bold]red[/bold] :smile: _# \\udcff ?"),
        ("utf-8", LINE.replace("\udcff", "\\udcff")),
    ],
)
def test_every_encoding_prints_every_line(encoding, expected):
    file = io.TextIOWrapper(raw := io.BytesIO(), encoding=encoding, errors="undiffuse.replace")
    terminal.make_console(file, soft_wrap=True).print(LINE)
    table.render([{"[bold]": "[red]x[/red] :smile: ±"}], "[b]title[/b]", file)
    file.flush()
    printed = raw.getvalue().decode(encoding)
    assert printed.splitlines()[0].rstrip() == expected
    for text in ("[bold]", "[red]x[/red] :smile:", "[b]title[/b]"):
        assert text in printed


def test_markup_is_off_everywhere():
    """One function makes the consoles, and a column of a progress bar says so itself."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id == "Console":
                    assert path.name == "terminal.py", path
                if node.func.id == "TextColumn":
                    assert any(k.arg == "markup" for k in node.keywords), path


def test_other_errors_of_codecs_stay():
    with pytest.raises(UnicodeDecodeError):
        b"\xff".decode("utf-8", "undiffuse.replace")


PROGRAM = """
import sys
from undiffuse.cli import run
sys.argv = ["undiffuse", *sys.argv[1:]]
run()
"""


def command(*arguments, **settings):
    """A command in a process of its own."""
    environment = os.environ | settings.pop("env", {}) | {"PYTHONPATH": str(SOURCE.parent)}
    words = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(words, env=environment, check=False, timeout=120, **settings)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_utf8(encoding, tmp_path, monkeypatch):
    (tmp_path / "[red]é.csv").write_text("a,b\n" + "1,2\n3,4\n" * 5)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setattr(sys, "argv", ["undiffuse", "check", str(tmp_path / "[red]é.csv")])
        with pytest.raises(SystemExit) as end:
            run()
    assert (end.value.code, err.buffer.getvalue()) == (0, b"")
    assert b"[red]" in out.buffer.getvalue()


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_a_pipe_that_is_closed(flag):
    read, write = os.pipe()
    os.close(read)
    done = command(flag, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_an_output_that_is_full():
    with open("/dev/full", "w") as full:
        done = command("--help", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 6
    assert done.stderr.startswith(b"error[SYSTEM] output: No space left on device")
    assert done.stderr.count(b"\n") == 1


def test_no_output_at_all():
    done = command("--help", stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, b"")
