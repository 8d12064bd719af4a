"""RePaint by hand, its walk, and its law on two numbers, without randomness."""

from itertools import pairwise

import pytest
import torch
from test_posterior import F64, PAIR, law, random

from undiffuse.errors import ConfigError
from undiffuse.grids import grid
from undiffuse.inverse.repaint import Repaint, jumps
from undiffuse.process import schedule as S
from undiffuse.sample import trajectory
from undiffuse.solvers import DDIM, Ancestral, Inversion, Product
from undiffuse.solvers.product import known

Y, MASK = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([True, False])


def test_a_step_by_hand():
    """x_s = alpha_s y + sigma_s z where it is known, the ancestral step elsewhere [Lugmayr22 eq. 8]; y at t = 0."""
    denoise, schedule = PAIR.denoiser(S.linear(10)), S.linear(10)
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


def test_any_solver_and_what_it_asks_for():
    schedule, x = S.LinearLogSNR(), random(4, 2).float()
    for solver, draws in ((DDIM(), 1), (DDIM(0.5), 2), (Ancestral(), 2)):
        painted = Repaint(Y.float(), MASK, solver)
        assert (painted.calls, painted.draws, painted.order) == (1, draws, None)
        *_, last = trajectory(
            PAIR.denoiser(schedule), painted, grid(schedule, 5), x, lambda n: x.new_zeros(n, *x.shape)
        )
        assert torch.equal(last.x[:, 0], schedule(0.0).alpha.float().expand(4) * 1.0)  # no noise is left on it
        assert last.x.dtype == torch.float32
    with pytest.raises(ConfigError, match="zero-terminal SNR"):
        Repaint(Y, MASK, Inversion()).init(random(1, 2), grid(S.Flow(), 3))


class Counting:
    """A solver that remembers how many steps it has made since it began."""

    calls = draws = order = 0

    def init(self, x, levels):
        assert levels[0].t > levels[-1].t
        return ()

    def step(self, denoise, x_t, t, s, state, noise):
        return x_t, (*state, s)


def test_a_solver_begins_anew_after_the_way_back():
    painted, levels = Repaint(Y, MASK, Counting()), grid(S.linear(10), 4)
    state, lengths, x = painted.init(random(1, 2), levels), [], random(1, 2)
    walk = jumps(levels, 2, 2)
    for t, s in pairwise(walk):
        x, state = painted.step(PAIR.denoiser(S.linear(10)), x, t, s, state, random(1, 1, 2))
        lengths.append(len(state))
    assert lengths == [1, 2, 0, 1, 2, 3, 4, 0, 1, 2]


def test_the_walk():
    levels = list(range(6, -1, -1))
    assert jumps(levels, 3, 1) == jumps(levels, 1, 1) == levels
    assert jumps(levels, 3, 2) == [6, 5, 4, 3, 6, 5, 4, 3, 2, 1, 0, 3, 2, 1, 0]
    assert jumps(levels, 6, 3) == [*levels, *levels, *levels]
    assert jumps(levels[3:], 2, 2) == [3, 2, 1, 3, 2, 1, 0, 1, 0]
    down = sum(a > b for a, b in pairwise(jumps(levels, 1, 4)))
    assert down == 6 * 4
    for length, repeats in ((0, 1), (1, 0)):
        with pytest.raises(ConfigError, match=f"length = {length}, repeats = {repeats}"):
            jumps(levels, length, repeats)


def test_it_is_biased_and_less_so_with_repeats_and_than_the_product():
    """Known to be 1, the first number makes the second N(0.9, 0.19); 10 cosine steps with 1, 3, 9 walks of each."""
    schedule = S.cosine(10)
    denoise, levels = PAIR.denoiser(schedule), grid(schedule)
    expected = {1: (-0.3414, 0.0566), 3: (-0.1313, -0.0457), 9: (-0.0501, -0.0821)}
    for repeats, (bias, wide) in expected.items():
        mean, cov = law(Repaint(Y, MASK), denoise, jumps(levels, 1, repeats), (2,))
        torch.testing.assert_close(mean, torch.tensor([1.0, 0.9 + bias], dtype=F64), rtol=0, atol=1e-4)
        assert float(cov[1, 1] - 0.19) == pytest.approx(wide, abs=1e-4)
        product, _ = law(Product(known(Y, MASK), repeats=repeats), denoise, levels, (2,))
        assert product[1] < mean[1] < 0.9
