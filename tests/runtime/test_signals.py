"""Signals: which are heeded, what they raise, and what their messages speak of."""

import signal

import pytest

from undiffuse.runtime.signals import (
    STOP_SIGNALS,
    Interrupted,
    StoppedImmediately,
    collect_stop_signals,
    interruptible,
    signals_as_exceptions,
)


@pytest.fixture(autouse=True)
def handlers():
    """The handlers are afterwards what they were."""
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    yield
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


def test_a_closed_terminal_is_a_request_to_stop():
    assert signal.SIGHUP in STOP_SIGNALS
    for number in STOP_SIGNALS:
        with collect_stop_signals() as requests:
            signal.raise_signal(number)
            assert requests == [number]


@pytest.mark.parametrize("saved", [False, True])
def test_a_second_signal_speaks_of_a_checkpoint_if_there_is_one(saved):
    with collect_stop_signals(lambda: saved) as requests:
        signal.raise_signal(signal.SIGHUP)
        assert requests == [signal.SIGHUP]
        with pytest.raises(StoppedImmediately) as stopped:
            signal.raise_signal(signal.SIGINT)
    assert stopped.value.exit_code == 130
    assert ("checkpoint" in stopped.value.message) == saved


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_stays_ignored(number):
    """``nohup undiffuse train`` goes on when the terminal is closed."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with collect_stop_signals() as requests:
            signal.raise_signal(number)
        with signals_as_exceptions():
            signal.raise_signal(number)
        assert requests == []
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_what_signals_raise():
    for number, kind in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, StoppedImmediately)):
        with pytest.raises(kind), signals_as_exceptions():
            signal.raise_signal(number)
        with pytest.raises(Interrupted) as stopped, signals_as_exceptions(), interruptible():
            signal.raise_signal(number)
        assert (type(stopped.value), stopped.value.exit_code) == (Interrupted, 128 + number)
        assert "everything is saved" in stopped.value.message
    with pytest.raises(ValueError, match="a mistake"), signals_as_exceptions():
        raise ValueError("a mistake")
