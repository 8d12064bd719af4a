"""Two processes over gloo equal one: losses, gradients, weights, checkpoints of training and the model's file.

A pair of processes runs a whole plan; the expected results are computed here, in one process.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import gathering
import numpy as np
import pytest
import torch

from undiffuse.model.checkpoint import load
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.training.monitor import Monitor

WAYS = {  # kind, settings of two processes, bits of their numbers
    "replicated": ("diffusion", {"accumulate": 2}, 64),
    "sharded": ("diffusion", {"shard": True, "accumulate": 2, "checkpointing": True}, 64),
    "muon-sharded": ("muon", {"shard": True}, 64),
    "classifier": ("classifier", {"accumulate": 2}, 64),
    "classifier-sharded": ("classifier", {"shard": True}, 64),
    "latents": ("latents", {}, 64),
    "captions": ("captions", {}, 64),
    "started-sharded": ("started", {"shard": True}, 64),
}
SAMPLES = {"--n": "5", "--batch": "2", "--steps": "3"}
CHANGES = {"sharded-one": {"shard": True}}  # started by two processes and resumed by one
MORE_WAYS = {
    f"{name}-{bits}": ("diffusion", settings, bits)
    for name, settings in {
        "replicated": {},
        "accumulated": {"accumulate": 3},
        "recomputed": {"checkpointing": True},
        "sharded": {"shard": True},
        "sharded-accumulated": {"shard": True, "accumulate": 3},
        "compiled": {"compile": True},
    }.items()
    for bits in (64, 32)
    if (name, bits) != ("compiled", 64)
} | {"muon": ("muon", {"accumulate": 2}, 64)}
MORE_CHANGES = {"one-two": {}, "two-one": {}, "one-sharded": {"shard": True}, "sharded-one": {"shard": True}}
STEPS, STOP = 4, 2


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def run(plan, folder: Path, processes: int = 2) -> None:
    """Run a plan with several processes, which write into ``folder``."""
    (folder / "plan.json").write_text(json.dumps(plan))
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    env |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(processes), "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, "-W", "ignore", gathering.__file__, str(folder / "plan.json"), str(folder)]
    members = []
    for rank in range(processes):
        with open(folder / f"output-{rank}.txt", "w") as output:
            own = {**os.environ, **env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            members.append(subprocess.Popen(command, env=own, stdout=output, stderr=subprocess.STDOUT))
    try:
        codes = [member.wait(timeout=1500) for member in members]
    finally:
        for member in members:
            member.kill()
            member.wait()
    output = "\n".join(f"process {rank}: {(folder / f'output-{rank}.txt').read_text()}" for rank in range(processes))
    assert codes == [0] * processes, output


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the run's files: weights, averages, moments, snapshots, and the model's own."""
    files = [*(folder / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")]
    files += [folder / "model.safetensors", *(folder / "snapshots").glob("*.safetensors")]
    return {f"{file.name} {key}": t for file in files for key, t in read_tensors(file)[0].items()}


def run_all(ways, changes, place: Path) -> Path:
    """Run the ways with two processes, and what they are compared with in one; all in ``place``."""
    plan = [
        [name, str(place / name), kind, settings, None, bits == 64] for name, (kind, settings, bits) in ways.items()
    ]
    with pytest.MonkeyPatch.context() as patch:  # `gathering.train` replaces these
        for name in ("record_step", "evaluate_now", "finish"):
            patch.setattr(Monitor, name, getattr(Monitor, name))
        for kind, bits in sorted({("diffusion", 64), *((kind, bits) for kind, _, bits in ways.values())}):
            one = f"one-{kind}-{bits}"
            steps = gathering.train(place / one, kind, {}, None, bits == 64)
            (place / f"{one}.json").write_text(json.dumps(steps))
        for name, settings in changes.items():
            if name.startswith("one"):
                gathering.train(place / name, "diffusion", settings, STOP, True)
            stop = None if name.startswith("one") else STOP
            plan.append([name, str(place / name), "diffusion", settings, stop, True])
        if "latents" in ways:
            gathering.save_stages(place)
            gathering.draw_cascade(place / "one-cascade", SAMPLES)
            plan.append(["cascade", str(place / "cascade"), "cascade", SAMPLES, None, False])
        run(plan, place)
        for name, settings in changes.items():
            if not name.startswith("one"):
                gathering.train(place / name, "diffusion", settings, None, True)
    return place


def numbers(place: Path, name: str) -> np.ndarray:
    return np.array(json.loads((place / f"{name}.json").read_text()))


def check_steps(place: Path, name: str, kind: str, bits: int) -> float:
    """Compare loss, gradient norm and learning rate of every step; the largest difference."""
    two = numbers(place, name)
    assert two.shape == (STEPS, 3)
    difference = np.abs(two - numbers(place, f"one-{kind}-{bits}")).max()
    assert difference <= (1e-12 if bits == 64 else 1e-4)
    return float(difference)


def check_files(place: Path, name: str, kind: str, bits: int) -> None:
    one, two = tensors(place / f"one-{kind}-{bits}"), tensors(place / name)
    assert one.keys() == two.keys()
    assert len(one) > (200 if kind == "classifier" else 300)
    for key, tensor in one.items():
        assert two[key].dtype == tensor.dtype
        tolerance = {"rtol": 1e-5, "atol": 1e-9} if bits == 64 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(two[key], tensor, **tolerance, msg=key)
    if bits == 32:  # a model file holds float32
        assert load(place / name).config == load(place / f"one-{kind}-{bits}").config


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return run_all(WAYS, CHANGES, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return run_all(MORE_WAYS, MORE_CHANGES, tmp_path_factory.mktemp("many"))


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_equal_one(few, name):
    kind, _, bits = WAYS[name]
    check_steps(few, name, kind, bits)
    check_files(few, name, kind, bits)


def test_one_process_resumes_the_sharded_run_of_two(few):
    check_files(few, "sharded-one", "diffusion", 64)


def test_two_processes_draw_the_samples_of_a_cascade(few):
    """Each draws other samples; all stages of a sample are of one process."""
    one, two = (np.load(few / name / "samples.npz")["x"] for name in ("one-cascade", "cascade"))
    assert one.shape == (5, 1, 4, 4)
    np.testing.assert_array_equal(one, two)
    assert [p.name for p in sorted((few / "cascade").iterdir())] == [
        p.name for p in sorted((few / "one-cascade").iterdir())
    ]


@pytest.mark.release
@pytest.mark.parametrize("name", MORE_WAYS)
def test_every_way_to_run_equals_one_process(many, name):
    kind, _, bits = MORE_WAYS[name]
    difference = check_steps(many, name, kind, bits)
    check_files(many, name, kind, bits)
    print(f"\n1 x 2B against 2 x B, {name}: at most {difference:.1e} apart")


@pytest.mark.release
@pytest.mark.parametrize("name", MORE_CHANGES)
def test_a_run_resumes_with_another_number_of_processes(many, name):
    check_files(many, name, "diffusion", 64)
