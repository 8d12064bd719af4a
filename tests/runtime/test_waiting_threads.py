"""`import undiffuse` lets torch's threads spin for microseconds, unless the user has chosen how they wait."""

import json
import os
import subprocess
import sys

import pytest

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
SCRIPT = f"import json, os, undiffuse; print(json.dumps([os.environ.get(name) for name in {VARIABLES}]))"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [None, "1000"]),
        ({"OMP_WAIT_POLICY": "passive"}, ["passive", None]),
        ({"GOMP_SPINCOUNT": "7"}, [None, "7"]),
    ],
)
def test_the_choice_of_the_user_stays(given, expected):
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=others | given, capture_output=True, check=True)
    assert json.loads(done.stdout) == expected
