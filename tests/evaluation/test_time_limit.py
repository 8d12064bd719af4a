"""Measurements within a time, on a clock that only the measured work moves."""

import math

import pytest
import torch

from undiffuse.evaluation.time_limit import RELIABLE_CALLS, Pace, TimeLimit


class Machine:
    """A clock and work of ``seconds`` for each network call."""

    def __init__(self, seconds):
        self.now, self.seconds, self.done = 5.0, seconds, []

    def __call__(self):
        return self.now

    def measure(self, calls):
        def compute(here):
            self.now += self.seconds * calls * (here.stop - here.start)
            self.done.append((here.start, here.stop))
            return here

        return compute


def test_without_a_limit_everything_is_measured_at_once():
    machine = Machine(3.0)
    limit = TimeLimit(clock=machine)
    assert limit.calls_left == math.inf
    assert limit.in_parts(machine.measure(7), 64, 7) == [slice(0, 64)]
    assert limit.share(0.25).left == math.inf


def test_parts_that_the_memory_is_too_small_for_are_halved():
    """And those after them are no larger; the time of what failed counts."""
    machine, tried = Machine(3.0), []
    measure = machine.measure(7)

    def compute(here):
        tried.append(here.stop - here.start)
        if tried[-1] > 10:
            machine.now += 1.0
            raise torch.OutOfMemoryError
        return measure(here)

    limit = TimeLimit(clock=machine)
    assert limit.in_parts(compute, 60, 7) == [slice(i, min(i + 7, 60)) for i in range(0, 60, 7)]
    assert tried == [60, 30, 15, *[7] * 8, 4]
    assert (limit.calls, limit.spent) == (60 * 7, 60 * 7 * 3.0 + 3)


@pytest.mark.parametrize("guess", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("seconds", [0.001, 0.01, 0.05])
def test_what_fits_is_measured(seconds, guess):
    """Ten seconds for 64 items of eight calls, with a guess of the pace that is wrong by a factor of up to four."""
    machine, pace = Machine(seconds), Pace()
    pace.follow(seconds * guess)
    limit = TimeLimit(10.0, pace, machine)
    limit.in_parts(machine.measure(8), 64, 8)
    assert [start for start, _ in machine.done[1:]] == [stop for _, stop in machine.done[:-1]]
    items, spent = machine.done[-1][1], machine.now - 5.0
    possible = min(64, 10.0 / (8 * seconds))
    assert possible - 1.1 <= items or guess == 0.25
    assert items <= max(possible, possible / (2 * guess)) + 1e-9
    assert spent <= max(10.0, 10.0 / (2 * guess))
    if (parts := [stop - start for start, stop in machine.done]) and max(parts) * 8 >= RELIABLE_CALLS:
        assert pace.seconds == pytest.approx(seconds)


def test_nothing_is_measured_where_one_item_takes_too_long():
    machine, pace = Machine(1.0), Pace()
    pace.follow(1.0)
    assert TimeLimit(7.9, pace, machine).in_parts(machine.measure(8), 64, 8) == []
    assert TimeLimit(-3.0, pace, machine).calls_left == 0
    assert machine.now == 5.0


def test_the_pace_follows_the_machine():
    """A pace that was measured as half of its guess stays half of it when the machine slows down."""
    machine, pace = Machine(1.0), Pace()
    pace.follow(2.0)
    TimeLimit(2000.0, pace, machine).in_parts(machine.measure(1), 300, 1)
    assert pace.seconds == 1.0
    pace.follow(6.0)
    assert pace.seconds == 3.0
    assert TimeLimit(30.0, pace, machine).share(0.5).calls_left == pytest.approx(5.0)


def test_a_cold_start_does_not_spoil_the_measurements_after_it():
    """The first calls take a hundred times as long; the limit that they are in heeds it, and the next one not."""
    machine, pace = Machine(100.0), Pace()
    pace.follow(1.0)
    first = TimeLimit(40.0, pace, machine)
    assert first.in_parts(machine.measure(4), 64, 4) == [slice(0, 5)]
    assert pace.seconds < 1.6
    machine.seconds = 1.0
    assert len(TimeLimit(40.0, pace, machine).in_parts(machine.measure(4), 64, 4)) > 1
