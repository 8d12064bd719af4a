"""Kills, stops and races training, and compares the results with an undisturbed run.

    python tests/crash/kill.py --kills 200 --stops 40 --races 50 --systems 20

Prints one line of figures for each part; exit 1 if a promise is broken. This process has imported everything, and each
training is the command line in a fork of it, so that a kill costs a second and not ten. ``--systems 0`` kills each
command of `systems.SYSTEMS` at its first moment, ``--systems N`` at all of them and N times at random.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import itertools
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import systems
import torch
import typer.main

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_run import Trained, checkpoint_hashes, data, equal_states, model_hashes, save_only

from undiffuse.cli import main
from undiffuse.errors import CheckpointError
from undiffuse.training import train_state as state
from undiffuse.training.monitor import Monitor
from undiffuse.training.run_folder import Run

STEPS = 16
RECIPE = f"""
[model]
network = {{kind = "tiny"}}
schedule = {{name = "linear_log_snr", high = 6.0}}
weight = {{name = "edm"}}
chain_length = 5
[train]
batch = 12
max_steps = {STEPS}
warmup = 3
lr = 0.01
precision = "float32"
held_out = 0.2
previews = 8
snapshots = 2
"""


def cheap_evaluations(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Monitor, "evaluate_now", save_only)
    patch.setattr(Monitor, "_draw", lambda monitor, *_: None)


class Server:
    """Starts a command as forks of this process, ``arguments(folder)`` with the output ``folder``, in ``place``.

    ``hashes(folder)``: those of all that it writes, which of an undisturbed command in place/``name`` are `expected`.
    """

    def __init__(
        self,
        place: Path,
        seed: int,
        arguments: Callable[[Path], list[str]],
        hashes: Callable[[Path], dict[str, str]],
        name: str = "straight",
    ) -> None:
        self.place, self.random, self.arguments, self.hashes, self.name = place, Random(seed), arguments, hashes, name
        self.runs = 0
        began = time.monotonic()
        assert self.run(place / name) == 0  # forks inherit what this run imports and caches
        self.seconds = time.monotonic() - began
        self.expected = self.outcome(place / name)

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

    def run(self, folder: Path) -> int:
        with contextlib.redirect_stdout(sys.stderr):
            return main(self.arguments(folder))

    def start(self, folder: Path, moment: tuple[str, int] | None = None) -> int:
        """The process id of the command into ``folder``, which kills itself at ``moment`` if given."""

        def work() -> int:
            if moment is not None:
                die_at(*moment)
            return self.run(folder)

        return self.fork(work, folder.with_suffix(".log"))

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
        return self.place / f"{self.name}-{self.runs}"

    def outcome(self, folder: Path) -> dict[str, str]:
        assert Run(folder).finished or not (folder / "checkpoints").exists(), folder
        leftovers = [f for name in ("partial-*", "trash-*", "*.partial") for f in folder.rglob(name)]
        assert not leftovers, leftovers
        return self.hashes(folder)


def finish_only(monitor: Monitor) -> None:
    monitor.task.save(monitor.ema_model, monitor.run.model)
    monitor.run.finish()


def die_at(target: str, call: int) -> None:
    """Kill this process when the function ``target``, a dotted name, has been called for the n-th time."""
    owner, _, name = target.rpartition(".")
    try:
        where: Any = importlib.import_module(owner)
    except ModuleNotFoundError:  # a method
        module, _, cls = owner.rpartition(".")
        where = getattr(importlib.import_module(module), cls)
    real, calls = getattr(where, name), itertools.count(1)

    def dying(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(where, name, dying)


def tiny_training(place: Path, seed: int, init: Path | None = None) -> Server:
    """Training a network of two convolutions, with ``init`` from the weights of that run.

    Recipe and ``init`` are named until the run has its record; then it is resumed as it was begun, from what it has
    kept.
    """
    items = data()
    np.save(place / "tiny.npy", items.values)
    (place / "recipe.toml").write_text(RECIPE)

    def arguments(folder: Path) -> list[str]:
        options = ["--num-values", "5", "--device", "cpu"]
        if init is None or not Run(folder).record:
            options += ["--config", str(place / "recipe.toml")]
            options += [] if init is None else ["--init", str(init)]
        return ["train", str(place / "tiny.npy"), "--out", str(folder), *options]

    with contextlib.redirect_stdout(sys.stderr):
        assert main(arguments(place / "warm")) == 0  # the next takes as long as its forks
    return Server(place, seed, arguments, lambda folder: checkpoint_hashes(folder, STEPS) | model_hashes(folder, items))


def intact(folder: Path) -> bool:
    """Whether every checkpoint step-* of a run is intact."""
    for step in (folder / "checkpoints").glob("step-*"):
        try:
            state.verify_checkpoint(step)
        except CheckpointError as error:
            print(error)
            return False
    return True


def initial_kills(server: Server, wanted: int) -> str:
    """`kills` of runs that start from the weights of another."""
    place = server.place / "started"
    place.mkdir()
    return f"--init, {kills(tiny_training(place, 0, server.place / 'straight'), wanted)}"


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
                invalid += not intact(folder)
        runs += 1
        different += code != 0 or server.outcome(folder) != server.expected
        shutil.rmtree(folder)
    assert not invalid
    assert not different
    return (
        f"A2 kills: {killed}, {writing} of them while it wrote; {runs} runs, all to the same sha256; 0 invalid folders"
    )


def killed_systems(place: Path, more: int, seed: int) -> str:
    """Kill each command of `systems.SYSTEMS` at its moments and ``more`` times at random; each resumes to the same.

    The end of training writes the model, and measures and draws nothing.
    """
    systems.prepare(place)
    died = 0
    for name, system in systems.SYSTEMS.items():
        server = Server(place, seed, functools.partial(system.arguments, place), systems.outcome, name)
        assert any("safetensors" in name or "npz" in name for name in server.expected), server.expected
        moments = system.moments if more else system.moments[:1]
        for moment in moments:
            folder = server.fresh()
            assert server.wait(server.start(folder, moment)) == -signal.SIGKILL, (name, moment)
            assert intact(folder)
            assert server.wait(server.start(folder)) == 0, folder.with_suffix(".log").read_text()
            assert server.outcome(folder) == server.expected, (name, moment)
            shutil.rmtree(folder)
        died += len(moments)
        if more:
            kills(server, more)
    more *= len(systems.SYSTEMS)
    return f"A2 systems: {len(systems.SYSTEMS)} commands, died at {died} moments and {more} random ones, 0 differ"


def stops(server: Server, wanted: int) -> str:
    sent = runs = early = 0
    slowest = 0.0
    while sent < wanted:
        folder, code = server.fresh(), None
        while code != 0:
            pid = server.start(folder)
            code = server.wait(pid, server.random.uniform(0.02, 1.1 * server.seconds))
            if code is None:
                number = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[sent % 3]
                began = time.monotonic()
                os.kill(pid, number)
                code = server.wait(pid)
                slowest = max(slowest, time.monotonic() - began)
                sent += 1
                assert code in (0, 128 + number), (code, number)  # 0: it has just finished
                early += not (folder / "run.json").exists()
                assert intact(folder)
        runs += 1
        assert server.outcome(folder) == server.expected
        shutil.rmtree(folder)
    assert slowest < 5 + server.seconds
    return (
        f"A5 stops: {sent}, {early} of them before the run began; slowest {slowest:.2f} s; {runs} runs, all identical"
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
        output = folder.with_suffix(".log").read_text()
        assert f"error[BUSY] {folder}: process {other} is training into this folder" in output, output
        assert server.outcome(folder) == server.expected
        shutil.rmtree(folder)
    assert slowest < 2 + server.seconds / 4  # both share the processors
    return f"A6 races: {wanted}, one of two trained in each; the other named it and exited within {slowest:.2f} s"


def limits(server: Server) -> str:
    """A limit on the size of files, set by the system; output goes into a pipe, which has none."""
    sizes = (0, 300, 1000, 3000, 9000, 90000)
    codes = []
    for size in sizes:
        folder = server.fresh()

        def work(folder: Path = folder, size: int = size) -> int:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            return server.run(folder)

        reading, writing = os.pipe()
        codes.append(server.wait(server.fork(work, writing)))
        os.close(writing)
        with open(reading) as pipe:
            output = pipe.read()
        failed = "error[DISK]" in output and "bytes could not be written (File too large)" in output
        assert (codes[-1] == 6) == failed, output
        assert intact(folder)
        assert server.wait(server.start(folder)) == 0
        assert server.outcome(folder) == server.expected
    assert codes == sorted(codes, reverse=True), codes
    assert (codes[0], codes[-1]) == (6, 0), codes
    return f"A4 limits on files of {', '.join(map(str, sizes))} bytes: exit {codes}; all resumed to the same sha256"


class Points:
    """Counts the moments before and after each system call of a checkpoint's write; kills at number ``last``."""

    def __init__(self, last: int | None) -> None:
        self.last, self.names = last, []

    def reach(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self, patch: pytest.MonkeyPatch) -> None:
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
    """Kill at each moment of a write: of the first checkpoint, over one of the same step, and with keep = 1."""
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
                    Points(last).install(patch)
                    patch.setattr(state, "KEPT_CHECKPOINTS", 1 if scenario == "keep=1" else 2)
                    new.write(folder)
                return 0

            ended = server.wait(server.fork(work)) == 0
            state.finish_interrupted_writes(folder)
            assert all(f.name.startswith("step-") for f in folder.iterdir()) if folder.exists() else scenario == "first"
            resumed = Trained(seed=1)
            assert resumed.read(folder) == []
            none = resumed.progress.step == 0 and scenario == "first"
            is_old = scenario != "first" and equal_states(resumed, old)
            assert none or is_old or equal_states(resumed, new), (scenario, last)
            assert not ended or equal_states(resumed, new)
            new.write(folder)
            assert resumed.read(folder) == []
            assert equal_states(resumed, new)
            shutil.rmtree(folder)
            died += not ended
        all_points = Points(None)
        with pytest.MonkeyPatch.context() as patch:
            all_points.install(patch)
            new.write(server.fresh())
        names |= set(all_points.names)
    return f"A2 named points: died at {died} moments of 3 kinds of write ({len(names)} names), 0 invalid, 0 lost"


PARTS = (kills, stops, races, initial_kills)


def run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for part in PARTS:
        parser.add_argument(f"--{part.__name__.replace('_', '-')}", type=int, default=0)
    parser.add_argument("--systems", type=int, help="random kills of each command of systems.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", action="store_true", help="named points of a write, and limits on files")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    typer.main.get_command = functools.cache(typer.main.get_command)
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        cheap_evaluations(patch)
        server = tiny_training(Path(place), options.seed)
        for part in PARTS:
            if wanted := getattr(options, part.__name__):
                print(part(server, wanted), flush=True)
        if options.points:
            print(points(server), flush=True)
            print(limits(server), flush=True)
        if options.systems is not None:
            (Path(place) / "systems").mkdir()
            patch.setattr(Monitor, "finish", finish_only)
            print(killed_systems(Path(place) / "systems", options.systems, options.seed), flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
