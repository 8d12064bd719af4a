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
    ("settings", "device", "processes", "is_open"),
    [
        ({"minutes": 10.0}, GPU, 1, True),
        ({"max_steps": 2000}, GPU, 1, True),
        ({"minutes": 9.0}, GPU, 1, False),
        ({"max_steps": 1999}, GPU, 1, False),
        ({"minutes": 10.0}, CPU, 1, False),
        ({"minutes": 10.0}, GPU, 2, False),
        ({"minutes": 10.0, "compile": True}, GPU, 1, False),
        ({"minutes": 10.0, "compile": False}, GPU, 1, False),
    ],
)
def test_long_runs_of_one_process_on_a_gpu_may_take_either_form(settings, device, processes, is_open):
    assert compiled.is_open(TrainConfig(**settings), device, processes) == is_open


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
    form, line, calls, waits = choose(monkeypatch, {"it": 0.5, "compiled it": with_compiler})
    assert form == ("compiled it" if faster else None)
    said = "" if faster else "not "
    assert line == (
        f"note: the network is {said}compiled: a gradient takes {1e3 * with_compiler:.0f} ms compiled "
        "(40 s to compile), 500 ms not"
    )
    assert calls == ["it"] * 6 + ["compiled it"] * 6
    assert waits == 5  # before and after each measured time, and after compiling


def test_a_form_that_fails_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network: None)

    def gradient(form):
        if form is None:
            raise RuntimeError("no C++ compiler\nmore lines")

    line = "note: the network is not compiled, because that failed: no C++ compiler"
    assert compiled.choose("it", gradient) == compiled.compile_network("it", gradient) == (None, line)


class Forms:
    """The forms of the network with which gradients are computed, and the networks that were compared."""

    def __init__(self, monkeypatch, faster):
        self.used, self.compared = [], []
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # without a code generator
        monkeypatch.setattr(compiled, "is_open", lambda settings, device, processes: settings.compile is None)
        real = loop.compute_gradient

        def compute_gradient(*given):
            self.used.append(given[2])
            return real(*given)

        monkeypatch.setattr(loop, "compute_gradient", compute_gradient)

        def choose(network, gradient, synchronize):
            self.compared.append(network)
            form, line = compiled.compile_network(network, gradient)
            return (form if faster else None), line or "note: measured"

        monkeypatch.setattr(compiled, "choose", choose)

    def are_compiled(self):
        return [hasattr(form, "_orig_mod") for form in self.used]


@pytest.mark.parametrize("faster", [False, True])
def test_a_resumed_run_keeps_the_choice(faster, tmp_path, monkeypatch):
    """And computes what a run without it does."""
    forms = Forms(monkeypatch, faster)
    with quick_looks():
        with stopping_at(2):
            train(recipe(4), tmp_path / "stopped", data())
        train(recipe(4), tmp_path / "stopped", data())
        train(replace_train(recipe(4), compile=False), tmp_path / "plain", data())
    again = [True] if faster else []  # the trial of a resumed run
    assert len(forms.compared) == 1
    assert forms.are_compiled() == [True, *[faster] * 2, *again, *[faster] * 2, *[False] * 4]
    assert checkpoint_hashes(tmp_path / "stopped", 4) == checkpoint_hashes(tmp_path / "plain", 4)


def test_a_trial_that_fails_leaves_no_gradient(tmp_path, monkeypatch):
    """In the second of two backward passes, at the start or when a compiled run resumes."""
    config = replace_train(recipe(4), accumulate=2)
    forms = Forms(monkeypatch, True)
    with quick_looks():
        train(replace_train(config, compile=False), tmp_path / "plain", data())
        with stopping_at(2):
            train(config, tmp_path / "resumed", data())
    assert forms.are_compiled()[-2:] == [True, True]
    calls, real = itertools.count(), torch.compile

    def fail(*_):
        if next(calls) == 1:
            raise RuntimeError("out of memory")

    def breaks(network):
        form = real(network)
        form.register_forward_hook(fail)
        return form

    monkeypatch.setattr(torch, "compile", breaks)
    with quick_looks():
        for name in ("resumed", "new"):
            calls = itertools.count()
            train(config, tmp_path / name, data())
            assert checkpoint_hashes(tmp_path / name, 4) == checkpoint_hashes(tmp_path / "plain", 4)
    assert not any(forms.are_compiled()[-4:])


def test_a_run_that_began_without_a_choice_stays_as_it_is(tmp_path, monkeypatch):
    forms = Forms(monkeypatch, True)
    with quick_looks():
        with stopping_at(2), monkeypatch.context() as short:
            short.setattr(compiled, "is_open", lambda *_: False)
            train(recipe(4), tmp_path / "run", data())
        train(recipe(4), tmp_path / "run", data())
    assert forms.are_compiled() == [False] * 4
    assert forms.compared == []
