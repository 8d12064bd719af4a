"""Two processes over gloo do what one does: losses, gradients, weights, checkpoints of training and the model's file.

A pair of processes runs a whole plan; what it should find is computed here, in one process.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import crew
import numpy as np
import pytest
import torch

from undiffuse.checkpoint import load, read_tensors
from undiffuse.train.watch import Watch

WAYS = {  # settings of two processes, and the bits of their numbers
    "replicated": ({"accumulate": 2}, 64),
    "sharded": ({"shard": True, "accumulate": 2, "checkpointing": True}, 64),
}
CHANGES = {"shards-one": {"shard": True}}  # stopped by two and gone on with by one
MORE_WAYS = {
    f"{name}-{bits}": (settings, bits)
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
}
MORE_CHANGES = {"one-two": {}, "two-one": {}, "one-shards": {"shard": True}, "shards-one": {"shard": True}}
STEPS, STOP = 4, 2


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def run(plan, folder: Path, processes: int = 2) -> None:
    """A crew at work on a plan; what it says is in files in ``folder``."""
    (folder / "plan.json").write_text(json.dumps(plan))
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    env = {**os.environ, **env, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(processes)}
    command = [sys.executable, "-W", "ignore", crew.__file__, str(folder / "plan.json"), str(folder)]
    members = []
    for rank in range(processes):
        with open(folder / f"said-{rank}.txt", "w") as said:
            own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            members.append(subprocess.Popen(command, env=own, stdout=said, stderr=subprocess.STDOUT))
    try:
        codes = [member.wait(timeout=1500) for member in members]
    finally:
        for member in members:
            member.kill()
            member.wait()
    said = "".join((folder / f"said-{rank}.txt").read_text()[-2000:] for rank in range(processes))
    assert codes == [0] * processes, said


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the run's files: weights, averages, moments, snapshots, and the model's own."""
    files = [*(folder / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")]
    files += [folder / "model.safetensors", *(folder / "snapshots").glob("*.safetensors")]
    return {f"{file.name} {key}": t for file in files for key, t in read_tensors(file)[0].items()}


def carry_out(ways, changes, place: Path) -> Path:
    """Runs a plan with two processes, and with one what it is compared with; the folder of them all."""
    plan = [[name, str(place / name), settings, None, bits == 64] for name, (settings, bits) in ways.items()]
    with pytest.MonkeyPatch.context() as patch:  # `crew` puts its own in their place
        for name in ("step", "look", "finish"):
            patch.setattr(Watch, name, getattr(Watch, name))
        for bits in {64, *(bits for _, bits in ways.values())}:
            (place / f"one-{bits}.json").write_text(json.dumps(crew.train(place / f"one-{bits}", {}, None, bits == 64)))
        for name, settings in changes.items():
            if name.startswith("one"):
                crew.train(place / name, settings, STOP, True)
            plan.append([name, str(place / name), settings, None if name.startswith("one") else STOP, True])
        run(plan, place)
        for name, settings in changes.items():
            if not name.startswith("one"):
                crew.train(place / name, settings, None, True)
    return place


def numbers(place: Path, name: str) -> np.ndarray:
    return np.array(json.loads((place / f"{name}.json").read_text()))


def check_the_curve(place: Path, name: str, bits: int) -> float:
    """Loss, norm of the gradient and learning rate of every step; how far they are apart at most."""
    two = numbers(place, name)
    assert two.shape == (STEPS, 3)
    apart = np.abs(two - numbers(place, f"one-{bits}")).max()
    assert apart <= (1e-12 if bits == 64 else 1e-4)
    return float(apart)


def check_the_files(place: Path, name: str, bits: int) -> None:
    one, two = tensors(place / f"one-{bits}"), tensors(place / name)
    assert one.keys() == two.keys()
    assert len(one) > 300
    for key, tensor in one.items():
        assert two[key].dtype == tensor.dtype
        near = {"rtol": 1e-5, "atol": 1e-9} if bits == 64 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(two[key], tensor, **near, msg=key)
    if bits == 32:  # a model's file holds float32
        assert load(place / name).config == load(place / f"one-{bits}").config


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return carry_out(WAYS, CHANGES, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return carry_out(MORE_WAYS, MORE_CHANGES, tmp_path_factory.mktemp("many"))


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_do_what_one_does(few, name):
    check_the_curve(few, name, WAYS[name][1])
    check_the_files(few, name, WAYS[name][1])


def test_what_two_began_in_shares_one_goes_on_with(few):
    check_the_files(few, "shards-one", 64)


@pytest.mark.release
@pytest.mark.parametrize("name", MORE_WAYS)
def test_any_way_to_run_does_what_one_process_does(many, name):
    apart = check_the_curve(many, name, MORE_WAYS[name][1])
    check_the_files(many, name, MORE_WAYS[name][1])
    print(f"\n1 x 2B against 2 x B, {name}: {apart:.1e} apart at most")


@pytest.mark.release
@pytest.mark.parametrize("name", MORE_CHANGES)
def test_a_run_goes_on_with_another_number_of_processes(many, name):
    check_the_files(many, name, 64)
