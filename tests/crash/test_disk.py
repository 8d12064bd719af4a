"""A disk that is full or fails during training never harms the last valid checkpoint."""

import errno
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_run import checkpoint_hashes, data, model_hashes, quick_looks, recipe, stopping_at, train

from undiffuse.errors import ResourceError
from undiffuse.training import train_state as state
from undiffuse.training.monitor import Monitor
from undiffuse.training.run_folder import Run

ITEMS, RECIPE, STEPS = data(), recipe(8), 8
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    with quick_looks():
        return outcome(train(RECIPE, tmp_path_factory.mktemp("straight"), ITEMS))


def outcome(folder):
    return checkpoint_hashes(folder, STEPS) | model_hashes(folder, ITEMS)


class Failing:
    """Patches os.write, os.fsync and os.replace so that the call number ``last`` of them fails."""

    def __init__(self, patch, last, number):
        self.calls, self.last, self.number = 0, last, number
        for name in ("write", "fsync", "replace"):
            patch.setattr(os, name, self.around(getattr(os, name)))

    def around(self, real):
        def call(*arguments):
            self.calls += 1
            if self.calls == self.last:
                raise OSError(self.number, os.strerror(self.number))
            return real(*arguments)

        return call


def harm(cases, folder, straight):
    """The number of cases in which the run ended with error[DISK]; the others continued without an optional file."""
    ended = 0
    for last, number in cases:
        place = folder / f"{last}-{number}"
        with quick_looks(), stopping_at(2):
            train(RECIPE, place, ITEMS)
        before, name = checkpoint_hashes(place, 2), os.strerror(number)
        with quick_looks(), pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, last, number)
            try:
                train(RECIPE, place, ITEMS)
            except ResourceError as error:
                line = str(error)
                ended += line.startswith(f"error[DISK] {place}") and f" bytes could not be written ({name})" in line
        newest = max(state.verify_checkpoint(step).step for step in (place / "checkpoints").glob("step-*"))
        assert newest > 2 or checkpoint_hashes(place, 2) == before
        assert not list(place.rglob("partial-*"))
        with quick_looks():
            train(RECIPE, place, ITEMS)
        assert outcome(place) == straight, (last, number)
        assert failing.calls >= last
    return ended


def test_failing_system_calls(tmp_path, straight):
    cases = [(last, ERRORS[last % 3]) for last in (1, 2, 3, 8, 17, 18, 19, 26, 31, 38, 44, 51, 58)]
    assert harm(cases, tmp_path, straight) > 8


@pytest.mark.release
def test_each_of_sixty_system_calls_fails(tmp_path, straight):
    ended = harm(itertools.product(range(1, 61), ERRORS), tmp_path, straight)
    print(f"A4: 180 failing writes, fsyncs and renames: {ended} runs ended with exit 6, the others continued; 0 harm")
    assert ended > 120


@pytest.mark.release
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")
def test_full_disks():
    command = ["unshare", "--mount", sys.executable, str(Path(__file__).with_name("full.py"))]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_short_writes(tmp_path, monkeypatch, straight):
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, content: real(handle, content[: max(1, len(content) // 2)]))
    with quick_looks():
        assert outcome(train(RECIPE, tmp_path, ITEMS)) == straight


def test_training_continues_without_pictures_and_records(tmp_path, monkeypatch):
    """A message tells of each: samples at both evaluations, records, and the page. The model is written."""
    lines = []

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def unwritten(path, content):
        raise ResourceError("DISK", path, "no room", "Make some")

    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(Run, "write_metrics", lambda *_: unwritten(tmp_path / "metrics.jsonl", b""))
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
    train(recipe(2, previews=0), tmp_path, ITEMS)
    assert len([line for line in lines if line.startswith("not written: ")]) == 4
    assert (tmp_path / "model.safetensors").is_file()
