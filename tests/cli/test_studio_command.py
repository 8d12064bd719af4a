"""The command `studio` before it serves: what is missing is one line; the page itself is tested in tests/studio."""

from __future__ import annotations

import importlib.util
import socket

import pytest
from studio_page import make_run

from undiffuse.cli import main
from undiffuse.errors import ConfigError
from undiffuse.studio import server


def failed(arguments, capsys) -> str:
    """The only line that a command prints, which ends with exit code 2 or 6."""
    assert main(["studio", *arguments]) in (2, 6)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line


def test_without_runs_the_command_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert failed([], capsys).startswith("error[NO_RUNS] studio: ")
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    assert "undiffuse train digits" in failed([], capsys)
    assert failed(["nothing"], capsys) == "error[NOT_FOUND] nothing: no such run. Name a run folder or a model file."


def test_the_runs_in_the_folder_runs_are_opened(tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(server, "serve", lambda runs, port, announce: opened.extend(runs) or announce("http://here"))
    for name in ("b", "a", "imported"):
        make_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "imported" / "run.json").unlink(missing_ok=True)  # undiffuse import writes a model alone
    assert main(["studio"]) == 0
    assert [str(run.path) for run in opened] == ["runs/a", "runs/b", "runs/imported"]
    with pytest.raises(ConfigError, match=r"no run.json in this folder records the data. Give an image.$"):
        _ = opened[2].data
    assert capsys.readouterr().out.startswith("studio: http://here\n")


def test_missing_packages_and_libraries_are_named(tmp_path, monkeypatch, capsys):
    run = str(make_run(tmp_path / "run"))
    monkeypatch.setattr(server, "STATIC", tmp_path)
    assert "Run 'make studio'" in failed([run], capsys)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    line = failed([run], capsys)
    assert line == "error[MISSING_PACKAGE] uvicorn: not installed. Install them: pip install 'undiffuse[studio]'."


def test_a_port_in_use_names_the_flag(tmp_path, monkeypatch, capsys):
    run = str(make_run(tmp_path / "run"))
    monkeypatch.setattr(server, "read_files", dict)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert failed([run, "--port", port], capsys).startswith(f"error[PORT] --port {port}: ")
