"""The policy of a GPU, run on a CPU: losses and norms are read only when a record is written; reads are counted."""

import json
import math
import sys

import pytest
import torch
from test_nonfinite import all_tensors, poison
from tiny_run import checkpoint_hashes, data, quick_looks, recipe, train
from torch.utils._python_dispatch import TorchDispatchMode

from undiffuse.errors import NonFiniteError
from undiffuse.training import fit as loop
from undiffuse.training import monitor as monitoring
from undiffuse.training import nonfinite
from undiffuse.training.nonfinite import UnreadSteps
from undiffuse.training.train_state import TrainState

ITEMS, STEPS = data(), 8
READS = {"aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::is_nonzero"}
CHECKS_OF_LEVELS = {"check_time", "_call_network"}
"""Functions that read times and noise levels, which are on the CPU in any case."""


class CountReads(TorchDispatchMode):
    """How often a number of a tensor is read on the host: ``item``, ``float``, ``bool``, ``equal``, ``nonzero``."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name in READS and caller() not in CHECKS_OF_LEVELS
        return function(*args, **(kwargs or {}))


def caller():
    """The name of the function, outside of torch and of this file, that calls torch."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_name


def reads_of_steps(tmp_path, patch, waits, **settings):
    """The reads of the gradient, of the averages and of what is kept, step by step; the tensors of each joint copy."""
    counts, copies = [], []
    patch.setattr(loop, "reading_waits", lambda device: waits)
    gradient, step, add = loop.compute_gradient, TrainState.step, UnreadSteps.add
    together = nonfinite.read_together
    patch.setattr(loop, "compute_gradient", lambda *a: counted(counts, gradient, *a))
    patch.setattr(TrainState, "step", lambda *a: counted(counts, step, *a))
    patch.setattr(UnreadSteps, "add", lambda *a: counted(counts, add, *a))
    patch.setattr(nonfinite, "read_together", lambda tensors: (copies.append(len(tensors)), together(tensors))[1])
    with quick_looks():
        train(recipe(STEPS, previews=0, snapshots=0, **settings), tmp_path, ITEMS)
    return counts, copies


def counted(counts, function, *arguments):
    with CountReads() as reads:
        result = function(*arguments)
    counts.append(reads.count)
    return result


def test_a_step_reads_nothing_where_reading_waits(tmp_path, monkeypatch):
    counts, copies = reads_of_steps(tmp_path, monkeypatch, waits=True)
    assert counts == [0] * 3 * STEPS
    assert copies == [3 * STEPS]  # losses, norm of the gradient and norm of the weights, at the record of the last step


def test_a_run_that_skips_steps_reads_once_a_step(tmp_path, monkeypatch):
    counts, copies = reads_of_steps(tmp_path, monkeypatch, waits=True, on_nonfinite="skip")
    assert counts == [0] * 3 * STEPS
    assert copies == [2] * STEPS + [3 * STEPS]


def test_a_cpu_reads_the_weights_of_each_step(tmp_path, monkeypatch):
    counts, copies = reads_of_steps(tmp_path, monkeypatch, waits=False)
    assert counts == [0, 0, 1] * STEPS
    assert copies == [2] * STEPS


def test_when_numbers_are_read_changes_nothing(tmp_path):
    """Weights, averages, moments and records, to the bit."""
    records = []
    with quick_looks(), pytest.MonkeyPatch.context() as patch:
        for waits in (False, True):
            patch.setattr(loop, "reading_waits", lambda device, waits=waits: waits)
            patch.setattr(monitoring, "STEPS_PER_RECORD", 3)
            folder = train(recipe(STEPS, previews=4, snapshots=STEPS), tmp_path / str(waits), ITEMS)
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            timed = ("seconds", "items_per_second", "data_share")
            records.append([{key: r[key] for key in r if key not in timed} for r in lines])
    assert records[0] == records[1]
    assert checkpoint_hashes(tmp_path / "True", STEPS) == checkpoint_hashes(tmp_path / "False", STEPS)


@pytest.mark.parametrize(("place", "bad"), [("loss", math.nan), ("gradient", math.inf), ("weight", math.inf)])
@pytest.mark.parametrize(("at", "previews"), [(3, 0), (4, 2)])
def test_the_first_bad_step_is_named_and_nothing_bad_is_written(place, bad, at, previews, tmp_path):
    """Steps after it are taken in memory; with previews a checkpoint of steps 4 and 8 is due."""
    config, names = recipe(STEPS, previews=previews, snapshots=2 * bool(previews)), []
    for waits in (False, True):
        with quick_looks(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "reading_waits", lambda device, waits=waits: waits)
            poison(patch, place, bad, at)
            with pytest.raises(NonFiniteError) as caught:
                train(config, tmp_path / str(waits), ITEMS)
        names.append((caught.value.code, caught.value.cause, caught.value.fix))
        assert all(bool(torch.isfinite(t).all()) for t in all_tensors(tmp_path / str(waits)))
    assert names[0] == names[1]


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_is_skipped_where_reading_waits(place, tmp_path):
    hashes = []
    for waits in (False, True):
        with quick_looks(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "reading_waits", lambda device, waits=waits: waits)
            poison(patch, place, math.nan, 3)
            folder = train(recipe(STEPS, previews=2, on_nonfinite="skip"), tmp_path / str(waits), ITEMS)
        assert '{"step": 3, "skipped": 1}' in (folder / "metrics.jsonl").read_text()
        hashes.append(checkpoint_hashes(folder, STEPS))
    assert hashes[0] == hashes[1]


def test_tensors_are_read_in_one_copy_and_keep_their_numbers():
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor(1e-30, dtype=torch.float64), torch.tensor([[3.0], [math.nan]])]
    one, two, three = nonfinite.read_together(tensors)
    assert one.tolist() == [1.0, 2.0]
    assert two.tolist() == [1e-30]
    assert three[0] == 3.0
    assert math.isnan(three[1])
