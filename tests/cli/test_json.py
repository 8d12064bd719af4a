"""--json: every command that shows a table has it, and prints one document on standard output and nothing else."""

import ast
import inspect
import json
import math
from pathlib import Path

import pytest
import typer
from tiny_run import data, quick_looks, recipe, train

from undiffuse import cli
from undiffuse.cli import results
from undiffuse.cli.app import app

COMMANDS = typer.main.get_command(app).commands
SHOWING = {"show", "add", "changes_as_table"}
"""The functions that put something into the document."""


def called(tree: ast.AST) -> set[str]:
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def test_every_command_that_shows_a_table_has_the_flag():
    having = {name for name, command in COMMANDS.items() if any("--json" in p.opts for p in command.params)}
    showing = {
        command.name
        for command in app.registered_commands
        if called(ast.parse(Path(inspect.getsourcefile(inspect.unwrap(command.callback))).read_text())) & SHOWING
    }
    assert having == showing
    assert {"evaluate", "compare", "advise", "inspect", "doctor", "check", "ema", "train", "watch", "export"} <= having


def test_tables_of_commands_are_shown_in_one_place():
    """`demo` is no command: it prints a tour."""
    for path in Path(cli.__file__).parent.glob("*.py"):
        if path.stem not in ("results", "demo"):
            assert "table.render" not in path.read_text(), path


def test_a_table_of_a_command_without_the_flag_is_an_error_of_the_command():
    with pytest.raises(LookupError):
        results.show([{"a": 1}])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with quick_looks():
        return train(recipe(2), tmp_path_factory.mktemp("run") / "run", data())


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["inspect", "RUN"], {"config", "item_shape", "transform", "info"}),
        (["watch", "RUN", "--once"], {"run", "data", "finished", "process", "records"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_document_is_all_of_standard_output(run, call, arguments, keys):
    arguments = [run if word == "RUN" else word for word in arguments]
    code, out, _ = call(*arguments, "--json")
    assert code == 0
    assert json.loads(out).keys() == keys
    code, text, _ = call(*arguments)
    assert code == 0
    assert not text.startswith("{")


def test_an_error_is_on_standard_error(call, tmp_path):
    code, out, err = call("inspect", tmp_path / "missing", "--json")
    assert (code, out, err.count("\n")) == (4, "", 1)


def test_numbers_are_whole_and_what_is_no_number_is_null(capsys):
    @results.with_json
    def command() -> None:
        print("progress")
        results.show([{"a": 1.25}], "title", a=1 / 3, b=math.nan, c=(1, math.inf), path=Path("x"), d={"e": True})

    command(as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1 / 3, "b": None, "c": [1, None], "path": "x", "d": {"e": True}}
    assert err == "progress\n"
    command()
    out, err = capsys.readouterr()
    assert out.startswith("progress\n")
    assert "title" in out
    assert err == ""
