"""Models and runs of earlier versions can be read and resumed, with the same results."""

import shutil
from pathlib import Path

import pytest
import torch
from golden.build import HERE, answers, resume

from undiffuse.model.checkpoint import load
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.sampling.sampler import Sampler

VERSIONS = sorted(path.parent for path in HERE.glob("*/answers.safetensors"))


@pytest.mark.parametrize("golden", VERSIONS, ids=lambda path: path.name)
def test_a_run_of_that_version_is_read_and_resumed(golden: Path, tmp_path):
    expected, tags = read_tensors(golden / "answers.safetensors")
    shutil.copytree(golden, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    run = resume(tmp_path / "run")
    actual = answers(run)
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)
    weights, again = load(golden).state_dict(), load(run).state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-5)
    samples = load(golden).sample(8, seed=1, sampler=Sampler(num_steps=4))
    assert torch.equal(samples, expected["samples"]) or tags["torch"] != torch.__version__


def test_golden_runs_exist_and_are_small():
    assert VERSIONS
    for golden in VERSIONS:
        assert sum(path.stat().st_size for path in golden.rglob("*")) < 200_000
