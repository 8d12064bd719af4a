"""RePaint by hand, its jumps back, and its distribution on two elements, without randomness."""

from itertools import pairwise

import pytest
import torch
from posterior_cases import F64, PAIR, moments, random

from undiffuse.errors import ConfigError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.one_step_inversion import OneStepInversion
from undiffuse.sampling.solvers.product import Product, inpainting_factor
from undiffuse.sampling.solvers.repaint import Repaint, resampling_levels
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import trajectory

Y, MASK = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([True, False])


def test_a_step_by_hand():
    """x_s = alpha_s y + sigma_s z where the mask is true, else the ancestral step [Lugmayr22 eq. 8]; y at t = 0."""
    denoise, schedule = PAIR.denoiser(DS.linear(10)), DS.linear(10)
    x_t, noise = random(3, 2), random(2, 3, 2, seed=1)
    for k in (10, 5, 1):
        t, s = schedule(k / 10), schedule((k - 1) / 10)
        free = Ancestral().step(denoise, x_t, t, s, (), noise[1:])[0]
        expected = torch.stack([s.alpha * 1.0 + s.sigma * noise[0, :, 0], free[:, 1]], 1)
        found, state = Repaint(Y, MASK).step(denoise, x_t, t, s, (), noise)
        torch.testing.assert_close(found, expected)
        assert state == ()
        back, _ = Repaint(Y, MASK).step(denoise, found, s, t, (), noise)
        ratio = t.alpha / s.alpha
        torch.testing.assert_close(back, ratio * found + torch.sqrt(t.sigma**2 - (ratio * s.sigma) ** 2) * noise[0])


def test_any_solver():
    schedule, x = S.LinearLogSNR(), random(4, 2).float()
    for solver, draws in ((DDIM(), 1), (DDIM(0.5), 2), (Ancestral(), 2)):
        painted = Repaint(Y.float(), MASK, solver)
        assert (painted.calls, painted.noises_per_step, painted.order) == (1, draws, None)
        *_, last = trajectory(
            PAIR.denoiser(schedule), painted, time_grid(schedule, 5), x, lambda n: x.new_zeros(n, *x.shape)
        )
        assert torch.equal(last.x[:, 0], schedule(0.0).alpha.float().expand(4) * 1.0)  # no noise is left on it
        assert last.x.dtype == torch.float32
    with pytest.raises(ConfigError, match="zero-terminal SNR"):
        Repaint(Y, MASK, OneStepInversion()).init(random(1, 2), time_grid(S.Flow(), 3))


class Counting:
    """A solver whose state counts the steps since `init`."""

    calls = draws = order = 0

    def init(self, x, levels):
        assert levels[0].t > levels[-1].t
        return ()

    def step(self, denoise, x_t, t, s, state, noise):
        return x_t, (*state, s)


def test_a_jump_back_resets_the_solver():
    painted, levels = Repaint(Y, MASK, Counting()), time_grid(DS.linear(10), 4)
    state, lengths, x = painted.init(random(1, 2), levels), [], random(1, 2)
    walk = resampling_levels(levels, 2, 2)
    for t, s in pairwise(walk):
        x, state = painted.step(PAIR.denoiser(DS.linear(10)), x, t, s, state, random(1, 1, 2))
        lengths.append(len(state))
    assert lengths == [1, 2, 0, 1, 2, 3, 4, 0, 1, 2]


def test_resampling_levels():
    levels = list(range(6, -1, -1))
    assert resampling_levels(levels, 3, 1) == resampling_levels(levels, 1, 1) == levels
    assert resampling_levels(levels, 3, 2) == [6, 5, 4, 3, 6, 5, 4, 3, 2, 1, 0, 3, 2, 1, 0]
    assert resampling_levels(levels, 6, 3) == [*levels, *levels, *levels]
    assert resampling_levels(levels[3:], 2, 2) == [3, 2, 1, 3, 2, 1, 0, 1, 0]
    down = sum(a > b for a, b in pairwise(resampling_levels(levels, 1, 4)))
    assert down == 6 * 4
    for length, repeats in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match=f"length = {length}, repeats = {repeats}"):
            resampling_levels(levels, length, repeats)


def test_the_bias_falls_with_repeats_and_is_less_than_that_of_the_product():
    """Given that the first element is 1, the second is N(0.9, 0.19); 10 cosine steps with 1, 3, 9 repeats."""
    schedule = DS.cosine(10)
    denoise, levels = PAIR.denoiser(schedule), time_grid(schedule)
    expected = {1: (-0.3414, 0.0566), 3: (-0.1313, -0.0457), 9: (-0.0501, -0.0821)}
    for repeats, (bias, wide) in expected.items():
        mean, cov = moments(Repaint(Y, MASK), denoise, resampling_levels(levels, 1, repeats), (2,))
        torch.testing.assert_close(mean, torch.tensor([1.0, 0.9 + bias], dtype=F64), rtol=0, atol=1e-4)
        assert float(cov[1, 1] - 0.19) == pytest.approx(wide, abs=1e-4)
        product, _ = moments(Product(inpainting_factor(Y, MASK), repeats=repeats), denoise, levels, (2,))
        assert product[1] < mean[1] < 0.9
