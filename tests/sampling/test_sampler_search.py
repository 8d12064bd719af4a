"""The sampler search on data whose flow is known: the better solver and times, and the formula of fitted times."""

import math

import pytest
import torch
from oracles import GaussianData, LabelledMixture, MixtureData, Spy

from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.networks.condition import Condition
from undiffuse.process import schedule as schedules
from undiffuse.sampling import sampler_search
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.sampler_search import (
    ALIASES,
    MeasuredSampler,
    Reference,
    count_calls,
    early_stop_times,
    endpoint,
    fit_to_budget,
    fitted_times,
    reference_flow,
    refine_times,
    rmse,
    search_sampler,
)
from undiffuse.sampling.solvers import SOLVERS

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
    reference = reference_flow(CLUSTERS.denoiser(schedule), start, 200, ticks.append)
    clean = reference.noise_levels[-1] if reference.noise_levels[-1].sigma > 0 else reference.noise_levels[-2]
    exact = CLUSTERS.flow(start, reference.noise_levels[0], clean)
    ends_in_noise = reference.noise_levels[-1].sigma > 0
    exact = exact / clean.alpha if ends_in_noise else CLUSTERS.denoiser(schedule)(exact, clean).x
    assert reference.endpoint.shape == start.shape
    error = rmse(reference.endpoint, exact)
    assert float(error.mean()) < 3e-4
    assert float(reference.coarse_error.mean()) > 2 * float(error.mean())  # an upper bound of the error
    assert (sum(ticks), len(reference.noise_levels), len(reference.x_change)) == (300, 201, 199)


def test_x_change_is_the_change_of_the_prediction_along_the_flow():
    data = GaussianData(torch.tensor([0.3, -0.2]), torch.tensor([0.04, 1.0]))
    denoise, start = data.denoiser(LINE), starts(LINE, 20, 2)
    reference = reference_flow(denoise, start, 200)
    exact = torch.stack(
        [denoise(data.flow(start, reference.noise_levels[0], level), level).x for level in reference.noise_levels[:-1]]
    )
    change = exact.diff(dim=0).square().mean((1, 2)).sqrt()
    torch.testing.assert_close(reference.x_change, change, rtol=0.02, atol=1e-5)


def test_early_stop_times():
    times = early_stop_times(LINE, 5, 2.0)
    assert (times[0], times[-1]) == (1.0, 0.0)
    found = LINE(torch.tensor(times[:-1], dtype=F64)).log_snr
    torch.testing.assert_close(found, torch.tensor([-8.0, -5.5, -3.0, -0.5, 2.0], dtype=F64), rtol=0, atol=1e-9)
    table = SCHEDULES["linear"]
    k = 1000 * torch.tensor(early_stop_times(table, 5, 2.0), dtype=F64)
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-9)
    at = table(k[1:-1] / 1000).log_snr
    top = float(table(1.0).log_snr)
    assert float((at - torch.linspace(top, 2.0, 5, dtype=F64)[1:]).abs().max()) < 0.02
    assert early_stop_times(LINE, 1, 2.0) == (1.0, 0.0)


def known_of(schedule, lam, size):
    """A reference whose x̂ changes by ``size(lambda)`` per unit of lambda/c, on levels at ``lam``."""
    levels = [schedule(schedule.inverse(2 * v)) for v in lam]
    middle, width = 0.5 * (lam[1:] + lam[:-1]), lam.diff()
    change = size(middle) * width / torch.sqrt(torch.sigmoid(2 * middle))
    return Reference(torch.zeros(1), torch.zeros(1), levels, change[:-1])


@pytest.mark.parametrize(("rate", "power"), [(0.0, 0.5), (0.7, 0.5), (-0.5, 0.25), (0.9, 1 / 3)])
def test_fitted_times_divide_the_error_equally(rate, power):
    """For a change e^(rate lambda) the times are those at which e^(rate power lambda) is linear in i."""
    lam = torch.cat([torch.linspace(-4, 0, 8001, dtype=F64), torch.linspace(0, 6, 6001, dtype=F64)[1:]])  # of two steps
    found = fitted_times(known_of(LINE, lam, lambda v: 3 * torch.exp(rate * v)), LINE, 7, power)
    ends, r = torch.tensor([-4.0, 6.0], dtype=F64), rate * power
    line = torch.linspace(0, 1, 8, dtype=F64)
    expected = torch.lerp(*ends, line)
    if r:
        expected = torch.log(torch.lerp(*torch.exp(r * ends), line)) / r
    assert (found[0], found[-1], len(found)) == (1.0, 0.0, 8)
    torch.testing.assert_close(
        0.5 * LINE(torch.tensor(found, dtype=F64)).log_snr[1:-1], expected[1:-1], rtol=0, atol=2e-3
    )


def test_fitted_times_of_a_constant_prediction_are_linear():
    reference = known_of(LINE, torch.linspace(-4, 6, 101, dtype=F64), torch.zeros_like)
    expected = torch.linspace(-4, 6, 6, dtype=F64)[1:-1]
    torch.testing.assert_close(
        0.5 * LINE(torch.tensor(fitted_times(reference, LINE, 5, 0.5), dtype=F64)).log_snr[1:-1], expected
    )


def test_levels_without_a_change_have_a_millionth_of_the_largest_error():
    """At power ¼ a unit of lambda there counts as 10^−1.5 of one elsewhere."""
    reference = known_of(LINE, torch.linspace(-4, 6, 4001, dtype=F64), lambda v: (v > 0).double())
    middle = fitted_times(reference, LINE, 2, 0.25)[1]
    half = (6 + 4 * 10**-1.5) / 2
    assert 0.5 * float(LINE(torch.tensor(middle, dtype=F64)).log_snr) == pytest.approx(6 - half, abs=5e-3)


def test_fitted_times_take_the_last_change_to_an_end_that_is_not_data():
    lam = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=F64)
    levels = [LINE(LINE.inverse(2 * v)) for v in lam]
    reference = Reference(torch.zeros(1), torch.zeros(1), levels, torch.tensor([4.0, 5.0], dtype=F64))
    parts = torch.sqrt(torch.sigmoid(lam[:-1] + lam[1:])) * torch.tensor([4.0, 5.0, 5.0], dtype=F64)
    assert parts[0] < parts.sum() / 2 < parts[:2].sum()
    middle = fitted_times(reference, LINE, 2, 1.0)[1]
    at = 0.5 * float(LINE(torch.tensor(middle, dtype=F64)).log_snr)
    assert at == pytest.approx(float(torch.lerp(lam[1], lam[2], (parts.sum() / 2 - parts[0]) / parts[1])), abs=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_fitted_times_fall_from_noise_to_data_on_every_schedule(name, steps):
    schedule = SCHEDULES[name]
    reference = reference_flow(CLUSTERS.denoiser(schedule), starts(schedule, 5), 40)
    found = torch.tensor(fitted_times(reference, schedule, steps, 0.5), dtype=F64)
    assert (found[0], found[-1], len(found)) == (1, 0, steps + 1)
    assert (found.diff() < 0).all()
    if schedule.chain_length:
        torch.testing.assert_close(found * 1000, (found * 1000).round(), rtol=0, atol=1e-9)
    if steps == 9:  # most of them where the clusters separate, not at the ends
        inside = schedule(found[1:-1]).log_snr
        assert ((inside > -6) & (inside < 10)).all()


def test_fitted_times_that_coincide_on_a_short_table_are_merged():
    table = schedules.build("linear_rescaled", T=25)
    reference = reference_flow(CLUSTERS.denoiser(table), starts(table, 5), 25)
    found = fitted_times(reference, table, 20, 1.0)
    assert 3 <= len(found) < 21
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("calls", [1, 7])
@pytest.mark.parametrize("name", ["linear_log_snr", "flow", "linear"])
def test_fit_to_budget_takes_the_most_steps(name, calls):
    schedule, start = SCHEDULES[name], starts(SCHEDULES[name], 3)
    for solver in ("ddim", "heun", "rk4", "dpm++2s", "dpm++3m", "unipc", "exponential"):
        for spacing in ("uniform", "karras")[: 1 + (solver == "heun")]:
            found = fit_to_budget(Sampler(solver, 1, spacing), schedule, calls)
            if found is None:
                assert count_calls(Sampler(solver, 1, spacing), schedule) > calls
                continue
            spy = Spy(CLUSTERS.denoiser(schedule))
            endpoint(found, spy, start)
            assert len(spy.seen) == count_calls(found, schedule) <= calls
            assert count_calls(Sampler(solver, found.num_steps + 1, spacing), schedule) > calls


def test_fit_to_budget_is_limited_by_the_table():
    assert fit_to_budget(Sampler("ddim", 1), schedules.build("linear_rescaled", T=20), 50) == Sampler("ddim", 20)


def test_mean_error_and_regret_by_hand():
    best, other = (
        MeasuredSampler(Sampler("ddim", 2), 2, torch.tensor(e, dtype=F64)) for e in ([1.0, 2, 3], [2.0, 2, 5])
    )
    assert best.mean_error == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert other.regret(best) == (1.0, pytest.approx(1 / math.sqrt(3)))
    assert other.regret(other) == (0.0, 0.0)
    assert MeasuredSampler(Sampler("ddim", 2), 2, torch.ones(1)).mean_error == (
        1.0,
        pytest.approx(math.nan, nan_ok=True),
    )
    torch.testing.assert_close(
        rmse(torch.tensor([[[1.0, 2]], [[0, 0]]]), torch.tensor([[[1.0, 5]], [[0, 1]]])),
        torch.tensor([4.5, 0.5]).sqrt().double(),
    )


@pytest.mark.parametrize("name", ["linear_log_snr", "flow", "linear"])
def test_the_ranking_is_right(name):
    """At ten calls the second order beats the first with every spacing, and a bad spacing is not ranked first."""
    schedule = SCHEDULES[name]
    ticks = []
    result = search_sampler(
        CLUSTERS.denoiser(schedule),
        starts(schedule),
        10,
        ticks.append,
        ["ddim", "dpm++2m", "ancestral", "euler", "adaptive"],
    )
    errors = {(str(one.sampler), one.sampler.spacing): one for one in result.ranking}
    assert [one.mean_error[0] for one in result.ranking] == sorted(one.mean_error[0] for one in result.ranking)
    assert result.ranking[0].sampler.solver == "dpm++2m"
    for spacing in ("uniform", "quadratic"):
        difference, stderr = errors["ddim", spacing].regret(errors["dpm++2m", spacing])
        assert difference > 3 * stderr > 0
    worst = max(result.ranking, key=lambda one: one.mean_error[0])
    assert worst.mean_error[0] > 3 * result.ranking[0].mean_error[0]
    fits = [key for key in errors if key[1] == "fitted"]
    assert fits
    for solver, _ in fits:  # fitted times are at least as good as uniform ones on items that they were not fitted to
        assert errors[solver, "fitted"].mean_error[0] <= 1.1 * errors[solver, "uniform"].mean_error[0]
    assert result.ranking[0].sampler.spacing == "fitted"
    assert set(result.excluded) == {"ancestral", "euler", "adaptive"}
    assert all(one.calls <= 10 for one in result.ranking)
    assert sum(ticks) > 150 + 10 * len(result.ranking)


def test_samplers_that_become_infinite_are_excluded(monkeypatch):
    schedule, real = SCHEDULES["linear_log_snr"], sampler_search.endpoint
    arguments = CLUSTERS.denoiser(schedule), starts(schedule), 8

    def endpoint(sampler, denoise, start):
        bad = sampler.solver == "ddim" or (sampler.solver, sampler.spacing) == ("dpm++2m", "uniform")
        return real(sampler, denoise, start) / (0.0 if bad else 1.0)

    monkeypatch.setattr(sampler_search, "endpoint", endpoint)
    result = search_sampler(*arguments, names=["ddim", "dpm++2m"], fine=20)
    errors = [one.mean_error[0] for one in result.ranking]
    assert errors == sorted(errors)
    assert all(map(math.isfinite, errors))
    assert {one.sampler.solver for one in result.ranking} == {"dpm++2m"}
    assert result.excluded["dpm++2m, uniform levels"] == "became NaN or infinite"
    assert result.excluded["ddim, karras levels"] == "became NaN or infinite"
    with pytest.raises(NonFiniteError, match="flow: all samplers became NaN or infinite"):
        search_sampler(*arguments, names=["ddim"], fine=20)


def test_no_sampler_has_more_steps_than_the_chain():
    result = search_sampler(CLUSTERS.denoiser(LINE), starts(LINE), 8, names=["ddim", "dpm++2m"], fine=20, max_steps=3)
    assert {one.sampler.given_steps for one in result.ranking} == {3}


def test_every_item_has_its_condition():
    """Also in the half that fits times: the result is that of the data of each label alone."""
    labels = torch.tensor([0, 0, 1])
    reference = LabelledMixture(CLUSTERS.weights, CLUSTERS.means, CLUSTERS.values, labels)
    spy, start = Spy(reference.denoiser(LINE)), starts(LINE, 15)
    for label in (0, 1):
        cond = Condition(label=torch.full((15,), label))
        result = search_sampler(spy, start, 6, names=["ddim", "dpm++2m"], fine=20, cond=cond)
        alone = search_sampler(reference.group(label).denoiser(LINE), start, 6, names=["ddim", "dpm++2m"], fine=20)
        torch.testing.assert_close(result.reference.endpoint, alone.reference.endpoint, rtol=0, atol=1e-9)
        assert [one.sampler.solver for one in result.ranking] == [one.sampler.solver for one in alone.ranking]
    turns = Condition(label=torch.arange(15) % 2)
    spy.seen.clear()
    search_sampler(spy, start, 3, names=["ddim"], fine=4, cond=turns)
    assert {len(x) for x, *_ in spy.seen} == {7, 15}
    assert all(torch.equal(cond.label, turns.label[: len(x)]) for x, _, cond, _ in spy.seen)


@pytest.mark.parametrize("name", ["linear_log_snr", "flow", "linear"])
def test_refined_times_reduce_the_error(name):
    """From bad times the error falls; the ends and the number of steps stay, and one step cannot be refined."""
    schedule, start, ticks = SCHEDULES[name], starts(SCHEDULES[name], 30), []
    denoise = CLUSTERS.denoiser(schedule)
    reference = reference_flow(denoise, start, 100)
    bad = Sampler("dpm++2m", 8, "karras" if name != "linear_log_snr" else "quadratic")
    better = refine_times([bad], denoise, start, reference.endpoint, ticks.append)
    errors = [float(rmse(endpoint(choice, denoise, start), reference.endpoint).mean()) for choice in (bad, better)]
    assert errors[1] < 0.9 * errors[0]
    assert (better.spacing, len(better.times), better.times[0], better.times[-1]) == ("fitted", 9, 1.0, 0.0)
    assert len(ticks) > 10
    assert set(ticks) == {8}
    if schedule.chain_length:
        assert all(abs(1000 * t - round(1000 * t)) < 1e-9 for t in better.times)
    again = refine_times([better], denoise, start, reference.endpoint)
    assert float(rmse(endpoint(again, denoise, start), reference.endpoint).mean()) <= errors[1]
    assert refine_times([Sampler("ddim", 1)], denoise, start, reference.endpoint) == Sampler("ddim", 1)


def test_the_best_times_stay():
    """If the reference is the endpoint of one of the samplers, no other is better. 4 knots move up to 6 times each."""
    denoise, start, best, calls = CLUSTERS.denoiser(LINE), starts(LINE, 10), Sampler("ddim", 6, "log_snr"), []
    end = endpoint(best, denoise, start)
    assert refine_times([Sampler("ddim", 6), best], denoise, start, end, calls.append) == best
    assert 2 + 3 * 6 < len(calls) <= 2 + 4 * 6  # a move after which times do not fall is left out


def test_every_solver_is_measured_or_excluded_with_a_reason():
    schedule = SCHEDULES["linear_log_snr"]
    data = GaussianData(torch.tensor([0.3, -0.2]), torch.tensor([0.04, 1.0]))
    result, again = (search_sampler(data.denoiser(schedule), starts(schedule, 20, 2), 6, fine=20) for _ in range(2))
    tried = {one.sampler.solver for one in result.ranking}
    assert tried.isdisjoint(result.excluded)
    assert tried | set(result.excluded) == set(SOLVERS) - {"flow_map"}  # the steps of ddim
    assert {"ddim", "heun", "unipc"} <= tried
    assert result.excluded["ancestral"] == "draws noise"
    assert result.excluded["euler"] == "takes the steps of ddim"
    assert result.excluded["adaptive"] == "has no order of convergence"
    assert [one.sampler for one in result.ranking] == [one.sampler for one in again.ranking]
    assert all(torch.equal(a.error, b.error) for a, b in zip(result.ranking, again.ranking, strict=True))
    grids = [
        (str(one.sampler), *(round(float(v.t), 6) for v in one.sampler.noise_levels(schedule)))
        for one in result.ranking
    ]
    assert len(set(grids)) == len(grids)  # uniform and log_snr are the same times here


def test_aliases_take_the_same_steps():
    start = starts(LINE, 10)
    for name, other in ALIASES.items():
        ends = [endpoint(Sampler(solver, 9), CLUSTERS.denoiser(LINE), start) for solver in (name, other)]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("calls", "fine"), [(0, 200), (10, 3)])
def test_budget_errors(calls, fine):
    with pytest.raises(ConfigError, match="nothing can be measured"):
        search_sampler(CLUSTERS.denoiser(LINE), starts(LINE), calls, fine=fine)
