"""What earlier versions wrote is read for ever: models, runs that go on, and the numbers that come of them."""

import shutil
from pathlib import Path

import pytest
import torch
from golden.build import HERE, answers, go_on

from undiffuse.checkpoint import load, read_tensors

VERSIONS = sorted(path.parent for path in HERE.glob("*/answers.safetensors"))


@pytest.mark.parametrize("golden", VERSIONS, ids=lambda path: path.name)
def test_a_run_of_that_version_is_read_and_goes_on(golden: Path, tmp_path):
    known, told = read_tensors(golden / "answers.safetensors")
    shutil.copytree(golden, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    run = go_on(tmp_path / "run")
    found = answers(run)
    assert found.keys() == known.keys()
    for name in known:
        torch.testing.assert_close(found[name], known[name], rtol=1e-5, atol=1e-5)
    weights, again = load(golden).state_dict(), load(run).state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-5)
    samples = load(golden).sample(8, seed=1, steps=4)
    assert torch.equal(samples, known["samples"]) or told["torch"] != torch.__version__


def test_there_is_one_and_it_is_small():
    assert VERSIONS
    for golden in VERSIONS:
        assert sum(path.stat().st_size for path in golden.rglob("*")) < 200_000
