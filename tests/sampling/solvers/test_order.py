"""Every solver converges as fast as it declares, start-up included, on three schedules whose ends are finite.

Strong order: the error of the probability flow of a mixture of two Gaussians, whose flow keeps quantiles. Weak order:
the error of a Gaussian's mean and variance, which the probed affine map gives without randomness. Slopes are taken
from the finest three doublings of the steps whose error is above `LEAST`; below `ENOUGH` there are no more. Where an
order shows with more steps than `STEPS` only, the row says how many, and those of more than 512 are `release` tests.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracles import GaussianData, MixtureData
from solver_table import PROCESSES, ROWS
from test_affine import probe

from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import trajectory

LEAST = 1e-11
ENOUGH = 16 * LEAST  # one doubling more, at order 4, would come below it
ENDS = {"log-SNR": (0.9, 0.3), "flow": (0.95, 0.05), "exploding": (0.8, 0.35)}
STEPS = [8, 16, 32, 64, 128]
MIXTURE = MixtureData(torch.tensor([0.4, 0.6]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[0.3], [0.2]]))
GAUSSIAN = GaussianData(torch.tensor([0.7]), torch.tensor([0.3]))
NU = 0.3


class Fit(NamedTuple):
    """The slope and R² of log error against log steps, from ``first`` to ``last`` steps."""

    order: float
    r2: float
    first: int
    last: int
    errors: list[float]


def fit(steps: list[int], errors: list[float]) -> Fit:
    usable = [(n, error) for n, error in zip(steps, errors, strict=False) if error > LEAST][-4:]
    logs = np.log2(np.array(usable).T)
    return Fit(-np.polyfit(*logs, 1)[0], np.corrcoef(*logs)[0, 1] ** 2, usable[0][0], usable[-1][0], errors)


def levels_of(ends: str, steps: int) -> list:
    first, last = ENDS[ends]
    return time_grid(PROCESSES[ends].schedule, times=np.linspace(first, last, steps + 1).tolist())


def none(draws: int) -> torch.Tensor:
    return torch.empty(draws, 4, 1, dtype=torch.float64)


def strong(solver, ends: str, steps: int) -> float:
    return strong_error(solver, PROCESSES[ends].schedule, levels_of(ends, steps))


def strong_error(solver, schedule, levels: list, predicts_at_data: bool = True) -> float:
    x = torch.tensor([[-1.3], [-0.2], [0.1], [0.9]], dtype=torch.float64)
    x = x * torch.sqrt(levels[0].alpha ** 2 + levels[0].sigma ** 2)
    exact = MIXTURE.flow(x, levels[0], levels[-1])
    denoise = replace(MIXTURE.denoiser(schedule), predicts_at_data=predicts_at_data)
    *_, done = trajectory(denoise, solver, levels, x, none)
    return float((done.x - exact).norm())


def weak(solver, ends: str, steps: int) -> float:
    return weak_error(solver, PROCESSES[ends].schedule, levels_of(ends, steps))


def weak_error(solver, schedule, levels: list) -> float:
    start, end = levels[0], levels[-1]
    map_ = probe(solver, GAUSSIAN.denoiser(schedule, NU), levels, dims=1)
    gain = float(map_.matrix[0, 0])
    mean = gain * float(start.alpha * GAUSSIAN.m) + float(map_.offset[0])
    var = gain**2 * float(GAUSSIAN.marginal_var(start)) + float((map_.noise**2).sum())
    return abs(mean - float(end.alpha * GAUSSIAN.m)) + abs(var - float(GAUSSIAN.marginal_var(end)))


def slope(solver, ends: str, steps: list[int]) -> Fit:
    errors = []
    for n in steps:
        errors.append((weak if solver.noises_per_step else strong)(solver, ends, n))
        if errors[-1] < ENOUGH:
            break
    return fit(steps, errors)


def measure(name: str, ends: str) -> Fit:
    row = ROWS[name]
    finest = row.finest.get(ends)
    return slope(row.solver, ends, [finest // 8, finest // 4, finest // 2, finest] if finest else STEPS)


def cases():
    for name, row in ROWS.items():
        for ends in ENDS if row.order is not None else ():
            marks = [pytest.mark.release] if row.finest.get(ends, 0) > 512 else []
            yield pytest.param(name, ends, marks=marks, id=f"{name}-{ends}")


@pytest.mark.parametrize(("name", "ends"), list(cases()))
def test_order(name, ends):
    row, measured = ROWS[name], measure(name, ends)
    assert row.solver.order == row.order
    assert abs(measured.order - row.order) < 0.15, measured
    assert measured.r2 >= 0.995, measured
