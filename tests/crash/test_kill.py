"""Kills, stops, races and limits on files, each in a fork of a separate process: see kill.py."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from systems import SYSTEMS


def kill(*arguments):
    command = [sys.executable, str(Path(__file__).with_name("kill.py")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kills_stops_and_races_change_nothing():
    output = kill("--kills", 10, "--stops", 3, "--races", 1, "--initial-kills", 4, "--points", "--systems", 0)
    assert [line.split(":")[0] for line in output.splitlines()] == [
        "A2 kills",
        "A5 stops",
        "A6 races",
        "--init, A2 kills",
        "A2 named points",
        "A4 limits on files of 0, 300, 1000, 3000, 9000, 90000 bytes",
        "A2 systems",
    ]


@pytest.mark.parametrize("function", sorted({name for row in SYSTEMS.values() for name, _ in row.moments}))
def test_the_functions_at_which_a_command_dies_exist(function):
    """Most of them are called in the release suite alone."""
    assert callable(pkgutil.resolve_name(function))


@pytest.mark.release
def test_many_kills_stops_and_races_change_nothing():
    more = ("--initial-kills", 60, "--points", "--systems", 20, "--seed", 1)
    kill("--kills", 200, "--stops", 40, "--races", 50, *more)
