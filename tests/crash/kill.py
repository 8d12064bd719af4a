"""Kills, stops and races training, and compares what comes out of it with a run that nothing disturbed.

    python tests/crash/kill.py --kills 200 --stops 40 --races 50

One line of figures a part; exit 1 where a promise is broken. A fork server: this process has imported everything, and
each training is the command line in a fork of it, so that a kill costs a second and not ten.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_run import STEPS, Trained, data, held, made, quick_look, same

from undiffuse.cli import main
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.train import Run, state
from undiffuse.train.watch import Watch

RECIPE = f"""
[model]
network = {{kind = "tiny"}}
schedule = {{name = "linear_log_snr", high = 6.0}}
weight = {{name = "edm"}}
steps = 5
[train]
batch = 12
steps = {STEPS}
warmup = 3
lr = 0.01
precision = "float32"
held_out = 0.2
previews = 8
snapshots = 2
"""


def cheap_looks(patch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> None:
        raise ConfigError("MISSING_PACKAGE", "matplotlib", "is not installed", "Install it")

    patch.setattr(Watch, "look", quick_look)
    patch.setattr(Watch, "_draw", lambda watch, *_: None)
    patch.setattr("undiffuse.report.pictures.training_curve", missing)


class Server:
    """Starts trainings in ``place`` as forks of this process."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.items, self.runs = data(), 0
        np.save(place / "tiny.npy", self.items.values)
        (place / "recipe.toml").write_text(RECIPE)
        assert self.train(place / "warm") == 0  # in this process: what a first run imports and builds is forked
        began = time.monotonic()
        assert self.wait(self.start(place / "straight")) == 0
        self.seconds = time.monotonic() - began
        self.expected = self.outcome(place / "straight")

    def fork(self, work: Callable[[], int], log: Path | int | None = None) -> int:
        """The process id of a fork that does ``work`` and ends with the code that it returns."""
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                torch.set_num_threads(1)
                path = os.devnull if log is None else log
                handle = path if isinstance(path, int) else os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                code = work()
                sys.stderr.flush()
            finally:
                os._exit(code)
        return pid

    def train(self, folder: Path) -> int:
        told = ["--levels", "5", "--config", str(self.place / "recipe.toml"), "--device", "cpu"]
        with contextlib.redirect_stdout(sys.stderr):
            return main(["train", str(self.place / "tiny.npy"), "--out", str(folder), *told])

    def start(self, folder: Path) -> int:
        return self.fork(lambda: self.train(folder), folder.with_suffix(".log"))

    def wait(self, pid: int, seconds: float | None = None) -> int | None:
        """The exit code, minus the signal that killed it, or None where it still runs after ``seconds``."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            done, status = os.waitpid(pid, 0 if until is None else os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if until is not None and time.monotonic() >= until:
                return None
            time.sleep(0.001)

    def fresh(self) -> Path:
        self.runs += 1
        return self.place / f"run-{self.runs}"

    def outcome(self, folder: Path) -> dict[str, str]:
        assert Run(folder).finished, folder
        left = [f for name in ("partial-*", "trash-*", "*.partial") for f in folder.rglob(name)]
        assert not left, left
        return held(folder) | made(folder, self.items)


def whole(folder: Path) -> bool:
    """Whether every step-* of a run is what was written, whatever is beside it."""
    for step in (folder / "checkpoints").glob("step-*"):
        try:
            state._verify(step)
        except CheckpointError as error:
            print(error)
            return False
    return True


def kills(server: Server, wanted: int) -> str:
    killed = writing = invalid = runs = different = 0
    while killed < wanted:
        folder, code = server.fresh(), None
        while code is None:
            pid = server.start(folder)
            code = server.wait(pid, server.random.uniform(0, 1.1 * server.seconds))
            if code is None:
                os.kill(pid, signal.SIGKILL)
                server.wait(pid)
                killed += 1
                writing += any(True for name in ("partial-*", "*.partial", "trash-*") for _ in folder.rglob(name))
                invalid += not whole(folder)
        runs += 1
        different += code != 0 or server.outcome(folder) != server.expected
        shutil.rmtree(folder)
    assert not invalid
    assert not different
    return (
        f"A2 kills: {killed}, {writing} of them while it wrote; {runs} runs, all to the same sha256; 0 invalid folders"
    )


def stops(server: Server, wanted: int) -> str:
    asked = runs = early = 0
    slowest = 0.0
    while asked < wanted:
        folder, code = server.fresh(), None
        while code != 0:
            pid = server.start(folder)
            code = server.wait(pid, server.random.uniform(0.02, 1.1 * server.seconds))
            if code is None:
                number = (signal.SIGTERM, signal.SIGINT)[asked % 2]
                began = time.monotonic()
                os.kill(pid, number)
                code = server.wait(pid)
                slowest = max(slowest, time.monotonic() - began)
                asked += 1
                assert code in (0, 128 + number), (code, number)  # 0: it had just finished
                early += not (folder / "run.json").exists()
                assert whole(folder)
        runs += 1
        assert server.outcome(folder) == server.expected
        shutil.rmtree(folder)
    assert slowest < 5 + server.seconds
    return (
        f"A5 stops: {asked}, {early} of them before the run began; slowest {slowest:.2f} s; {runs} runs, all identical"
    )


def races(server: Server, wanted: int) -> str:
    slowest = 0.0
    for _ in range(wanted):
        folder = server.fresh()
        began = time.monotonic()
        pids = [server.start(folder) for _ in range(2)]
        first, status = os.wait()
        slowest = max(slowest, time.monotonic() - began)
        other = pids[1 - pids.index(first)]
        assert (os.waitstatus_to_exitcode(status), server.wait(other)) == (6, 0)
        said = folder.with_suffix(".log").read_text()
        assert f"error[BUSY] {folder}: process {other} is training into this folder" in said, said
        assert server.outcome(folder) == server.expected
        shutil.rmtree(folder)
    assert slowest < 2 + server.seconds / 4  # both share what there is of processors
    return (
        f"A6 races: {wanted}, one of two trained in each; the other said the first's number and left in {slowest:.2f} s"
    )


def limits(server: Server) -> str:
    """A real limit on the size of a file, which no write goes past; what is said goes into a pipe, which has none."""
    sizes = (0, 300, 1000, 3000, 9000, 90000)
    codes = []
    for size in sizes:
        folder = server.fresh()

        def work(folder: Path = folder, size: int = size) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return server.train(folder)

        reading, writing = os.pipe()
        codes.append(server.wait(server.fork(work, writing)))
        os.close(writing)
        with open(reading) as pipe:
            said = pipe.read()
        failed = "error[DISK]" in said and "bytes could not be written (File too large)" in said
        assert (codes[-1] == 6) == failed, said
        assert whole(folder)
        assert server.wait(server.start(folder)) == 0
        assert server.outcome(folder) == server.expected
    assert codes == sorted(codes, reverse=True), codes
    assert (codes[0], codes[-1]) == (6, 0), codes
    return f"A4 limits on files of {', '.join(map(str, sizes))} bytes: exit {codes}; all went on to the same sha256"


class Points:
    """Counts the moments before and after each system call of a checkpoint's write, and dies at the ``last``-th."""

    def __init__(self, last: int | None) -> None:
        self.last, self.names = last, []

    def reach(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, self._around(name, getattr(os, name)))
        patch.setattr(os, "write", self._piecewise(os.write))

    def _around(self, name: str, real: Callable) -> Callable:
        def call(*arguments, **more):
            self.reach(f"before {name}")
            real(*arguments, **more)
            self.reach(f"after {name}")

        return call

    def _piecewise(self, real: Callable) -> Callable:
        def write(handle: int, content: memoryview) -> int:
            ends = [len(content) * part // 4 for part in range(5)]
            self.reach("at 0 %")
            for part, (start, end) in enumerate(itertools.pairwise(ends), start=1):
                real(handle, content[start:end])
                self.reach(f"at {25 * part} %")
            return len(content)

        return write


def points(server: Server) -> str:
    """Dies at each moment of a write: the first one, over one of the same step, and with only one kept."""
    old, new, died, names = Trained(seed=3).train(2), Trained().train(4), 0, set()
    for scenario in ("first", "overwrite", "keep=1"):
        last, ended = 0, False
        while not ended:
            last += 1
            folder = server.fresh()
            old.progress.step = 4 if scenario == "overwrite" else 2
            if scenario != "first":
                old.write(folder)

            def work(folder: Path = folder, last: int = last, scenario: str = scenario) -> int:
                with pytest.MonkeyPatch.context() as patch:
                    Points(last).watch(patch)
                    new.write(folder, keep=1 if scenario == "keep=1" else 2)
                return 0

            ended = server.wait(server.fork(work)) == 0
            state.tidy(folder)
            assert all(f.name.startswith("step-") for f in folder.iterdir()) if folder.exists() else scenario == "first"
            found = Trained(seed=1)
            assert found.read(folder) == []
            none = found.progress.step == 0 and scenario == "first"
            assert none or same(found, new) or (scenario != "first" and same(found, old)), (scenario, last)
            assert not ended or same(found, new)
            new.write(folder)
            assert found.read(folder) == []
            assert same(found, new)
            shutil.rmtree(folder)
            died += not ended
        seen = Points(None)
        with pytest.MonkeyPatch.context() as patch:
            seen.watch(patch)
            new.write(server.fresh())
        names |= set(seen.names)
    return f"A2 named points: died at {died} moments of 3 kinds of write ({len(names)} names), 0 invalid, 0 lost"


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in ("kills", "stops", "races"):
        parser.add_argument(f"--{part}", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", action="store_true", help="named points of a write, and limits on files")
    told = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        cheap_looks(patch)
        server = Server(Path(place), told.seed)
        for part in (kills, stops, races):
            if wanted := getattr(told, part.__name__):
                print(part(server, wanted), flush=True)
        if told.points:
            print(points(server), flush=True)
            print(limits(server), flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
