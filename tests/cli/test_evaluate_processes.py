"""Evaluation by several processes: the batches are shared out, and all results are those of one, bit by bit."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse import checkpoint
from undiffuse import data as datasets
from undiffuse import estimate as estimates
from undiffuse.cli import evaluate as evaluation
from undiffuse.cli import main, partial
from undiffuse.cli.crew import Crew, alone
from undiffuse.cli.measure import wanted
from undiffuse.codec import Pixels
from undiffuse.config import ModelConfig
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.likelihood import Integrator

ESTIMATES = ("discrete", "continuous", "ode")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 3×2 images, labelled, and a model of them that hears the labels."""
    folder = tmp_path_factory.mktemp("evaluate")
    g = np.random.default_rng(0)
    np.savez(folder / "data.npz", data=g.integers(256, size=(24, 1, 3, 2)).astype(np.uint8), labels=np.arange(24) % 2)
    data = datasets.load(str(folder / "data.npz"))
    network = {"kind": "unet", "widths": [8], "blocks": 1, "attention": [], "classes": 2}
    config = ModelConfig(network=network, steps=5, schedule={"name": "linear_log_snr", "high": 8.0})
    about = {"levels": 256, "fingerprint": data.fingerprint, "classes": ["0", "1"]}
    torch.manual_seed(0)
    model = Diffusion(config, (1, 3, 2), Pixels(256), about)
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.1)
    checkpoint.save(model, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _small():
    """Many small batches, a rough flow, and a plan that no clock has a say in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "COARSE", Integrator(rtol=0.1, atol=0.1))
        patch.setattr(evaluation, "batch_size", lambda *_: 2)
        patch.setattr(evaluation, "speed", lambda *_: 1000.0)
        yield


class KilledError(BaseException):
    """What a process dies of here."""


def together(place, out, processes, die=None, **asked):
    """What each of some processes that are threads here returns of one evaluation, or dies of; ``die``: (rank, write).

    They meet at a barrier, and one that is killed ends the others, as a launcher does.
    """
    barrier, said, ends, writes = threading.Barrier(processes), [None] * processes, [None] * processes, [0] * processes
    here, real, lock = threading.local(), partial.write, threading.Lock()

    def write(*what):
        if (here.rank, writes[here.rank]) == die:
            raise KilledError
        writes[here.rank] += 1
        with lock:  # safetensors of threads, not of processes
            real(*what)

    def gather(rank):
        def told(it):
            barrier.wait()
            said[rank] = it
            barrier.wait()
            return list(said)

        return told

    def run(rank):
        here.rank = rank
        model = checkpoint.load(place / "model.safetensors")
        data = datasets.load(str(place / "data.npz"))
        try:
            crew = Crew(rank, processes, "cpu", gather(rank))
            ends[rank] = evaluation.evaluate_model(model, data, out, "all", **asked, crew=crew)
        except BaseException as error:
            ends[rank] = error
            if isinstance(error, KilledError):
                barrier.abort()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial, "write", write)
        crew = [threading.Thread(target=run, args=(rank,)) for rank in range(processes)]
        for each in crew:
            each.start()
        for each in crew:
            each.join()
    return ends, writes


def results(folder: Path):
    """All that is written, without what the clock says."""
    report = json.loads((folder / "evaluation.json").read_text())
    for found in report["estimates"].values():
        del found["seconds"]
    return report, (folder / "evaluation-items.csv").read_text()


@pytest.fixture(scope="module")
def one(place):
    """The results of one process: five items of three estimates in three batches each."""
    together(place, place / "one", 1, items=5, draws=2)
    return results(place / "one")


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_finds_the_same_bits(place, tmp_path, one, capsys, processes):
    capsys.readouterr()
    ends, writes = together(place, tmp_path, processes, items=5, draws=2)
    assert list(ends[0]["estimates"]) == list(ESTIMATES)
    assert ends[1:] == [{}] * (processes - 1)
    assert writes == {2: [6, 3], 4: [3, 3, 3, 0]}[processes]
    assert results(tmp_path) == one
    assert capsys.readouterr().out.count("bits per dimension, given labels") == 1
    assert not (tmp_path / "evaluation.partial").exists()


@pytest.mark.parametrize(("processes", "die", "then"), [(2, (1, 1), 3), (3, (0, 2), 1), (1, (0, 4), 2)])
def test_killed_and_begun_again_by_another_number(place, tmp_path, one, monkeypatch, processes, die, then):
    ends, before = together(place, tmp_path, processes, die, items=5, draws=2)
    assert isinstance(ends[die[0]], KilledError)
    assert len(list((tmp_path / "evaluation.partial").glob("*.safetensors"))) == sum(before)
    monkeypatch.setattr(evaluation, "affordable", None)  # the plan is that of the first sitting
    _, after = together(place, tmp_path, then, items=5, draws=2)
    assert sum(before) + sum(after) == 9
    assert results(tmp_path) == one


def test_an_error_of_one_process_is_an_error_of_all(place, tmp_path, monkeypatch, capsys):
    real = Diffusion.nll

    def nll(*arguments, first=0, estimate="discrete", **more):
        if (first, estimate) in ((2, "ode"), (4, "ode")):
            raise ConfigError("ODE_END", f"item {first}", "there is no signal", "Use others")
        return real(*arguments, first=first, estimate=estimate, **more)

    monkeypatch.setattr(Diffusion, "nll", nll)
    ends, _ = together(place, tmp_path, 3, items=5, draws=2)
    assert list(ends[0]["estimates"]) == ["discrete", "continuous"]
    assert "no estimate 'ode': item 2: there is no signal" in capsys.readouterr().out
    ends, _ = together(place, tmp_path, 3, items=5, estimates=["ode"])
    assert [str(end) for end in ends] == ["error[ODE_END] item 2: there is no signal. Use others."] * 3


def test_a_budget_is_that_of_all_processes(place, tmp_path, monkeypatch):
    planned, real = [], evaluation.affordable

    def affordable(*arguments):
        planned.append(real(*arguments))
        return {"discrete": {"items": 2, "draws": 2, "batch": 2, "expected": 1.0, "fit": False}}

    monkeypatch.setattr(evaluation, "affordable", affordable)
    for processes in (1, 3):
        together(place, tmp_path, processes, minutes=0.5)
    one, three = (sum(job["expected"] for job in plan.values()) for plan in planned)
    assert three == pytest.approx(3 * one, rel=1e-9)


JOB = {"items": 9, "batch": 2, "expected": 3.0, "fit": True}


@pytest.mark.parametrize(
    ("seconds", "counted", "missing"),
    [
        ({}, [0, 2, 4, 6, 8], [0, 2, 4, 6, 8]),
        ({0: 1.0}, [0, 2, 4], [2, 4]),
        ({0: 1.0, 2: 1.0, 4: 1.0}, [0, 2, 4], []),
        ({0: 0.5, 2: 0.5, 4: 0.6}, [0, 2, 4, 6, 8], [6, 8]),
        ({0: 0.5, 2: 0.5, 4: 1.6}, [0, 2, 4], []),
        ({0: 9.0}, [0], []),
        ({0: 1.0, 4: 99.0}, [0, 2, 4], [2]),  # what is there too early has no say
        ({2: 99.0, 8: 99.0}, [0, 2, 4, 6, 8], [0, 4, 6]),
        ({0: 0.5, 2: 2.0, 4: 0.1}, [0, 2], []),  # nor what does not count any more
    ],
)
def test_which_batches_count(seconds, counted, missing):
    assert wanted(JOB, seconds) == (counted, missing)
    assert wanted(JOB | {"fit": False}, seconds)[0] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("seed", range(20))
def test_what_counts_is_the_same_by_any_way_there(seed):
    """Where the clock decides: any number of processes at any time, and any batches lost."""
    g = random.Random(seed)
    job = {"items": g.randint(1, 60), "batch": g.randint(1, 5), "expected": 10.0, "fit": True}
    took = {start: g.uniform(0.2, 3) for start in range(0, 60)}
    ends = []
    for _ in range(5):
        kept = {}
        while missing := wanted(job, kept)[1]:
            kept |= {start: took[start] for start in missing[: g.randint(1, 6)] if g.random() < 0.8}
        ends.append(wanted(job, kept)[0])
    assert ends == ends[:1] * 5


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


ARGUMENTS = ("--items", "4", "--draws", "2", "--part", "all", "--estimate", "discrete", "--estimate", "continuous")


def of_one(place, out, *options):
    command = ["evaluate", place / "model.safetensors", place / "data.npz", "--device", "cpu", "--out", out, *options]
    assert main([str(a) for a in command]) == 0
    return results(out)


def test_two_real_processes_find_what_one_does(place, tmp_path):
    """Over gloo."""
    asked = [str(a) for a in ("evaluate", place / "model.safetensors", place / "data.npz", "--device", "cpu")]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parent / "evaluator.py"
    command = [sys.executable, str(script), *asked, "--out", str(tmp_path / "two"), *ARGUMENTS]
    crew = [
        subprocess.Popen(command, env=os.environ | env | {"RANK": r, "LOCAL_RANK": r}, stdout=-1, stderr=-1)
        for r in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=200) for process in crew]
    finally:
        for process in crew:
            process.kill()
    assert [process.returncode for process in crew] == [0, 0], said
    assert b"all numbers: " in said[0][0]
    assert said[1][0] == b""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "batch_size", lambda *_: 1)
        assert of_one(place, tmp_path / "one", *ARGUMENTS) == results(tmp_path / "two")


@pytest.mark.release
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_costs_only_its_batch(place, tmp_path, rank):
    """torchrun begins both again, and they go on."""
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", "1", "--monitor-interval", "0.1", str(Path(__file__).parent / "evaluator.py")]
    asked = ["evaluate", place / "model.safetensors", place / "data.npz", "--device", "cpu", "--out", tmp_path / "two"]
    env = os.environ | {"DIES": str(rank), "MARKER": str(tmp_path / "died"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *map(str, asked), *ARGUMENTS], capture_output=True, text=True, timeout=400, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    assert "an interrupted evaluation goes on" in done.stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "batch_size", lambda *_: 1)
        assert of_one(place, tmp_path / "one", *ARGUMENTS) == results(tmp_path / "two")


def test_a_crew_of_one_hears_itself():
    assert alone("cuda").gather("x") == ["x"]
    assert alone()[:3] == (0, 1, "cpu")
