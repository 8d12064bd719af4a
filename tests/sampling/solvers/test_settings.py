"""Any setting of a solver raises a one-line error or gives finite samples."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from oracles import GaussianData

from undiffuse.errors import ConfigError
from undiffuse.process import schedule as S
from undiffuse.process.prior import prior_sample
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.sampling import solvers
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.solvers.dpm_multistep import Multistep
from undiffuse.sampling.solvers.edm import EDM
from undiffuse.sampling.solvers.langevin import AnnealedLangevin
from undiffuse.sampling.solvers.predictor_corrector import LangevinCorrector
from undiffuse.sampling.solvers.product import Product
from undiffuse.sampling.solvers.solver import Solver
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import rescale, trajectory

f64 = torch.float64
DATA = GaussianData(torch.tensor([1.0, -1.0], dtype=f64), torch.tensor([0.5, 2.0], dtype=f64))
HOSTILE = [
    "abc",
    "",
    "ddim",
    None,
    True,
    [1],
    {"a": 1},
    math.nan,
    math.inf,
    -math.inf,
    -1,
    -0.5,
    0,
    0.0,
    0.5,
    1,
    1.0,
    2,
]
HOSTILE += [2.0, 2.5, 7, 1e30, 1e308, 10**12, 10**400, -(10**400)]
NOT_SETTINGS = ("order", "calls", "noises_per_step", "method", "speed", "self")


def settings(name: str) -> list[str]:
    return list(inspect.signature(solvers.SOLVERS[name]).parameters)


def samples(solver: Solver) -> torch.Tensor:
    schedule = S.LinearLogSNR()
    noise, levels = ItemNoise(0, range(2), (2,), dtype=f64), time_grid(schedule, 3)
    *_, last = trajectory(DATA.denoiser(schedule), solver, levels, prior_sample(levels[0], noise(1)[0]), noise)
    return rescale(last.x, last.level)


def refusal_or_samples(name: str, setting: str, value: object) -> ConfigError | torch.Tensor:
    try:
        return samples(solvers.build(name, **{setting: value}))
    except ConfigError as refused:
        return refused


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_hostile_values(name):
    for setting in (*settings(name), *NOT_SETTINGS):
        for value in HOSTILE:
            found = refusal_or_samples(name, setting, value)
            if isinstance(found, ConfigError):
                assert found.code in ("SOLVER", "VARIANCE", "ODE_METHOD", "ODE_CALLS"), found
                assert len(str(found).splitlines()) == 1
                assert len(found.where) <= 100, found.where
            else:
                assert setting not in NOT_SETTINGS, (setting, value)
                assert bool(torch.isfinite(found).all()), (setting, value)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("ddim", {"eta": "abc"}, "ddim: eta = 'abc': it has to be a finite number. Its settings are eta=0.0."),
        ("ddim", {"eta": math.nan}, "ddim: eta = nan: it has to be a finite number."),
        ("ddim", {"eta": 2}, "eta = 2: eta is a fraction of the noise of ancestral sampling. Give a number from 0 to"),
        ("ddim", {"order": 7}, "ddim: order = 7: there is no such setting. Its settings are eta=0.0."),
        ("ancestral", {"draws": 0}, "there is no such setting. Its settings are variance=small."),
        ("predictor_corrector", {"predictor": "ddim"}, "an object, which only Python can give. Its settings are pre"),
        (
            "annealed_langevin",
            {"updates_per_level": 2.5},
            "it has to be a whole number. Its settings are step_size=0.1,",
        ),
        ("dpm++3m_sde", {"points": 2.0}, "it has to be a whole number. Its settings are points=3, eta=1.0, rule=exact"),
        ("dpm++2s", {"order": 3}, "there is no such setting. It has no settings."),
        ("edm", {"churn": "abc"}, "edm: churn = 'abc': it has to be a finite number. Its settings are churn=40.0, low"),
        ("unipc", {"rule": 1}, "unipc: rule = 1: it has to be a word. Its settings are points=2, rule=bh2, start=high"),
        ("edm", {"inflation": 3.0}, "these settings are out of range. Give churn of at least 0, low of"),
    ],
)
def test_error_names_the_setting(name, wrong, message):
    with pytest.raises(ConfigError) as refused:
        solvers.build(name, **wrong)
    assert message in str(refused.value)


def test_largest_and_smallest_settings():
    assert (DDIM(0.0).noises_per_step, DDIM(1.0).noises_per_step) == (0, 1)
    assert Product(repeats=10_000).calls == AnnealedLangevin(updates_per_level=10_000).calls == 10_000
    assert LangevinCorrector(num_updates=10_000).noises_per_step == 10_000
    assert EDM(inflation=2.0, high=math.inf).order is None
    with pytest.raises(ConfigError, match="must be from 1 to 10,000"):
        Product(repeats=10_001)
    for wrong in (-1e-9, 1 + 1e-9):
        with pytest.raises(ConfigError):
            DDIM(wrong)
    with pytest.raises(ConfigError):
        Multistep(eta=math.inf)
