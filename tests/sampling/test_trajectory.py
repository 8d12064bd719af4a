"""The loop over the noise levels, and its randomness."""

import math

import pytest
import torch
from oracles import GaussianData, MixtureData, Spy

from undiffuse.errors import NonFiniteError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import forward
from undiffuse.process.prior import prior_sample, prior_scale
from undiffuse.process.seeded_noise import ItemNoise, generator
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import (
    Step,
    check_finite,
    forward_trajectory,
    frame_steps,
    last_step,
    rescale,
    trajectory,
)

f64 = torch.float64
DATA = GaussianData(torch.tensor([0.5, -1.0]), torch.tensor([0.04, 2.0]))


class Recorder:
    """A solver that adds 1 to x, counts its steps in its state and records its arguments."""

    order, calls, noises_per_step = None, 0, 2

    def __init__(self):
        self.steps = []

    def init(self, x, levels):
        self.start = (x, levels)
        return (torch.zeros(()),)

    def step(self, denoise, x_t, t, s, state, noise):
        self.steps.append((denoise, t, s, state[0].item(), noise))
        return x_t + 1, (state[0] + 1,)


def test_trajectory_is_lazy_from_noise_to_data():
    solver, levels, x = Recorder(), time_grid(S.Flow(), 3), torch.zeros(5, 2)
    requested = []

    def noise(draws):
        requested.append(draws)
        return torch.full((draws, 5, 2), float(len(requested)))

    states = trajectory("denoiser", solver, tuple(levels), x, noise)
    assert not hasattr(solver, "start")
    first = next(states)
    assert isinstance(first, Step)
    assert (first.done, first.level, first.x) == (0, levels[0], x)
    assert requested == solver.steps == []
    assert solver.start == (x, levels)
    second = next(states)
    assert (second.done, second.level, second.x[0, 0].item(), requested) == (1, levels[1], 1.0, [2])
    rest = list(states)
    assert [(step.done, step.level, step.x[0, 0].item()) for step in rest] == [(2, levels[2], 2.0), (3, levels[3], 3.0)]
    assert requested == [2, 2, 2]
    for k, (denoise, t, s, state, fresh) in enumerate(solver.steps):
        assert (denoise, t, s, state, fresh[0, 0, 0].item()) == ("denoiser", levels[k], levels[k + 1], k, k + 1.0)


@pytest.mark.parametrize("schedule", [DS.linear(6), S.Flow(), S.VarianceExploding(), DS.cosine(6)])
def test_forward_trajectory_is_the_marginal(schedule):
    """As an affine map of (x, z_1..z_T) the chain's every state is q(x_t|x) [Ho20 eq. 4]."""
    levels = time_grid(schedule, 6)
    base = levels[-1]
    fresh = torch.eye(7, dtype=f64)[1:].unsqueeze(-1)  # item k has z_k = 1; item 0 has x = 1
    start = torch.zeros(7, 1, dtype=f64)
    start[0] = 1
    noises = iter(fresh)

    def noise(draws):
        assert draws == 1
        return next(noises)[None].expand(1, 7, 1)

    states = list(forward_trajectory(start, levels, noise))
    assert next(noises, None) is None
    assert [step.done for step in states] == list(range(7))
    for step, level in zip(states, levels[::-1], strict=True):
        assert step.level is level
        ratio = level.alpha / base.alpha
        variance = level.sigma**2 - ratio**2 * base.sigma**2
        assert float(step.x[0]) == pytest.approx(float(ratio), rel=1e-12, abs=1e-12)
        assert float((step.x[1:] ** 2).sum()) == pytest.approx(float(variance), rel=1e-12, abs=1e-15)
        assert bool((step.x[1 + step.done :] == 0).all())


def test_last_step_counts_the_steps_and_needs_a_start():
    level, counted = S.LinearLogSNR()(0.5), []
    steps = [Step(done, level, torch.full((1,), float(done))) for done in range(3)]
    assert last_step(iter(steps), lambda: counted.append(1)) is steps[-1]
    assert len(counted) == 2
    with pytest.raises(ValueError, match="a trajectory has at least its start"):
        last_step([])


def test_forward_trajectory_is_lazy_and_uses_each_noise_once():
    levels = time_grid(DS.linear(3))
    x = torch.ones(2, 1, dtype=f64)
    noise = ItemNoise(0, range(2), [1], dtype=f64)
    states = forward_trajectory(x, levels, lambda n: noise(n))
    assert next(states).x is x
    again = ItemNoise(0, range(2), [1], dtype=f64)
    state = x
    for step, s, t in zip(states, levels[:0:-1], levels[-2::-1], strict=True):
        state = forward(state, s, t).sample(again(1)[0])
        assert torch.equal(step.x, state)


def test_priors():
    noise = torch.randn(4, 2, generator=generator(0, "test", 0))
    for level, scale in (
        (DS.cosine(10)(1.0), 1.0),
        (S.LinearLogSNR()(1.0), 1.0),
        (S.VarianceExploding(0.01, 50)(1.0), 50.0),
        (S.VarianceExploding(0.01, 0.5)(1.0), 0.5),
        (S.Flow()(0.75), 0.75),
        (S.Flow()(1.0), 1.0),
    ):
        assert prior_scale(level) == pytest.approx(scale, rel=1e-12)
        torch.testing.assert_close(prior_sample(level, noise), scale * noise)
    almost = S.Flow()(1.0)._replace(alpha=torch.tensor(0.0012, dtype=f64))  # alpha² + sigma² = 1 + 1.44e-6
    assert prior_scale(almost._replace(sigma=torch.tensor(0.999999, dtype=f64))) == 1
    assert prior_scale(almost._replace(sigma=torch.tensor(1.000001, dtype=f64))) == 1.000001


def test_rescale_divides_by_the_last_alpha():
    x = torch.tensor([[0.5, -0.25]])
    assert torch.equal(rescale(x, DS.linear(5)(0.0)), x)
    assert torch.equal(rescale(x, S.Flow()(0.5)), torch.tensor([[1.0, -0.5]]))
    assert rescale(x, S.Flow()(0.5)).dtype == torch.float32


def test_check_finite_names_the_item():
    x = torch.zeros(4, 2, 3)
    assert check_finite(x) is x
    for lost in (math.nan, math.inf, -math.inf):
        x[2, 1, 0] = lost
        with pytest.raises(NonFiniteError, match="item 12: 1 of 4 samples became NaN or infinite"):
            check_finite(x, first=10)
        with pytest.raises(NonFiniteError, match="item 2: 1 of 4"):
            check_finite(x)


@pytest.mark.parametrize("solver", [Ancestral(), DDIM(), DDIM(0.5)])
def test_an_item_is_the_same_in_any_batch(solver):
    """Noise bit for bit, the sample to 1e-4 in float32."""
    data = MixtureData(torch.ones(2), torch.tensor([[1.0, 0.5], [-1.0, 0.0]]), torch.full((2, 2), 0.1))
    schedule = DS.cosine(20)
    levels = time_grid(schedule)

    def run(items):
        noise = ItemNoise(7, items, [2])
        spy = Spy(data.denoiser(schedule))
        *_, last = trajectory(spy, solver, levels, prior_sample(levels[0], noise(1)[0]), noise)
        assert len(spy.seen) == 20
        assert last.x.dtype == spy.seen[0][0].dtype == torch.float32
        return rescale(last.x, last.level)

    whole = run(range(6))
    for items in ([4], [5, 1], [0, 2, 3]):
        torch.testing.assert_close(run(items), whole[items], rtol=0, atol=1e-4)
        for draws in (1, 3):
            assert torch.equal(ItemNoise(7, items, [2])(draws), ItemNoise(7, range(6), [2])(draws)[:, items])
    assert len({tuple(row.tolist()) for row in whole}) == 6


def test_exact_samples_have_the_moments_of_the_data():
    """The ancestral map of the exact denoiser with its optimal variance keeps mean and variance."""
    schedule = S.Flow()
    levels = time_grid(schedule, 5)
    x = torch.zeros(13, 2, dtype=f64)
    x[1, 0] = x[2, 1] = 1
    fresh = torch.zeros(5, 13, 2, dtype=f64)
    for k in range(5):
        fresh[k, 3 + 2 * k, 0] = fresh[k, 4 + 2 * k, 1] = 1
    noises = iter(fresh)
    solver = Ancestral(variance=DATA.reverse_log_var)
    *_, last = trajectory(DATA.denoiser(schedule), solver, levels, x, lambda n: next(noises)[None])
    torch.testing.assert_close(last.x[0], DATA.m)
    effects = last.x[1:] - last.x[0]
    marginal = DATA.cov - DATA.reverse_log_var(*levels[-2:]).exp()  # no noise in the last step
    torch.testing.assert_close((effects**2).sum(0), marginal)
    assert math.isclose(float(effects[-2:].abs().max()), 0.0)


def test_frames_are_spread_over_all_steps():
    assert frame_steps(3, 60) == {0, 1, 2, 3}
    assert frame_steps(10, 5) == {0, 2, 4, 6, 8, 10}
    assert frame_steps(7, 0) == {0, 7}
