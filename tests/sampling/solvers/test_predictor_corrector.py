"""A corrector has a stationary distribution in place of an order; the composition of solvers is tested call by call."""

import math

import numpy as np
import pytest
import torch
from oracles import GaussianData, MixtureData, Spy
from test_affine import probe

from undiffuse.denoising.denoiser import Prediction
from undiffuse.errors import ConfigError
from undiffuse.process import schedule as S
from undiffuse.process.seeded_noise import ItemNoise, generator
from undiffuse.sampling import solvers
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.langevin import AnnealedLangevin
from undiffuse.sampling.solvers.predictor_corrector import LangevinCorrector, PredictorCorrector
from undiffuse.sampling.time_grids import time_grid

f64 = torch.float64
MIXTURE = MixtureData(torch.tensor([0.4, 0.6]), torch.tensor([[-1.0, 0.2], [0.8, -0.5]]), torch.full((2, 2), 0.1))


def test_one_correction():
    """Song 2021 alg. 4: ε = 2 (r ‖z‖/‖g‖)², x + ε g + √(2ε) z, each item by its own norms."""
    schedule = S.VarianceExploding()
    level, other = schedule(0.4), schedule(0.5)
    x, *noise = torch.randn(3, 5, 2, generator=generator(0, "test", 0), dtype=f64)
    spy = Spy(MIXTURE.denoiser(schedule))
    found, state = LangevinCorrector(0.2, 2).step(spy, x, other, level, ("kept",), torch.stack(noise))
    assert state == ("kept",)
    assert [tuple(v for v in (at.t, to)) for _, at, _, to in spy.seen] == [(level.t, None)] * 2
    for i in range(5):
        item = x[i].numpy()
        for z in (noise[0][i].numpy(), noise[1][i].numpy()):
            g = MIXTURE.score(torch.from_numpy(item)[None], level)[0].numpy()
            e = 2 * (0.2 * math.sqrt((z**2).sum()) / math.sqrt((g**2).sum())) ** 2
            item = item + e * g + math.sqrt(2 * e) * z
        np.testing.assert_allclose(found[i].numpy(), item, rtol=1e-12)


def test_an_item_whose_score_is_zero_stays():
    data = GaussianData(torch.zeros(2), torch.ones(2))
    schedule = S.Flow()
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=f64)
    found, _ = LangevinCorrector().step(
        data.denoiser(schedule), x, schedule(0.5), schedule(0.5), (), torch.ones(1, 2, 2)
    )
    assert found[0].tolist() == [0.0, 0.0]
    assert bool(torch.isfinite(found).all())


def test_the_stationary_variance_of_the_signal_to_noise_step():
    """N(0, V) of many dimensions settles at (1 + r²) V, for then ‖z‖² ≈ D and ‖g‖² ≈ D V'/V².

    V' is fixed where (1 − ε/V)² V' + 2ε = V' with ε = 2 r² V²/V'. The mean square of n = 80 000 numbers has the
    relative deviation √(2/n) = 0.005, so |z| < 4.89 (false alarms below 1e-6) is 2.5 %. Without the r² it would be
    16 % off (z = 32), with √ε for √(2ε) half.
    """
    dims, batch, r, V = 20_000, 4, 0.4, 0.325
    noise = ItemNoise(3, range(batch), [dims], dtype=f64)

    def denoise(x_t, level):
        return Prediction(x_t, level.broadcast_like(x_t).sigma / V * x_t)

    level = S.Flow()(0.5)
    x, _ = LangevinCorrector(r, 30).step(denoise, math.sqrt(1.5 * V) * noise(1)[0], level, level, (), noise(30))
    z = (float((x**2).mean()) / V / (1 + r**2) - 1) / math.sqrt(2 / (dims * batch))
    assert abs(z) < 4.89


def test_the_corrector_forgets_its_start():
    """Many updates of a fixed size have the variance V/(1 − a/(2V)), a = step_size sigma², for any start."""
    data, schedule = GaussianData(torch.tensor([0.7]), torch.tensor([0.3])), S.Flow()
    t, s = time_grid(schedule, times=[0.9, 0.4])
    before = probe(DDIM(), data.denoiser(schedule), [t, s], dims=1)
    after = probe(PredictorCorrector(DDIM(), AnnealedLangevin(0.2, 200)), data.denoiser(schedule), [t, s], dims=1)
    assert abs(before.matrix[0, 0]) > 0.1
    assert abs(after.matrix[0, 0]) < 1e-10
    np.testing.assert_allclose(after.offset, s.alpha * data.m)
    V, size = float(data.marginal_var(s)[0]), 0.2 * float(s.sigma) ** 2
    assert (after.noise**2).sum() == pytest.approx(V / (1 - size / (2 * V)), rel=1e-10)


class Recorder:
    """A solver that adds ``add`` to x, counts its steps in its state and records its arguments."""

    order = None

    def __init__(self, add: float, calls: int, draws: int) -> None:
        self.add, self.calls, self.noises_per_step, self.seen = add, calls, draws, []

    def init(self, x, levels):
        self.seen.append((x, levels))
        return (0,)

    def step(self, denoise, x_t, t, s, state, noise):
        self.seen.append((denoise, x_t, t, s, state, noise.flatten().tolist()))
        return x_t + self.add, (state[0] + 1,)


def test_the_composition():
    down, around = Recorder(1.0, 3, 1), Recorder(10.0, 5, 2)
    both = PredictorCorrector(down, around)
    assert (both.calls, both.noises_per_step, both.order) == (8, 3, None)
    x, (t, s, end) = torch.zeros(1, 1), time_grid(S.Flow(), times=[0.9, 0.5, 0.0])
    state = both.init(x, [t, s, end])
    assert down.seen.pop() == around.seen.pop() == (x, [t, s, end])
    noise = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    x_s, state = both.step("denoiser", x, t, s, state, noise)
    x_0, state = both.step("denoiser", x_s, s, end, state, noise)
    assert down.seen == [("denoiser", x, t, s, (0,), [1.0]), ("denoiser", x_s, s, end, (1,), [1.0])]
    ((_, corrected, *levels, before, given),) = around.seen  # not at the end, where there is no score
    assert (float(corrected), levels, before, given) == (1.0, [s, s], (0,), [2.0, 3.0])
    assert (float(x_s), float(x_0), state) == (11.0, 12.0, ((2,), (1,)))


def test_settings():
    assert solvers.build("predictor_corrector") == PredictorCorrector(Ancestral(), LangevinCorrector(0.16, 1))
    assert (
        LangevinCorrector(num_updates=3).calls,
        LangevinCorrector(num_updates=3).noises_per_step,
        LangevinCorrector().order,
    ) == (3, 3, None)
    assert LangevinCorrector().init(torch.zeros(1), []) == ()
    for snr, updates in ((0.0, 1), (math.nan, 1), (math.inf, 1), (0.1, 0), (0.1, 10_001)):
        with pytest.raises(ConfigError, match=r"out of range. Give a snr above 0, and num_updates from 1 to 10,000"):
            LangevinCorrector(snr, updates)
