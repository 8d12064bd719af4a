"""The evaluate command in several processes: its numbers are those of one, also after one of them was killed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluation_models import model_for

from undiffuse.cli import main
from undiffuse.data.sources import registry as datasets
from undiffuse.evaluation import plan as planning
from undiffuse.model import checkpoint

EVALUATOR = Path(__file__).parent / "evaluator.py"
OPTIONS = (
    "--items",
    "4",
    "--mc-samples",
    "2",
    "--precision",
    "float32",
    "--part",
    "all",
    "--estimate",
    "discrete",
    "--estimate",
    "continuous",
)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The arguments that evaluate a model of 3×2 images."""
    folder = tmp_path_factory.mktemp("evaluate")
    np.save(folder / "data.npy", np.random.default_rng(0).integers(256, size=(24, 1, 3, 2)).astype(np.uint8))
    checkpoint.save(model_for(datasets.load(str(folder / "data.npy"))), folder / "model.safetensors")
    return ["evaluate", str(folder / "model.safetensors"), str(folder / "data.npy"), "--device", "cpu", *OPTIONS]


def results(folder: Path):
    """All that is written, without what depends on the clock."""
    summary = json.loads((folder / "evaluation.json").read_text())
    del summary["sha256"]
    for estimate in summary["estimates"].values():
        del estimate["seconds"]
    return summary, (folder / "evaluation-items.csv").read_text()


@pytest.fixture(scope="module")
def one(command, tmp_path_factory):
    """The results of one process."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "batch_size", lambda *_: 1)
        assert main([*command, "--out", str(out)]) == 0
    return results(out)


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def test_two_processes_over_gloo(command, one, tmp_path):
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(EVALUATOR), *command, "--out", str(tmp_path)]
    processes = [
        subprocess.Popen(arguments, env=os.environ | env | {"RANK": r, "LOCAL_RANK": r}, stdout=-1, stderr=-1)
        for r in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert b"all numbers: " in outputs[0][0]
    assert outputs[1][0] == b""
    assert results(tmp_path) == one


@pytest.mark.release
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_loses_only_its_batch(command, one, tmp_path, rank):
    """torchrun restarts both processes, and they resume."""
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", "1", "--monitor-interval", "0.1", str(EVALUATOR), *command, "--out", str(tmp_path)]
    env = os.environ | {"DIES": str(rank), "MARKER": str(tmp_path / "died"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    assert "resuming an interrupted evaluation" in done.stdout
    assert results(tmp_path) == one
