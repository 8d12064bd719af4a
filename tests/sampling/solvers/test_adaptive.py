"""The adaptive solver has a tolerance in place of an order; it is tested on flows in closed form."""

import math

import pytest
import torch
from oracles import GaussianData, MixtureData, Spy

from undiffuse.denoising.denoiser import Prediction
from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.sampling import solvers
from undiffuse.sampling.solvers.adaptive import Adaptive
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import trajectory

f64 = torch.float64
MIXTURE = MixtureData(torch.tensor([0.4, 0.6]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[0.03], [0.02]]))
GAUSSIAN = GaussianData(torch.tensor([0.7, -0.4]), torch.tensor([[0.3, 0.1], [0.1, 0.2]]))
ENDS = {
    "linear": (DS.linear(), 1.0, 0.01),
    "log-SNR": (S.LinearLogSNR(), 1.0, 0.0),
    "flow": (S.Flow(), 1.0, 0.01),
    "exploding": (S.VarianceExploding(), 1.0, 0.0),
}


def start(level) -> torch.Tensor:
    x = torch.tensor([[-1.3], [-0.2], [0.1], [0.9]], dtype=f64)
    return x * torch.hypot(level.alpha, level.sigma)


def none(draws: int) -> torch.Tensor:
    return torch.empty(draws, 0)


@pytest.mark.parametrize("name", ENDS)
def test_the_tolerance_is_kept(name):
    """Errors are at most a few times the tolerance and fall with it, also with several steps."""
    schedule, first, last = ENDS[name]
    ends = time_grid(schedule, times=[first, last])
    x = start(ends[0])
    exact = MIXTURE.flow(x, *ends)
    errors, calls = [], []
    for tolerance in (1e-4, 1e-6, 1e-8):
        spy = Spy(MIXTURE.denoiser(schedule))
        solver = Adaptive(tolerance, tolerance)
        found, (spent,) = solver.step(spy, x, *ends, solver.init(x, ends), x[:0])
        errors.append(float((found - exact).abs().max()))
        calls.append(len(spy.seen))
        assert len(spy.seen) == int(spent.max())
    middle = time_grid(schedule, times=[first, 0.6, 0.3, last])
    *_, last = trajectory(MIXTURE.denoiser(schedule), Adaptive(1e-4, 1e-4), middle, x, none)
    errors.append(float((last.x - exact).abs().max()))
    assert all(error < 30 * tolerance for error, tolerance in zip(errors, (1e-4, 1e-6, 1e-8, 1e-4), strict=True))
    assert errors[0] > 100 * errors[2]
    assert 7 < calls[0] < calls[1] < calls[2] < 1500


def test_items_have_their_own_steps_but_the_denoiser_gets_the_full_batch():
    """A hard item, between two modes, takes more calls; the others take as many as without it."""
    schedule = S.Flow()
    t, s = time_grid(schedule, times=[0.9, 0.01])
    x = torch.tensor([[2.0], [0.08], [-2.0]], dtype=f64)
    spy, solver = Spy(MIXTURE.denoiser(schedule)), Adaptive(1e-6, 1e-6)
    together, (calls,) = solver.step(spy, x, t, s, (), x[:0])
    assert all(at.shape == x.shape and level.t.shape == (3,) for at, level, _, _ in spy.seen)
    assert len(spy.seen) == int(calls.max()) == int(calls[1]) > int(calls[0]) > 7
    for i in range(3):
        alone, (own,) = solver.step(MIXTURE.denoiser(schedule), x[i : i + 1], t, s, (), x[:0])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-12, atol=1e-12)
        assert own.tolist() == calls[i : i + 1].tolist()


@pytest.mark.parametrize(
    ("schedule", "inner"),
    [
        (DS.linear(10), (1.0, 0.1)),
        (S.Flow(), (1.0, 1e-5)),
        (DS.Tabulated([0.1, 0.2, 0.3, 0.5, 1.0]), (0.8, 0.2)),
        (S.LinearLogSNR(), (1.0, 0.0)),
    ],
    ids=["table", "flow", "zero terminal", "finite"],
)
def test_one_step_from_noise_to_data(schedule, inner):
    """Within the tolerance where the log-SNR is finite; a table's first and last steps are those of DDIM."""
    ends = time_grid(schedule, times=[1.0, 0.0])
    top, clean = (schedule(t) for t in inner)
    denoise = GAUSSIAN.denoiser(schedule)
    x = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=f64)
    expected = x if inner[0] == 1 else DDIM().step(denoise, x, ends[0], top, (), x[:0])[0]
    expected = GAUSSIAN.flow(expected, top, clean)
    expected = expected if inner[1] == 0 else DDIM().step(denoise, expected, clean, ends[1], (), x[:0])[0]
    spy = Spy(denoise)
    found, (calls,) = Adaptive(1e-9, 1e-9).step(spy, x, *ends, (), x[:0])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert len(spy.seen) == int(calls.max())
    assert min(float(level.t.min()) for _, level, _, _ in spy.seen) >= schedule.t_min * (1 - 1e-9)
    assert max(float(level.t.max()) for _, level, _, _ in spy.seen) <= 1


def test_short_steps_at_the_ends_of_a_table():
    schedule = DS.Tabulated([0.1, 0.2, 0.3, 0.5, 1.0])
    denoise, x = GAUSSIAN.denoiser(schedule), torch.tensor([[0.3, -1.0]], dtype=f64)
    for times in ([1.0, 0.8], [0.2, 0.0], [0.1, 0.0]):
        t, s = (schedule(v) for v in times)
        found, state = Adaptive().step(denoise, x, t, s, ("before",), x[:0])
        torch.testing.assert_close(found, DDIM().step(denoise, x, t, s, (), x[:0])[0])
        assert (state[0], state[1].tolist()) == ("before", [1])
    one = DS.Tabulated([1.0])
    found, (calls,) = Adaptive().step(GAUSSIAN.denoiser(one), x, one(1.0), one(0.0), (), x[:0])
    torch.testing.assert_close(found, GAUSSIAN.m[None].to(f64))
    assert calls.tolist() == [1]


def test_shapes_and_dtypes():
    schedule, t, s = S.Flow(), S.Flow()(0.9), S.Flow()(0.3)
    data = GaussianData(torch.zeros(2, 3), torch.full((2, 3), 0.3))
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        spy = Spy(data.denoiser(schedule))
        found, _ = Adaptive(1e-3, 1e-3).step(spy, x.to(dtype), t, s, (), x[:0])
        assert found.dtype == torch.float32
        assert {at.dtype for at, *_ in spy.seen} == {dtype}
        torch.testing.assert_close(found, data.flow(x.to(dtype), t, s).float(), rtol=0, atol=10 * close)


def test_errors_name_their_place():
    assert solvers.build("adaptive", rtol=1e-3) == Adaptive(1e-3, 1e-5)
    assert (Adaptive().order, Adaptive().noises_per_step, Adaptive().calls) == (None, 0, 7)
    assert [name for name in solvers.SOLVERS if solvers.build(name).needs_float32] == ["adaptive"]
    with pytest.raises(ConfigError, match="tolerances above 0"):
        Adaptive(atol=0.0)
    schedule, x = S.Flow(), torch.ones(2, 1, dtype=f64)
    t, s = schedule(0.9), schedule(0.01)
    with pytest.raises(ConfigError, match=r"max_calls = 20.*item 0 has only reached log_snr = -?[0-9.]+") as error:
        Adaptive(1e-9, 1e-9, max_calls=20).step(MIXTURE.denoiser(schedule), x, t, s, (), x[:0])
    place = float(str(error.value).split("log_snr = ")[1].split(". ")[0])
    assert float(t.log_snr) < place < float(s.log_snr)

    class Broken:
        schedule = S.Flow()

        def __call__(self, x_t, level, cond=None, next_level=None):
            return Prediction(torch.where(level.broadcast_like(x_t).log_snr < 0, x_t, math.nan), x_t)

    with pytest.raises(NonFiniteError, match=r"item 0 of the batch: its ODE diverges at log_snr = -?[0-9.e-]+\. "):
        Adaptive().step(Broken(), x, t, s, (), x[:0])
