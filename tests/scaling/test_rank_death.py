"""One process of two is killed under torchrun: the other exits, both are restarted, and nothing is lost.

One kill takes thirty seconds, in which four interpreters start; so this is for releases.
"""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.training.monitor import Monitor

KILLS, STEPS = 10, 8


def launch(run: Path, step: int, rank: int) -> float:
    """Seconds that two processes under torchrun take if ``rank`` is killed after ``step``."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    command += [str(Path(__file__).parent / "member.py"), str(run), str(step), str(rank)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return time.monotonic() - began


def tensors(run: Path) -> dict[str, torch.Tensor]:
    files = [run / "model.safetensors", *(run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")]
    files += [*(run / "snapshots").glob("*.safetensors")]
    return {f"{file.name} {key}": t for file in files for key, t in read_tensors(file)[0].items()}


@pytest.mark.release
def test_a_killed_process_changes_nothing(tmp_path, monkeypatch):
    for name in ("record_step", "evaluate_now", "finish"):
        monkeypatch.setattr(Monitor, name, getattr(Monitor, name))
    g, seconds, expected = random.Random(0), [], None
    for kill in range(-1, KILLS):
        place = tmp_path / str(kill)
        place.mkdir()
        step, rank = (0, 0) if kill < 0 else (g.randrange(1, STEPS + 1), g.randrange(2))
        seconds.append(launch(place / "run", step, rank))
        assert (place / "killed").exists() == (kill >= 0)
        actual = tensors(place / "run")
        expected = actual if expected is None else expected
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items()), (step, rank)
    assert max(seconds) < 60 + seconds[0]
    print(
        f"\nA12: {KILLS} kills of one process of two, {KILLS} runs equal to the bit; at most {max(seconds):.0f} s each"
    )
