"""The errata: the page has the script's numbers, and the package agrees with the right forms, not the printed ones."""

from __future__ import annotations

import math
import re
import runpy
from collections.abc import Callable
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import GaussianData

from undiffuse.denoising.denoiser import Prediction
from undiffuse.denoising.score_matching import conditional_score, explicit, stein
from undiffuse.likelihood.nll import NLL
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.likelihood.vlb import vlb
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.gaussian import Gaussian, diffuse, forward, posterior, reverse, step_log_var
from undiffuse.process.noise_level import NoiseLevel, log_var_large, log_var_small
from undiffuse.process.target import TARGETS
from undiffuse.process.weighting import bound
from undiffuse.sampling.solvers.ancestral import Ancestral
from undiffuse.sampling.solvers.langevin import langevin
from undiffuse.sampling.solvers.one_step_inversion import OneStepInversion, step_noise
from undiffuse.sampling.solvers.solver import Solver
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import forward_trajectory

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/errata.md").read_text()
script = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "errata"), run_name="errata"))

LEVELS = time_grid(DS.linear())  # from t = 1 to 0
ONE = torch.ones(1, 1, dtype=torch.float64)
STANDARD = GaussianData(torch.zeros(1), torch.ones(1))
QUARTER = GaussianData(torch.zeros(1), torch.tensor([0.25]))


def at(k: int) -> NoiseLevel:
    return LEVELS[1000 - k]


@cache
def state_variance(solver: Solver, data: GaussianData, end: int = 0) -> float:
    """The variance of the state at ``end`` from x_T ~ N(0, 1): v = slope² v + noise², both measured at each step."""
    probe, denoise, v = torch.tensor([[1.0], [0.0]], dtype=torch.float64), data.denoiser(DS.linear()), 1.0
    for t, s in pairwise(LEVELS[: 1001 - end]):
        x_s, _ = solver.step(denoise, probe, t, s, (), probe.flip(0).expand(solver.noises_per_step, 2, 1))
        v = float(x_s[0]) ** 2 * v + float(x_s[1]) ** 2
    return v


def chain_bound(data: GaussianData, variance, x: float = 1.0, eps: float = 1.0, prior: Gaussian | None = None) -> NLL:
    """`vlb` over the first hundred steps, averaged over x and eps of mean 0 and these standard deviations."""
    levels = time_grid(DS.Tabulated(script.SHORT))
    signs = torch.tensor(list(product((1.0, -1.0), repeat=2)), dtype=torch.float64)
    noise = eps * signs[:, 1:]
    chain = ReverseChain(data.denoiser(S.Flow()), levels, variance)
    result = vlb(chain, x * signs[:, :1], lambda n: noise[None], prior=prior)
    return result._replace(**{part: getattr(result, part).mean() for part in ("prior", "diffusion_nats", "decoder")})


def last_step(solver: Solver, x: float) -> float:
    """The last step's result for data of one point, from x_1 = alpha x + sigma eps, with noise."""
    data = GaussianData(torch.tensor([x]), torch.zeros(1))
    x_1 = diffuse(x * ONE, at(1), 0.6 * ONE)
    return float(solver.step(data.denoiser(DS.linear()), x_1, at(1), at(0), (), ONE[None])[0])


def chained_variance() -> float:
    v = 1.0
    for k in range(1, 1001):
        step = forward(ONE, at(k - 1), at(k))
        v = v * float(step.mean) ** 2 + math.exp(step.log_var)
    return v


def mean_error() -> float:
    """The error of the mean of `reverse` with the noise of the jump against `posterior`, in standard deviations."""
    x, eps = torch.randn(2, 100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = at(1000), at(999)
    x_t = diffuse(x, t, eps)
    model = reverse(Prediction((x_t - t.sigma * eps) / t.alpha, eps), x_t, t, s)
    exact = posterior(x_t, x, t, s)
    return float((model.mean - exact.mean).abs().max() / torch.exp(0.5 * exact.log_var).min())


def one_step_bound() -> float:
    def zero(x_t, level, cond=None, next_level=None):
        return Prediction(torch.zeros_like(x_t), x_t)

    zero.schedule = S.Flow()
    noise = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    chain = ReverseChain(zero, time_grid(DS.Tabulated([0.5])), lambda t, s: 0 * t.t)
    return float(vlb(chain, 0 * noise, lambda n: noise[None]).total.mean())


def excess() -> float:
    """The bound less −log p of the chain's samples, a Gaussian whose variance follows from the steps."""
    v, levels = 1.0, time_grid(DS.Tabulated(script.SHORT))
    denoise = STANDARD.denoiser(S.Flow())
    for t, s in pairwise(levels):
        step = reverse(denoise(ONE, t), ONE, t, s, "small")
        v = v * float(step.mean) ** 2 + math.exp(step.log_var)
    samples = Gaussian(0 * ONE, math.log(v) * ONE)
    return float(chain_bound(STANDARD, "small").total + samples.log_prob(ONE))


def mass(dims: int, variance: float) -> float:
    x = torch.linspace(-15, 15, 4001, dtype=torch.float64)
    density = Gaussian(torch.zeros(()), torch.tensor(math.log(variance), dtype=torch.float64)).log_prob(x).exp()
    return float(density.sum() * (x[1] - x[0])) ** dims


def kl(mean: float, variance: float) -> float:
    v = torch.tensor(math.log(variance), dtype=torch.float64)
    return float(Gaussian(torch.zeros(()), v).kl(Gaussian(torch.tensor(mean, dtype=torch.float64), v)))


def stationary(step: float) -> float:
    """The stationary variance of `langevin` on N(0, 1): v = slope² v + noise²."""
    slope, noise = langevin(ONE, -ONE, step, 0 * ONE), langevin(0 * ONE, 0 * ONE, step, ONE)
    return float(noise**2 / (1 - slope**2))


def score_weight() -> float:
    """The weight of ‖eps − ε̂‖² in the squared error of scores, which is twice `explicit`."""
    eps, eps_hat = 0.7 * ONE, -0.4 * ONE
    loss = 2 * explicit(lambda x_t: conditional_score(eps_hat, at(1)), ONE, conditional_score(eps, at(1)))
    return float(loss / (eps - eps_hat) ** 2)


def cube(y):
    return y**3


def exact(t: NoiseLevel, s: NoiseLevel):
    return QUARTER.reverse_log_var(t, s)


def exact_bound() -> float:
    """The bound of narrow data less their entropy, with the exact reverse process and prior."""
    data = GaussianData(torch.zeros(1), torch.tensor([0.01], dtype=torch.float64))
    top = time_grid(DS.Tabulated(script.SHORT))[0]
    prior = Gaussian(torch.zeros(1), torch.log(data.marginal_var(top)))
    return float(chain_bound(data, data.reverse_log_var, x=0.1, prior=prior).total - data.entropy())


PACKAGE: dict[str, Callable[[], float]] = {  # the right number, by the functions of the package
    "F1a": lambda: float(forward(ONE, at(999), at(1000)).mean) ** 2 + math.exp(log_var_large(at(1000), at(999))),
    "F1b": chained_variance,
    "F2": lambda: float([*forward_trajectory(ONE, LEVELS, lambda n: 0 * ONE[None])][-1].x),
    "F3a": lambda: float(DS.linear()(1.0).alpha),
    "F3b": lambda: float(diffuse(ONE, at(1000), 0 * ONE)),
    "F4": lambda: math.exp(0.5 * forward(ONE, at(0), at(1)).log_var),
    "F5": lambda: float(DS.Tabulated(0.02 / np.arange(1, 1001) ** 2.0)(1.0).alpha ** 2),
    "R2": lambda: math.exp(step_log_var(ONE, at(1000), at(999)) - step_log_var(ONE, at(2), at(1))),
    "R4": mean_error,
    "R6": lambda: (last_step(Ancestral("large"), 0.3) - 0.3) ** 2,
    "R7a": lambda: float(step_noise(ONE, at(1000), at(999))),
    "R7b": lambda: state_variance(Ancestral(exact), QUARTER),
    "R7c": lambda: state_variance(Ancestral(exact), QUARTER),
    "R7d": lambda: state_variance(Ancestral("large"), STANDARD, end=1),
    "R7e": lambda: len(LEVELS) - 1,
    "T1a": lambda: float(chain_bound(STANDARD, "large").total),
    "T1b": one_step_bound,
    "T1c": lambda: float(Gaussian(0 * ONE, 0 * ONE).log_prob(0 * ONE)),
    "T1d": lambda: float(chain_bound(STANDARD, "large").total),
    "T1e": lambda: math.exp(reverse(Prediction(ONE, ONE), ONE, at(9), at(8)).bin_log_prob((-ONE / 0, ONE / 0))),
    "T1f": lambda: math.exp(log_var_large(at(2), at(1)) - log_var_small(at(2), at(1))),
    "T1g": lambda: float(chain_bound(STANDARD, "large", x=0.0).diffusion_nats),
    "T1h": exact_bound,
    "T1i": excess,
    "T2": lambda: kl(0.3, 0.5),
    "T3": lambda: float(bound(at(1), at(0))),
    "T6": lambda: float(1 / TARGETS["previous"].weight(torch.tensor(1.0), at(1000), at(999))),
    "S1": lambda: mass(3, 0.5),
    "S4": lambda: stationary(1e-6),
    "S5": score_weight,
    "S7a": lambda: float(stein(cube, 1.0, 2.0)[1]),
    "S7b": lambda: float(stein(cube, 1.0, 2.0)[1]) / 2,  # both sides divided by sigma
    "S7c": lambda: mass(1, 1.0),
}  # fmt: skip


def test_every_erratum_is_compared_and_documented() -> None:
    assert list(PACKAGE) == list(script.ERRATA)
    formulas, numbers = PAGE.split("## Numbers")
    for part in (formulas, numbers.partition("## Row by row")[0]):
        assert re.findall(r"^\| ([A-Z]\d[a-z]?) \|", part, re.M) == list(script.ERRATA)


@pytest.mark.parametrize("name", PACKAGE)
def test_the_right_form_is_right_and_that_of_the_package(name: str) -> None:
    n = script.ERRATA[name]()
    assert n.right == pytest.approx(n.truth, rel=n.tolerance, abs=n.tolerance)
    assert PACKAGE[name]() == pytest.approx(n.right, rel=1e-9, abs=1e-9)
    assert abs(n.printed - n.truth) > n.margin > 100 * n.tolerance


def test_the_page_has_the_numbers_and_is_stable() -> None:
    assert script.rewritten(PAGE) == PAGE
    altered = PAGE.replace("197.99", "198.01").replace("| 0.5 | 0.66667 |", "| 0.5 | 0.6 |")
    assert altered != PAGE
    assert script.rewritten(altered) == PAGE
    with pytest.raises(SystemExit, match=r"error\[ERRATA\] errata.md: the block 'langevin' occurs 0 times"):
        script.rewritten(PAGE.replace("scripts/errata: langevin", "gone"))


@pytest.mark.parametrize("form", ["printed", "scaled"])
def test_inversion_without_noise_loses_the_variance(form: str) -> None:
    assert state_variance(OneStepInversion(form), QUARTER) == pytest.approx(script.sampled(form), rel=1e-9, abs=1e-60)


def test_the_script_prints_or_writes(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    assert script.main([]) == 0
    blocks = re.findall(r"<!-- scripts/errata: \w+ -->\n\n(.*?)\n\n<!-- end -->", PAGE, re.S)
    assert capsys.readouterr().out == "".join(f"{block}\n\n" for block in blocks)
    page = tmp_path / "errata.md"
    page.write_text(PAGE.replace("197.99", "0"))
    monkeypatch.setitem(script.main.__globals__, "PAGE", page)
    assert script.main(["--write"]) == 0
    assert page.read_text() == PAGE
