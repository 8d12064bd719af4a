"""The progress bar moves with an injected clock, between updates too."""

import io

import pytest
from rich.console import Console

from undiffuse.report.progress_bar import MAX_SHOWN, REFRESHES_PER_SECOND, ProgressBar, format_clock


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def bar_of(clock, terminal=True, **settings):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, color_system=None)
    return ProgressBar(console, "work", clock=clock, **settings), console, text


def drawn(bar, console):
    with console.capture() as capture:
        console.print(bar.bar.get_renderable())
    return capture.get()


def test_every_second_shows_something_else(clock):
    """A step of ten seconds at one tenth of the work: time, time left and fraction move all the while."""
    bar, console, _ = bar_of(clock)
    seen = [drawn(bar, console)]
    clock.now += 10
    bar.update(0.1, "step 1")
    for _ in range(10):
        seen.append(drawn(bar, console))
        clock.now += 1
    assert len(set(seen)) == 11
    assert "step 1 · 10 % · 0:10, 1:30 left" in seen[1]
    assert "step 1 · 19 % · 0:19, 1:21 left" in seen[-1]
    assert REFRESHES_PER_SECOND >= 1  # a thread of rich draws it


def test_before_the_first_update_the_time_moves(clock):
    bar, console, _ = bar_of(clock)
    clock.now += 3
    assert "0 % · 0:03" in drawn(bar, console)
    assert "left" not in drawn(bar, console)


def test_more_time_than_was_foreseen_is_never_the_end(clock):
    bar, *_ = bar_of(clock)
    clock.now += 1
    bar.update(0.5)
    clock.now += 1000
    fraction, text = bar.shown()
    assert fraction == MAX_SHOWN
    assert text.endswith("16:41, 0:00 left")


def test_work_in_amounts_and_a_known_time_left(clock):
    bar, *_ = bar_of(clock, total=200)
    clock.now += 4
    bar.advance(30)
    bar.advance(20)
    assert bar.shown() == (0.25, "25 % · 0:04, 0:12 left")
    bar.update(0.5, left=60.0, title="flow")
    clock.now += 6
    assert bar.shown() == (0.55, "55 % · 0:10, 0:54 left")
    assert bar.title == "flow"
    bar.restart("more", 10)
    assert bar.shown() == (0.0, "0 % · 0:00")
    bar.advance(20)
    assert bar.fraction == 1.0


def test_only_a_terminal_shows_it(clock):
    for terminal in (True, False):
        bar, _, text = bar_of(clock, terminal)
        with bar:
            bar.update(0.5, "half")
        assert ("half" in text.getvalue()) == terminal


def test_format_clock():
    assert [format_clock(s) for s in (0, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
