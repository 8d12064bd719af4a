"""Walks are ranked by the law of their samples, with a standard error that is an honest one."""

import math

import pytest
import torch

from undiffuse import advise, solvers
from undiffuse.advise import Choice
from undiffuse.codec import Identity
from undiffuse.config import ModelConfig
from undiffuse.diffusion import Diffusion
from undiffuse.metrics import law
from undiffuse.metrics.distance import frechet
from undiffuse.metrics.law import Judged, judge, nearest, noisy


class Exact(torch.nn.Module):
    """What is best said of x in N(mean, std²) at a level of log-SNR ``time``."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std, self.unused = mean, std, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t, time, cond=None):
        snr = torch.exp(time).double()[:, None]
        alpha = torch.sqrt(snr / (1 + snr))
        variance = alpha**2 * self.std**2 + 1 / (1 + snr)
        return (self.mean + alpha * self.std**2 / variance * (x_t - alpha * self.mean)).to(x_t)


def exact(mean=0.0, std=0.5) -> Diffusion:
    settings = {"schedule": {"name": "linear_log_snr", "high": 10.0, "low": -8.0}, "target": {"name": "x"}}
    model = Diffusion(ModelConfig(network={"kind": "mlp", "width": 4, "depth": 1}, **settings), (3,), Identity())
    model.network = Exact(mean, std)
    return model


def normal(n, seed, std=0.5):
    return std * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_the_walk_with_the_right_law_is_nearest():
    ticks = []
    good, bad, few = Choice("dpm++2m_sde", 40), Choice("dpm++2m_sde", 1), Choice("ancestral", 4)
    found, floor = judge(exact(), [bad, few, good], normal(600, 0), normal(900, 1), n=600, tick=ticks.append)
    assert ([one.choice for one in found], floor.choice) == ([good, few, bad], None)
    assert sum(ticks) == 600 * 45
    assert found[2].distance > 0.3
    difference, stderr = found[2].behind(found[0])
    assert difference == found[2].distance - found[0].distance
    assert difference > 10 * stderr > 0
    assert found[0].distance < 3 * floor.distance
    others, data = normal(900, 1)[-600:], normal(600, 0)
    assert floor.distance == pytest.approx(frechet(others, data), rel=1e-5)
    mean, error = floor.kernel
    assert abs(mean) < 5 * error
    assert found[2].kernel[0] > 5 * found[2].kernel[1]


def test_the_standard_error_is_the_spread_of_other_samples():
    """Of 40 sets; a jackknife's own spread there is some 20 %, the bounds are 2.5 of it and more."""
    model, found, errors = exact(), [], []
    for seed in range(40):
        _, one = judge(model, [], normal(400, 999), 1.5 * normal(200, seed), n=200)
        found.append(one.distance)
        errors.append(one.mean[1])
    spread = float(torch.tensor(found).std())
    assert 0.6 * spread < sum(errors) / len(errors) < 1.6 * spread


def test_a_jackknife_by_hand():
    a, b = torch.arange(10.0).double(), torch.zeros(10).double()
    one, other = Judged(None, 5.0, a, (0.0, 0.0)), Judged(None, 2.0, b, (0.0, 0.0))
    stderr = math.sqrt(9 / 10 * sum((i - 4.5) ** 2 for i in range(10)))
    assert one.mean == (5.0, pytest.approx(stderr))
    assert one.behind(other) == (3.0, pytest.approx(stderr))
    assert one.behind(one) == (0.0, 0.0)


def test_what_is_walked(monkeypatch):
    model, asked = exact(), []
    monkeypatch.setattr(model, "sample", lambda *a, **walk: asked.append((*a, walk)) or normal(30, 5))
    choices = [Choice("ddim", 2, "fitted", {"eta": 0.5}, (1.0, 0.5, 0.0)), Choice("ancestral", 3, "karras")]
    judge(model, choices, normal(40, 0), normal(50, 1), 30, 7, 16, print)
    walk = {"spacing": "uniform", "times": (1.0, 0.5, 0.0)}
    assert asked[0] == (30, 7, solvers.build("ddim", eta=0.5), 2, 16, print, walk)
    assert asked[1][3:] == (3, 16, print, {"spacing": "karras", "times": None})


def test_walks_that_leave_the_numbers_are_left_out(monkeypatch):
    model = exact()
    monkeypatch.setattr(model, "sample", lambda n, seed, solver, steps, *a, **walk: normal(30, 5) / (steps - 2))
    found, _ = judge(model, [Choice("ddim", 2), Choice("ddim", 3)], normal(40, 0), normal(50, 1), 30)
    assert [one.choice for one in found] == [Choice("ddim", 3)]


def test_more_components_than_compared_are_left_out(monkeypatch):
    monkeypatch.setattr(law, "COMPONENTS", 1)
    others = normal(500, 0) * torch.tensor([10.0, 1.0, 1.0])
    _, floor = judge(exact(), [], normal(400, 1) * torch.tensor([10.0, 5.0, 1.0]), others)
    assert floor.distance < 1  # the second number, which differs by 4, is not seen


def test_every_solver_that_draws_noise_and_converges(monkeypatch):
    model = exact()
    known = advise.reference(model.sampler(), torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), 40)
    found = noisy(model, known, 10)
    rows = [(name, solvers.build(name)) for name in solvers.SOLVERS]
    assert {choice.solver for choice in found} == {n for n, one in rows if one.draws and one.order is not None}
    assert {"ancestral", "dpm++2m_sde", "dpm++3m_sde"} <= {choice.solver for choice in found}
    assert [choice.spacing for choice in found[:3]] == ["uniform", "karras", "fitted"]
    for choice in found:
        assert 8 <= choice.calls(model.schedule) <= 10
        if choice.spacing == "fitted":
            order = solvers.build(choice.solver).order or 0
            assert choice.times == advise.fitted(known, model.schedule, choice.steps, 1 / (order + 1))
        elif choice.settings:
            leap = float(choice.spacing.removeprefix("to log-SNR "))
            assert choice.settings == {"end": "low"}
            assert choice.times == advise.leaping(model.schedule, choice.steps, leap)
        else:
            assert choice.times is None
    leaps = [(one.solver, one.spacing.split()[-1]) for one in found if one.settings]
    assert leaps == [(name, leap) for name in ("dpm++2m_sde", "dpm++3m_sde") for leap in ("1.5", "3", "4.5", "6")]
    monkeypatch.setattr(law, "LEAPS", (-8.0, -7.9, 9.9, 10.0))
    ends = {one.spacing for one in noisy(model, known, 10) if one.settings}
    assert ends == {"to log-SNR -7.9", "to log-SNR 9.9"}
    assert not any(one.settings for one in noisy(model, known, 1))
    assert noisy(model, known, 0) == []


def test_the_best_of_a_quarter_are_compared_by_all(monkeypatch):
    asked = []

    def judged(model, choices, data, others, n, seed, tick):
        asked.append(([one.steps for one in choices], n, seed, tick))
        return [Judged(one, float(one.steps), torch.zeros(10), (0.0, 0.0)) for one in choices][::-1], "floor"

    monkeypatch.setattr(law, "judge", judged)
    model, data, others = exact(), normal(30, 0), normal(30, 1)
    found, floor = nearest(model, [Choice("ddim", n) for n in range(6)], data, others, 100, 3, print)
    assert asked == [([0, 1, 2, 3, 4, 5], 25, 3, print), ([5, 4, 3, 2], 100, 3, print)]
    assert ([one.choice.steps for one in found if one.choice], floor) == ([2, 3, 4, 5], "floor")
    nearest(model, [Choice("ddim", 1)], data, others, 40)
    assert [n for _, n, *_ in asked[2:]] == [20, 40]
