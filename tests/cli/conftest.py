"""What the tests of commands share."""

from collections import namedtuple

import pytest

from undiffuse.cli import main

Said = namedtuple("Said", "code out err")


@pytest.fixture
def call(capsys):
    """call(*arguments) runs a command line and returns its exit code and what it printed."""

    def run(*arguments) -> Said:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return Said(code, *capsys.readouterr())

    return run
