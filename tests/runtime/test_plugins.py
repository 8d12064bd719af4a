"""A package with a solver, a network, a source and a metric, installed beside undiffuse."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from undiffuse.errors import ConfigError
from undiffuse.runtime import plugins
from undiffuse.runtime.plugins import WithPlugins, load_plugin

PACKAGE = '''
"""A source of data, whose module imports nothing heavy."""

from undiffuse.data.sources.registry import Option, Source

LINES = Source("a file of lines", lambda: __import__("lines"), (Option("skip", int | None, "Lines to leave out."),))

'''
LINES = """
from pathlib import Path

import numpy as np


def sniff(source):
    return Path(source).suffix == ".lines"


def load(source, skip=0):
    from undiffuse.data.from_array import from_array

    return from_array(np.loadtxt(source, ndmin=2, skiprows=skip), name=Path(source).name)
"""
SLOW = """
from torch import nn

from undiffuse.evaluation.metrics import Metric, Value
from undiffuse.sampling.solvers.ddim import DDIM


class Halves(DDIM):
    pass


class Flat(nn.Module):
    def __init__(self, channels, out_channels):
        super().__init__()
        self.layer = nn.Linear(channels, out_channels)

    def forward(self, x, time, cond=None):
        return self.layer(x)


def count(samples, reference):
    return Value(float(len(samples)), 0.0)


COUNT = Metric("number of samples", count, "samples", "higher", "none", (0.0, 1e9))
"""
ENTRY_POINTS = """
[undiffuse.solvers]
halves = slow:Halves
ddim = slow:Never

[undiffuse.networks]
flat = slow:Flat

[undiffuse.sources]
lines = extra:LINES

[undiffuse.metrics]
count = slow:COUNT
"""
RECIPE = """
[model]
network = {kind = "flat"}
chain_length = 5
[train]
batch = 8
warmup = 1
precision = "float32"
"""
SCRIPT = """
import sys
from undiffuse.cli import main

def run(line):
    code = main(line.split())
    assert code == 0, (line, code)

run("sample --help")
run("train --help")
assert "torch" not in sys.modules
run("train data.lines --skip 1 --steps 2 --config recipe.toml --out run")
run("sample run --n 40 --solver halves --steps 5 --out halves")
run("sample run --n 40 --solver ddim --steps 5 --out ddim")
run("compare halves --metric count")
"""


@pytest.fixture
def package(tmp_path):
    for name, text in {"extra.py": PACKAGE, "lines.py": LINES, "slow.py": SLOW}.items():
        (tmp_path / "installed" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "installed" / name).write_text(text)
    facts = tmp_path / "installed" / "extra-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "data.lines").write_text("a b\n" + "\n".join(f"{i % 7} {i / 3}" for i in range(200)))
    return tmp_path


def in_process(folder: Path, script: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(folder / "installed"), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_kind_of_plugin_works_from_the_command_line(package):
    done = in_process(package, SCRIPT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    for text in ("halves", "Lines to leave out", "number of samples"):
        assert text in done.stdout


def test_a_broken_package_is_one_line(package):
    (package / "installed" / "extra.py").write_text("import no_such_module")
    done = in_process(package, "from undiffuse.cli import run\nrun()")
    assert done.returncode == 2
    assert done.stderr == (
        "error[PLUGIN] undiffuse.sources 'lines': importing extra:LINES fails (ModuleNotFoundError: No module named "
        "'no_such_module'). Correct or uninstall the package extra.\n"
    )


def test_a_plugin_replaces_no_row_and_is_imported_when_it_is_looked_up(monkeypatch):
    found = {name: EntryPoint(name, f"no_such_module:{name}", "group") for name in ("a", "z")}
    monkeypatch.setattr(plugins, "plugins", lambda group: found)
    table = WithPlugins({"b": 1, "a": 2}, "group")
    assert (list(table), len(table), table["a"]) == (["b", "a", "z"], 3, 2)
    with pytest.raises(ConfigError, match="no_such_module"):
        table["z"]
    with pytest.raises(KeyError):
        table["y"]
    with pytest.raises(ConfigError, match="uninstall"):
        load_plugin(found["a"])


def test_the_package_itself_needs_no_entry_points():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert not {f'entry-points."{group}"' for group in plugins.GROUPS} & set(project)
