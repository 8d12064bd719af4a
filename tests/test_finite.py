"""Nothing that can be asked of sampling ends in NaN: it is finite, or refused by name before the first call.

Solver × target × schedule × number of steps × precision of the network × guidance × odd network, at tiny size: every
seventh of all combinations, some twenty thousand, of which `make test` draws a few hundred. What may give up later,
by name: the adaptive solver, which sees only on the way that a flow runs away, and a walk that grew past `VAST`.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from undiffuse import solvers
from undiffuse.conditioning import Condition
from undiffuse.denoiser import Clipped, NetworkDenoiser, Preconditioning, Told
from undiffuse.errors import UndiffuseError
from undiffuse.grids import grid
from undiffuse.guidance import ClassifierFree
from undiffuse.process import schedule as S
from undiffuse.process import target as T
from undiffuse.randomness import ItemNoise
from undiffuse.sample import numbers, prior_sample, to_data, trajectory

SCHEDULES = {
    "linear": S.linear(50, 1e-3, 0.2),
    "cosine": S.cosine(50),
    "zero terminal": S.Tabulated(torch.cat([torch.linspace(0.01, 0.2, 49), torch.ones(1)])),
    "log-SNR": S.LinearLogSNR(),
    "flow": S.Flow(),
    "exploding": S.VarianceExploding(),
}
STEPS = [1, 2, 3, 5, 10, 50]
PRECISIONS = [torch.float32, torch.bfloat16]
SCALES = [0.0, 1.0, 7.5, 30.0]
NETWORKS = {
    "zero": torch.zeros_like,
    "identity": lambda x: x,
    "constant": lambda x: torch.full_like(x, 1e4),
}
NEAR = 0.9
"""The share of an answer that is left where nothing is told, when no clamp keeps the guidance within bounds."""
VAST = 1e30
"""A state so large has grown there step by step: 3.4e38 is the end of the numbers, and no NaN comes from so few."""
SETTINGS = {
    "annealed_langevin": {"each": 2},
    "ancestral": {"variance": "large"},
    "adaptive": {"rtol": 0.1, "atol": 0.1, "max_calls": 200},
}


class Odd(torch.nn.Module):
    """A network of one answer in a precision of its own, and ``null`` times that where nothing is told."""

    def __init__(self, answer, precision, null) -> None:
        super().__init__()
        self.answer, self.precision, self.null, self.calls = answer, precision, null, 0

    def forward(self, x, time, cond=None):
        self.calls += 1
        y = self.answer(x.to(self.precision))
        return torch.where(cond.label[:, None] < 0, self.null * y, y)


def sample(solver, target, schedule, steps, precision, scale, network) -> list[torch.Tensor]:
    """What comes out (2, 3); nothing where it was refused, which must be before the network was called.

    Led away from its own opposite, the identity grows by a factor of twice the scale a step, beyond all numbers, so
    such a one has the clamp around it that data with levels have; without it the guidance is from `NEAR` to it: what
    is guided is 1.65 times the answer at a scale of 7.5, and 3.9 times at 30.
    """
    outs = []
    for null, clipped in [(-1.0, False)] if scale <= 1 else [(-1.0, True), (NEAR, False)]:
        odd, largest = Odd(NETWORKS[network], precision, null), 0.0
        try:
            levels = grid(SCHEDULES[schedule], steps)
            kind = T.build(target)
            for t, s in itertools.pairwise(levels):
                kind.check(t, s if kind.pair else None)
            denoise = NetworkDenoiser(odd, SCHEDULES[schedule], kind, Preconditioning("unit", "log_snr"))
            guided = ClassifierFree(denoise, scale)
            told = Told(Clipped(guided) if clipped else guided, Condition(label=torch.zeros(2, dtype=torch.int64)))
            noise = ItemNoise(0, range(2), (3,))
            walk = solvers.build(solver, **SETTINGS.get(solver, {}))
            states = list(trajectory(told, walk, levels, prior_sample(levels[0], noise(1)[0]), noise))
            largest = max(float(state.x.abs().max()) for state in states if bool(torch.isfinite(state.x).all()))
            last = to_data(states[-1].x, states[-1].level)
            outs.append(numbers(last) if largest > VAST else last)
        except UndiffuseError as error:
            late = "NON_FINITE" if largest > VAST else "ODE ODE_CALLS" if solver == "adaptive" else ""
            if odd.calls and error.code not in late.split():
                raise
    return outs


COMBINATIONS = list(itertools.product(solvers.SOLVERS, T.TARGETS, SCHEDULES, STEPS, PRECISIONS, SCALES, NETWORKS))[::7]


def failures(combinations) -> list[tuple]:
    return [c for c in combinations if not all(bool(torch.isfinite(out).all()) for out in sample(*c))]


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_some_combinations(solver):
    assert failures([c for c in COMBINATIONS if c[0] == solver and c[3] <= 5][7::37]) == []


@pytest.mark.release
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_all_combinations(solver):
    assert failures([c for c in COMBINATIONS if c[0] == solver]) == []
