"""What the commands share: one process of several prints."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("rank", "shown"), [(None, "a line"), ("0", "a line"), ("1", "")])
def test_one_process_of_several_prints(rank, shown):
    program = "from undiffuse.cli.options import console; console.print('a line')"
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | (
        {"RANK": rank} if rank else {}
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == shown
