"""Gaussian data, linear observations and their exact posteriors, for the tests of posterior guidance."""

import math

import torch
from oracles import GaussianData
from torch import nn

from undiffuse.denoising.linear_operators import LinearOperator, identity, mask, mean_pool
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.sampling.trajectory import trajectory

F64 = torch.float64
SHAPE, D = (1, 2, 2), 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


ROOT = random(D, D, seed=3)
COV = ROOT @ ROOT.T / D + 0.05 * torch.eye(D)
MEAN = random(*SHAPE, seed=4)
DATA = GaussianData(MEAN, COV)
MATRIX = random(3, D, seed=5)
OPERATORS = {
    "mask": mask(torch.tensor([[True, False], [True, True]]), SHAPE),
    "pool": mean_pool(2, SHAPE),
    "matrix": LinearOperator(lambda x: x.flatten(1) @ MATRIX.to(x).T, SHAPE),
    "identity": identity(SHAPE),
}
SCHEDULES = {
    "linear": (DS.linear(), [1.0, 0.5, 0.001]),
    "log-SNR": (S.LinearLogSNR(), [1.0, 0.4, 0.0]),
    "flow": (S.Flow(), [0.999, 0.5, 1e-3, 1e-5]),
    "exploding": (S.VarianceExploding(), [1.0, 0.5, 0.0]),
}


def dense(operator: LinearOperator) -> torch.Tensor:
    return operator(torch.eye(D, dtype=F64).reshape(D, *SHAPE)).flatten(1).T


def bayes(operator: LinearOperator, y: torch.Tensor, std: float) -> GaussianData:
    """The distribution of x given y of one item: the textbook formula in information form."""
    A, precision = dense(operator), torch.linalg.inv(COV)
    if std == 0:  # the formula's limit, by projection
        gain = COV @ A.T @ torch.linalg.inv(A @ COV @ A.T)
        cov = COV - gain @ A @ COV
        return GaussianData(MEAN + (gain @ (y[0].flatten() - A @ MEAN.flatten())).reshape(SHAPE), (cov + cov.T) / 2)
    cov = torch.linalg.inv(precision + A.T @ A / std**2)
    mean = cov @ (precision @ MEAN.flatten() + A.T @ y[0].flatten() / std**2)
    return GaussianData(mean.reshape(SHAPE), (cov + cov.T) / 2)


def moments(solver, denoise, levels, shape=SHAPE) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the samples of an affine sampler: columns from basis vectors."""
    dims, steps = math.prod(shape), len(levels) - 1
    n = 1 + dims * (1 + steps * solver.noises_per_step)
    fresh = torch.eye(n, dtype=F64)[:, 1:].reshape(n, 1 + steps * solver.noises_per_step, *shape).movedim(1, 0)
    noises = iter(fresh[1:].reshape(steps, solver.noises_per_step, n, *shape))
    *_, last = trajectory(denoise, solver, levels, fresh[0], lambda _: next(noises))
    columns = (last.x[1:] - last.x[0]).flatten(1)
    return last.x[0], columns.T @ columns


class Net(nn.Module):
    """A small network with a label, of y and of the variance interpolation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(D + 2, 16), nn.SiLU(), nn.Linear(16, 2 * D))

    def forward(self, x, time, cond=None):
        label = torch.zeros(len(x)) if cond is None else cond.label.float()
        inputs = torch.stack([time.to(x), label.to(x)], 1)
        return self.layers(torch.cat([x.flatten(1), inputs], 1)).reshape(len(x), 2 * x.shape[1], *x.shape[2:])


PAIR = GaussianData(torch.zeros(2, dtype=F64), torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64))
