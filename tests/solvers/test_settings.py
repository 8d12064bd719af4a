"""Whatever is asked of a solver by its settings is refused in a line, or ends in finite samples."""

from __future__ import annotations

import dataclasses
import inspect
import math

import pytest
import torch
from oracles import GaussianData

from undiffuse import solvers
from undiffuse.errors import ConfigError
from undiffuse.grids import grid
from undiffuse.inverse import Repaint
from undiffuse.process import schedule as S
from undiffuse.randomness import ItemNoise
from undiffuse.sample import prior_sample, to_data, trajectory
from undiffuse.solvers import Corrector

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
NOT_SETTINGS = ("order", "calls", "draws", "method", "speed", "self")


def settings(name: str) -> list[str]:
    return list(inspect.signature(solvers.SOLVERS[name]).parameters)


def samples(solver: solvers.Solver) -> torch.Tensor:
    schedule = S.LinearLogSNR()
    noise, levels = ItemNoise(0, range(2), (2,), dtype=f64), grid(schedule, 3)
    *_, last = trajectory(DATA.denoiser(schedule), solver, levels, prior_sample(levels[0], noise(1)[0]), noise)
    return to_data(last.x, last.level)


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
            else:
                assert setting not in NOT_SETTINGS, (setting, value)
                assert bool(torch.isfinite(found).all()), (setting, value)


def test_the_table_has_every_setting():
    """What a solver says of itself is no setting: a name lost here would go untested above."""
    assert {name: settings(name) for name in solvers.SOLVERS} == {
        "ancestral": ["variance"],
        "ddim": ["eta"],
        "annealed_langevin": ["step_size", "each"],
        "inversion": ["form"],
        "product": ["factor", "variance", "repeats"],
        "euler": ["variable"],
        "heun": ["variable"],
        "rk4": ["variable"],
        "adaptive": ["rtol", "atol", "max_calls"],
        "edm": ["churn", "low", "high", "inflation"],
        "euler_maruyama": [],
        "predictor_corrector": ["predictor", "corrector"],
        "dpm++2s": [],
        "dpm++3s": [],
        **{
            name: ["points", "eta", "rule", "start", "end"]
            for name in ("dpm++2m", "dpm++3m", "dpm++2m_sde", "dpm++3m_sde", "exponential")
        },
        "unipc": ["points", "rule", "start"],
    }
    assert "order" not in {*inspect.signature(Corrector).parameters, *inspect.signature(Repaint).parameters}


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("ddim", {"eta": "abc"}, "ddim: eta = 'abc': it has to be a finite number. Its settings are eta=0.0."),
        ("ddim", {"eta": math.nan}, "ddim: eta = nan: it has to be a finite number."),
        ("ddim", {"eta": 2}, "eta = 2: it is a share of the noise of ancestral sampling. Give a number from 0 to 1."),
        ("ddim", {"order": 7}, "ddim: order = 7: there is no such setting. Its settings are eta=0.0."),
        ("ancestral", {"draws": 0}, "there is no such setting. Its settings are variance=small."),
        ("product", {"repeats": 2.5}, "it has to be a whole number. Its settings are factor (in Python only), var"),
        ("product", {"repeats": 10_001}, "a step is made once or more, and not more than 10,000 times. Give a number"),
        ("product", {"factor": 1}, "factor = 1: it has to be an object, which only Python can give."),
        ("predictor_corrector", {"predictor": "ddim"}, "an object, which only Python can give. Its settings are pre"),
        ("annealed_langevin", {"each": 2.5}, "it has to be a whole number. Its settings are step_size=0.1, each=100."),
        ("dpm++3m_sde", {"points": 2.0}, "it has to be a whole number. Its settings are points=3, eta=1.0, rule=exact"),
        ("dpm++2s", {"order": 3}, "there is no such setting. It has no settings."),
        ("edm", {"churn": "abc"}, "edm: churn = 'abc': it has to be a finite number. Its settings are churn=40.0, low"),
        ("unipc", {"rule": 1}, "unipc: rule = 1: it has to be a word. Its settings are points=2, rule=bh2, start=high"),
        ("edm", {"inflation": 3.0}, "no noise can be added so. Give churn of at least 0, low of at most high, and"),
    ],
)
def test_what_is_wrong_is_said(name, wrong, says):
    with pytest.raises(ConfigError) as refused:
        solvers.build(name, **wrong)
    assert says in str(refused.value)


def test_the_ends_of_what_is_allowed():
    assert (solvers.DDIM(0.0).draws, solvers.DDIM(1.0).draws) == (0, 1)
    assert solvers.Product(repeats=10_000).calls == solvers.AnnealedLangevin(each=10_000).calls == 10_000
    assert Corrector(each=10_000).draws == 10_000
    assert solvers.EDM(inflation=2.0, high=math.inf).order is None
    for wrong in (-1e-9, 1 + 1e-9):
        with pytest.raises(ConfigError):
            solvers.DDIM(wrong)
    with pytest.raises(ConfigError):
        solvers.Multistep(eta=math.inf)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_what_a_solver_says_of_itself_is_no_setting_and_is_not_shown(name):
    made = solvers.build(name)
    assert all(part.repr == part.init for part in dataclasses.fields(made))
