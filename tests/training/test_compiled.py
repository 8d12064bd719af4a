"""Whether a run compiles its network: measured once, where the recipe leaves it open, and kept when the run resumes."""

import itertools
from functools import partial

import pytest
import torch
from tiny_run import checkpoint_hashes, data, quick_looks, recipe, stopping_at, train

from undiffuse.model.config import TrainConfig, replace_train
from undiffuse.training import compiled
from undiffuse.training import fit as loop

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "device", "tried"),
    [
        ({"minutes": 10.0}, GPU, True),
        ({"max_steps": 2000}, GPU, True),
        ({"minutes": 9.0}, GPU, False),
        ({"max_steps": 1999}, GPU, False),
        ({"minutes": 10.0}, CPU, False),
        ({"minutes": 10.0, "compile": True}, GPU, False),
        ({"minutes": 10.0, "compile": False}, GPU, False),
    ],
)
def test_long_runs_on_a_gpu_that_leave_it_open_try_it(settings, device, tried):
    assert compiled.is_tried(TrainConfig(**settings), device) == tried


def choose(monkeypatch, seconds, first=39.5):
    """`compiled.choose` by a clock: a gradient of each form takes ``seconds``, and the first compiled one more."""
    monkeypatch.setattr(torch, "compile", lambda network: f"compiled {network}")
    now, calls = [0.0], []

    def gradient(form):
        calls.append(form)
        now[0] += seconds[form] + (first if form == "compiled it" and calls.count(form) == 1 else 0)

    waits = itertools.count()
    return (*compiled.choose("it", gradient, lambda: next(waits), lambda: now[0]), calls, next(waits))


@pytest.mark.parametrize(("with_compiler", "faster"), [(0.25, True), (0.75, False)])
def test_the_faster_form_is_chosen(with_compiler, faster, monkeypatch):
    found, line, calls, waits = choose(monkeypatch, {"it": 0.5, "compiled it": with_compiler})
    assert found is faster
    said = "" if faster else "not "
    assert line == (
        f"note: the network is {said}compiled: a gradient takes {1e3 * with_compiler:.0f} ms compiled "
        "(40 s to compile), 500 ms not"
    )
    assert calls == ["it"] * 6 + ["compiled it"] * 6
    assert waits == 8  # before and after each measured time


def test_a_form_that_fails_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: None)

    def gradient(form):
        if form is None:
            raise RuntimeError("no C++ compiler\nmore lines")

    assert compiled.choose("it", gradient) == (
        False,
        "note: the network is not compiled, because that failed: no C++ compiler",
    )


@pytest.mark.parametrize("faster", [False, True])
def test_a_resumed_run_keeps_the_choice(faster, tmp_path, monkeypatch, capsys):
    """And computes what a run without it does, by dynamo without its code generator."""
    forms, tried = [], []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(compiled, "is_tried", lambda settings, device: settings.compile is None)
    real = loop.compute_gradient
    monkeypatch.setattr(loop, "compute_gradient", lambda *given: (forms.append(given[2]), real(*given))[1])

    def choose(network, gradient, synchronize):
        gradient(network)
        tried.append(network)
        return faster, "note: measured"

    monkeypatch.setattr(compiled, "choose", choose)
    with quick_looks():
        with stopping_at(2):
            train(recipe(4), tmp_path / "stopped", data())
        assert (len(tried), len(forms)) == (1, 3)
        train(recipe(4), tmp_path / "stopped", data())
        train(replace_train(recipe(4), compile=False), tmp_path / "plain", data())
    assert (len(tried), len(forms)) == (1, 9)
    assert [hasattr(form, "_orig_mod") for form in forms] == [False, *[faster] * 4, *[False] * 4]
    assert checkpoint_hashes(tmp_path / "stopped", 4) == checkpoint_hashes(tmp_path / "plain", 4)
