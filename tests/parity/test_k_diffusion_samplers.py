"""The samplers of another implementation, k-diffusion, against ours: the same network and noise, on Karras' grid.

It runs with `make test-release` where k-diffusion is installed (0.1.1; `pip install --no-deps k-diffusion` is
enough, since only its sampling functions are read). Every state of a chain from sigma = 80 agrees to 1e-5 of its
largest number in float32.
"""

from __future__ import annotations

from types import ModuleType

import peer_packages
import pytest
import torch
from mistakes import OtherThird
from peers import NET, X, by_k_diffusion, by_ours, noises, order, strong

from undiffuse.denoising.denoiser import NetworkDenoiser, Preconditioning
from undiffuse.process import schedule as S
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.target import TARGETS
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.dpm_multistep import Multistep
from undiffuse.sampling.solvers.dpm_singlestep import SingleStep
from undiffuse.sampling.solvers.edm import EDM
from undiffuse.sampling.solvers.runge_kutta import RungeKutta
from undiffuse.sampling.trajectory import trajectory

pytestmark = pytest.mark.release

SCHEDULE = S.VarianceExploding(0.001, 200.0)  # wider than the grid, so that EDM's churn is not capped
DENOISE = NetworkDenoiser(NET, SCHEDULE, TARGETS["x"], Preconditioning(scale="unit", time="log_sigma"))
CHURN = {"s_churn": 30.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
ROWS = {
    "euler": ("sample_euler", {}, RungeKutta("euler")),
    "euler ancestral": ("sample_euler_ancestral", {}, Ancestral()),
    "euler ancestral 0.6": ("sample_euler_ancestral", {"eta": 0.6}, DDIM(0.6)),
    "heun": ("sample_heun", {}, RungeKutta("heun")),
    "edm": ("sample_heun", CHURN, EDM(30.0, 0.05, 50.0, 1.003)),
    "dpm++ 2s": ("sample_dpmpp_2s_ancestral", {"eta": 0.0}, SingleStep(2)),
    "dpm++ 2m": ("sample_dpmpp_2m", {}, Multistep(2, rule="bh2")),
    "dpm++ 2m sde": ("sample_dpmpp_2m_sde", {}, Multistep(2, 1.0, "bh2")),
    "dpm++ 2m sde 0.4": ("sample_dpmpp_2m_sde", {"eta": 0.4}, Multistep(2, 0.4, "bh2")),
    "dpm++ 2m sde, heun": ("sample_dpmpp_2m_sde", {"solver_type": "heun"}, Multistep(2, 1.0)),
    "dpm++ 3m sde": ("sample_dpmpp_3m_sde", {}, OtherThird(eta=1.0, rule="exact")),
    "dpm++ 3m": ("sample_dpmpp_3m_sde", {"eta": 0.0}, OtherThird(rule="exact")),
}


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    try:
        return peer_packages.import_k_diffusion()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error}. Install it: .venv/bin/python -m pip install --no-deps k-diffusion tqdm scipy")


def at(sigma: torch.Tensor) -> NoiseLevel:
    sigma = sigma.double()
    return NoiseLevel(SCHEDULE.inverse(-2 * sigma.log()), torch.ones_like(sigma), sigma, -2 * sigma.log())


@pytest.mark.parametrize("steps", [8, 30])
@pytest.mark.parametrize("name", ROWS)
def test_all_states_are_the_same(theirs, monkeypatch, name, steps):
    function, settings, solver = ROWS[name]
    sigmas = theirs.get_sigmas_karras(steps, 0.002, 80.0)
    levels = [at(sigma) for sigma in sigmas]
    states = []
    fresh = noises()
    monkeypatch.setattr(torch, "randn_like", fresh)
    if "sde" in function:
        settings = {**settings, "noise_sampler": lambda *_: fresh(X)}
    last = getattr(theirs, function)(
        lambda x, sigma: DENOISE(x, at(sigma)).x,
        80 * X,
        sigmas,
        disable=True,
        callback=lambda said: states.append(said["x"]),
        **settings,
    )
    mine = [step.x for step in trajectory(DENOISE, solver, levels, 80 * X, noises())]
    # what they call back with in EDM's sampler has the step's noise in it already
    pairs = list(zip([*states, last], mine, strict=True))[-1 if name == "edm" else 0 :]
    assert max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs) < 1e-5


def test_their_third_order_has_another_coefficient_and_is_of_second(theirs):
    steps = (64, 128, 256)
    other = by_k_diffusion(theirs.sample_dpmpp_3m_sde, eta=0.0)
    assert abs(order([strong(other, n) for n in steps]) - 2) < 0.15
    assert abs(order([strong(by_ours(Multistep(3)), n) for n in steps]) - 3) < 0.15
