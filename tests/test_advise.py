"""The advisor on data whose flow is known: it finds the better solver and grid, and fits grids as its formula says."""

import math

import pytest
import torch
from oracles import GaussianData, LabelledMixture, MixtureData, Spy

from undiffuse import solvers
from undiffuse.advise import SAME, Choice, Measured, Reference, advise, fitted, leaping, most, reference, refine, rmse
from undiffuse.conditioning import Condition
from undiffuse.errors import ConfigError
from undiffuse.process import schedule as schedules

F64 = torch.float64
LINE = schedules.LinearLogSNR(high=12.0, low=-8.0)
SCHEDULES = {
    "linear_log_snr": LINE,
    "flow": schedules.Flow(),
    "variance_exploding": schedules.VarianceExploding(),
    "linear": schedules.build("linear", T=1000),
    "cosine": schedules.build("cosine", T=1000),
}
CLUSTERS = MixtureData([0.3, 0.5, 0.2], torch.tensor([[-1.0], [0.1], [1.2]]), torch.tensor([[0.1], [0.2], [0.05]]))


def starts(schedule, n=40, dims=1):
    scale = max(1.0, float(schedule(1.0).sigma))
    quantiles = (torch.arange(n * dims, dtype=F64) + 0.5) / (n * dims)
    shuffled = quantiles[torch.randperm(n * dims, generator=torch.Generator().manual_seed(0))]
    return scale * torch.special.ndtri(shuffled).reshape(n, dims)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_reference_is_the_flow(name):
    schedule = SCHEDULES[name]
    start, ticks = starts(schedule), []
    known = reference(CLUSTERS.denoiser(schedule), start, 200, ticks.append)
    clean = known.levels[-1] if known.levels[-1].sigma > 0 else known.levels[-2]
    exact = CLUSTERS.flow(start, known.levels[0], clean)
    ends_in_noise = known.levels[-1].sigma > 0
    exact = exact / clean.alpha if ends_in_noise else CLUSTERS.denoiser(schedule)(exact, clean).x
    assert known.end.shape == start.shape
    error = rmse(known.end, exact)
    assert float(error.mean()) < 3e-4
    assert float(known.coarse.mean()) > 2 * float(error.mean())  # what it says of itself is no less than it is
    assert (sum(ticks), len(known.levels), len(known.change)) == (300, 201, 199)


def test_the_change_is_that_of_the_prediction_along_the_flow():
    data = GaussianData(torch.tensor([0.3, -0.2]), torch.tensor([0.04, 1.0]))
    denoise, start = data.denoiser(LINE), starts(LINE, 20, 2)
    known = reference(denoise, start, 200)
    exact = torch.stack([denoise(data.flow(start, known.levels[0], level), level).x for level in known.levels[:-1]])
    change = exact.diff(dim=0).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(known.change, change, rtol=0.02, atol=1e-5)


def test_a_leap_to_data():
    times = leaping(LINE, 5, 2.0)
    assert (times[0], times[-1]) == (1.0, 0.0)
    found = LINE(torch.tensor(times[:-1], dtype=F64)).log_snr
    torch.testing.assert_close(found, torch.tensor([-8.0, -5.5, -3.0, -0.5, 2.0], dtype=F64), rtol=0, atol=1e-9)
    table = SCHEDULES["linear"]
    k = 1000 * torch.tensor(leaping(table, 5, 2.0), dtype=F64)
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-9)
    at = table(k[1:-1] / 1000).log_snr
    top = float(table(1.0).log_snr)
    assert float((at - torch.linspace(top, 2.0, 5, dtype=F64)[1:]).abs().max()) < 0.02
    assert leaping(LINE, 1, 2.0) == (1.0, 0.0)


def known_of(schedule, lam, size):
    """A reference whose x̂ changes by ``size(lambda)`` a unit of lambda/c, on levels at equal ``lam``."""
    levels = [schedule(schedule.inverse(2 * v)) for v in lam]
    middle, width = 0.5 * (lam[1:] + lam[:-1]), lam.diff()
    change = size(middle) * width / torch.sqrt(torch.sigmoid(2 * middle))
    return Reference(torch.zeros(1), torch.zeros(1), levels, change[:-1])


@pytest.mark.parametrize(("rate", "power"), [(0.0, 0.5), (0.7, 0.5), (-0.5, 0.25), (0.9, 1 / 3)])
def test_a_fitted_grid_shares_the_error_out(rate, power):
    """For a change e^(rate lambda) the times lie where e^(rate power lambda) falls on a straight line."""
    lam = torch.linspace(-4, 6, 4001, dtype=F64)
    found = fitted(known_of(LINE, lam, lambda v: 3 * torch.exp(rate * v)), LINE, 7, power)
    ends, r = torch.tensor([-4.0, 6.0], dtype=F64), rate * power
    line = torch.linspace(0, 1, 8, dtype=F64)
    expected = torch.lerp(*ends, line)
    if r:
        expected = torch.log(torch.lerp(*torch.exp(r * ends), line)) / r
    assert (found[0], found[-1], len(found)) == (1.0, 0.0, 8)
    torch.testing.assert_close(
        0.5 * LINE(torch.tensor(found, dtype=F64)).log_snr[1:-1], expected[1:-1], rtol=0, atol=2e-3
    )


def test_a_fitted_grid_of_what_never_changes_is_straight():
    known = known_of(LINE, torch.linspace(-4, 6, 101, dtype=F64), torch.zeros_like)
    expected = torch.linspace(-4, 6, 6, dtype=F64)[1:-1]
    torch.testing.assert_close(0.5 * LINE(torch.tensor(fitted(known, LINE, 5, 0.5), dtype=F64)).log_snr[1:-1], expected)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_fitted_times_fall_from_noise_to_data_on_every_schedule(name, steps):
    schedule = SCHEDULES[name]
    known = reference(CLUSTERS.denoiser(schedule), starts(schedule, 5), 40)
    found = torch.tensor(fitted(known, schedule, steps, 0.5), dtype=F64)
    assert (found[0], found[-1], len(found)) == (1, 0, steps + 1)
    assert (found.diff() < 0).all()
    if schedule.steps:
        torch.testing.assert_close(found * 1000, (found * 1000).round(), rtol=0, atol=1e-9)
    if steps == 9:  # most of them where the clusters part, not at the ends
        inside = schedule(found[1:-1]).log_snr
        assert ((inside > -6) & (inside < 10)).all()


def test_times_of_a_short_table_are_fewer_where_two_are_one():
    table = schedules.build("linear_rescaled", T=25)
    known = reference(CLUSTERS.denoiser(table), starts(table, 5), 25)
    found = fitted(known, table, 20, 1.0)
    assert 3 <= len(found) < 21
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("calls", [1, 7])
@pytest.mark.parametrize("name", ["linear_log_snr", "flow", "linear"])
def test_as_many_steps_as_the_calls_allow(name, calls):
    schedule, start = SCHEDULES[name], starts(SCHEDULES[name], 3)
    for solver in ("ddim", "heun", "rk4", "dpm++2s", "dpm++3m", "unipc", "exponential"):
        for spacing in ("uniform", "karras")[: 1 + (solver == "heun")]:
            found = most(Choice(solver, 1, spacing), schedule, calls)
            if found is None:
                assert Choice(solver, 1, spacing).calls(schedule) > calls
                continue
            spy = Spy(CLUSTERS.denoiser(schedule))
            found.walk(spy, start)
            assert len(spy.seen) == found.calls(schedule) <= calls
            assert Choice(solver, found.steps + 1, spacing).calls(schedule) > calls


def test_no_more_steps_than_a_table_has():
    assert most(Choice("ddim", 1), schedules.build("linear_rescaled", T=20), 50) == Choice("ddim", 20)


def test_a_measurement_by_hand():
    best, other = (Measured(Choice("ddim", 2), 2, torch.tensor(e, dtype=F64)) for e in ([1.0, 2, 3], [2.0, 2, 5]))
    assert best.mean == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert other.behind(best) == (1.0, pytest.approx(1 / math.sqrt(3)))
    assert other.behind(other) == (0.0, 0.0)
    assert Measured(Choice("ddim", 2), 2, torch.ones(1)).mean == (1.0, math.inf)
    torch.testing.assert_close(
        rmse(torch.tensor([[[1.0, 2]], [[0, 0]]]), torch.tensor([[[1.0, 5]], [[0, 1]]])),
        torch.tensor([4.5, 0.5]).sqrt().double(),
    )


@pytest.mark.parametrize("name", ["linear_log_snr", "flow", "linear"])
def test_the_ranking_is_right(name):
    """At ten calls the second order beats the first on every grid of its own, and a bad grid is not advised."""
    schedule = SCHEDULES[name]
    ticks = []
    advice = advise(
        CLUSTERS.denoiser(schedule),
        starts(schedule),
        10,
        ticks.append,
        ["ddim", "dpm++2m", "ancestral", "euler", "inversion"],
    )
    errors = {(str(one.choice), one.choice.spacing): one for one in advice.ranking}
    assert [one.mean[0] for one in advice.ranking] == sorted(one.mean[0] for one in advice.ranking)
    assert advice.ranking[0].choice.solver == "dpm++2m"
    for spacing in ("uniform", "quadratic"):
        difference, stderr = errors["ddim", spacing].behind(errors["dpm++2m", spacing])
        assert difference > 3 * stderr > 0
    worst = max(advice.ranking, key=lambda one: one.mean[0])
    assert worst.mean[0] > 3 * advice.ranking[0].mean[0]
    fits = [key for key in errors if key[1] == "fitted"]
    assert fits
    for solver, _ in fits:  # a grid of its own is at least as good as a uniform one, on items that it was not fitted to
        assert errors[solver, "fitted"].mean[0] <= 1.1 * errors[solver, "uniform"].mean[0]
    assert advice.ranking[0].choice.spacing == "fitted"
    assert set(advice.left_out) == {"ancestral", "euler", "inversion"}
    assert all(one.calls <= 10 for one in advice.ranking)
    assert sum(ticks) > 150 + 10 * len(advice.ranking)


def test_what_is_told_is_told_to_every_item():
    """The label of each item goes with it, to the half that fits grids too: as if their data had been alone."""
    labels = torch.tensor([0, 0, 1])
    known = LabelledMixture(CLUSTERS.weights, CLUSTERS.means, CLUSTERS.values, labels)
    spy, start = Spy(known.denoiser(LINE)), starts(LINE, 15)
    for label in (0, 1):
        cond = Condition(label=torch.full((15,), label))
        advice = advise(spy, start, 6, names=["ddim", "dpm++2m"], fine=20, cond=cond)
        alone = advise(known.group(label).denoiser(LINE), start, 6, names=["ddim", "dpm++2m"], fine=20)
        torch.testing.assert_close(advice.known.end, alone.known.end, rtol=0, atol=1e-9)
        assert [one.choice.solver for one in advice.ranking] == [one.choice.solver for one in alone.ranking]
    turns = Condition(label=torch.arange(15) % 2)
    spy.seen.clear()
    advise(spy, start, 3, names=["ddim"], fine=4, cond=turns)
    assert {len(x) for x, *_ in spy.seen} == {7, 15}
    assert all(torch.equal(cond.label, turns.label[: len(x)]) for x, _, cond, _ in spy.seen)


@pytest.mark.parametrize("name", ["linear_log_snr", "flow", "linear"])
def test_a_grid_is_refined(name):
    """From a bad start it gets better, keeps its ends and its steps, and what cannot be moved stays."""
    schedule, start, ticks = SCHEDULES[name], starts(SCHEDULES[name], 30), []
    denoise = CLUSTERS.denoiser(schedule)
    known = reference(denoise, start, 100)
    bad = Choice("dpm++2m", 8, "karras" if name != "linear_log_snr" else "quadratic")
    better = refine([bad], denoise, start, known.end, ticks.append)
    errors = [float(rmse(choice.walk(denoise, start), known.end).mean()) for choice in (bad, better)]
    assert errors[1] < 0.9 * errors[0]
    assert (better.spacing, len(better.times), better.times[0], better.times[-1]) == ("fitted", 9, 1.0, 0.0)
    assert len(ticks) > 10
    assert set(ticks) == {8}
    if schedule.steps:
        assert all(abs(1000 * t - round(1000 * t)) < 1e-9 for t in better.times)
    again = refine([better], denoise, start, known.end)
    assert float(rmse(again.walk(denoise, start), known.end).mean()) <= errors[1]
    assert refine([Choice("ddim", 1)], denoise, start, known.end) == Choice("ddim", 1)


def test_a_best_grid_stays():
    """Where the reference is that very walk, nothing is better."""
    start, best = starts(LINE, 10), Choice("ddim", 6, "karras")
    assert (
        refine([Choice("ddim", 6), best], CLUSTERS.denoiser(LINE), start, best.walk(CLUSTERS.denoiser(LINE), start))
        == best
    )


def test_every_solver_is_tried_or_left_out_with_a_reason():
    schedule = SCHEDULES["linear_log_snr"]
    data = GaussianData(torch.tensor([0.3, -0.2]), torch.tensor([0.04, 1.0]))
    advice, again = (advise(data.denoiser(schedule), starts(schedule, 20, 2), 6, fine=20) for _ in range(2))
    tried = {one.choice.solver for one in advice.ranking}
    assert tried.isdisjoint(advice.left_out)
    assert tried | set(advice.left_out) == set(solvers.SOLVERS)
    assert {"ddim", "heun", "unipc"} <= tried
    assert advice.left_out["ancestral"] == "draws noise"
    assert advice.left_out["euler"] == "takes the steps of ddim"
    assert advice.left_out["inversion"] == "has no order of convergence"
    assert [one.choice for one in advice.ranking] == [one.choice for one in again.ranking]
    assert all(torch.equal(a.error, b.error) for a, b in zip(advice.ranking, again.ranking, strict=True))
    walks = [(str(one.choice), *(round(float(v.t), 6) for v in one.choice.levels(schedule))) for one in advice.ranking]
    assert len(set(walks)) == len(walks)  # uniform and log_snr are one grid here


def test_solvers_that_take_the_steps_of_another():
    start = starts(LINE, 10)
    for name, other in SAME.items():
        ends = [Choice(solver, 9).walk(CLUSTERS.denoiser(LINE), start) for solver in (name, other)]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("calls", "fine"), [(0, 200), (10, 3)])
def test_nothing_to_measure(calls, fine):
    with pytest.raises(ConfigError, match="nothing can be measured"):
        advise(CLUSTERS.denoiser(LINE), starts(LINE), calls, fine=fine)
