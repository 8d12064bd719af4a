"""Two other implementations behind the arguments of ours, and what can be measured of them: `docs/peers.md`.

`python tests/parity/peers.py` prints the page's table. Both packages are read where they are installed; of
k-diffusion only the sampling functions, whose imports for pictures and for SDE libraries are left empty.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from oracles import GaussianData, MixtureData
from peer_packages import import_k_diffusion

from undiffuse.denoising.denoiser import NetworkDenoiser, Preconditioning
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.target import TARGETS
from undiffuse.sampling.solvers.solver import Solver
from undiffuse.sampling.trajectory import trajectory

f64 = torch.float64


def diffusers() -> types.ModuleType:
    """Its schedulers. Raises ModuleNotFoundError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("diffusers.schedulers")


# --- the same network, noise and table in both ---------------------------------------------------------------------


class Net(nn.Module):
    """A few smooth functions of x and of a number of order one, in float32: (B, 8) to (B, 8)."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w, self.v, self.u = (torch.randn(shape, generator=g) / 3 for shape in ((8, 64), (64, 8), (64,)))

    def forward(self, x: Tensor, time: Tensor, cond: object = None) -> Tensor:
        return x + 0.3 * torch.tanh(x @ self.w + time[:, None] / 1000 * self.u) @ self.v


NET = Net()
g = torch.Generator().manual_seed(1)
X, Z = torch.randn(16, 8, generator=g), torch.randn(200, 16, 8, generator=g)


def noises() -> Callable[..., Tensor]:
    """The same numbers for both, in turn: noise(draws), or their randn_tensor(shape, ...)."""
    left = iter(Z)

    def noise(draws: object, **_: object) -> Tensor:
        if not isinstance(draws, int):
            return next(left)
        return torch.stack([next(left) for _ in range(draws)]) if draws else X[None][:0]

    return noise


def table(scheduler) -> DS.Tabulated:
    """Ours, from their float32 alpha_bar."""
    bar = torch.cat([torch.ones(1, dtype=f64), scheduler.alphas_cumprod.double()])
    return DS.Tabulated(1 - bar[1:] / bar[:-1])


def theirs(scheduler, **extra) -> list[Tensor]:
    """Every state of a scheduler's chain, in its own units; ``extra`` are functions of the step."""
    x = X * float((scheduler.sigmas[0] ** 2 + 1).sqrt()) if in_ratio(scheduler) else X
    states = [x]
    for k, t in enumerate(scheduler.timesteps):
        y = NET(scheduler.scale_model_input(x, t), torch.full((16,), float(t)))
        x = scheduler.step(y, t, x, return_dict=False, **{name: value(k) for name, value in extra.items()})[0]
        states.append(x)
    return states


def in_ratio(scheduler) -> bool:
    """Whether its states are x_t/alpha_t."""
    return type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")


def ours(solver: Solver, scheduler) -> tuple[list[NoiseLevel], list[Tensor]]:
    """The levels and states of our chain on a scheduler's table and timesteps, which it counts from 0."""
    schedule = table(scheduler)
    times = [(float(t) + 1) / 1000 for t in dict.fromkeys(scheduler.timesteps.tolist())]
    denoise = NetworkDenoiser(NET, schedule, TARGETS["eps"], Preconditioning(time="step", chain_length=1000))
    levels = S.chain(schedule, [*times, 0.0])
    return levels, [step.x for step in trajectory(denoise, solver, levels, X, noises())]


def differences(scheduler, solver: Solver, **extra) -> list[float]:
    """The largest absolute difference of each state from ours, both as x_t."""
    other, (levels, mine) = theirs(scheduler, **extra), ours(solver, scheduler)
    if in_ratio(scheduler):
        calls = 2 if type(scheduler).__name__.startswith("Heun") else 1
        other = [*other[:-1:calls], other[-1]]
        other = [x * float(level.alpha) for x, level in zip(other, levels, strict=True)]
    return [float((a - b).abs().max()) for a, b in zip(other, mine, strict=True)]


# --- their orders, on data whose flow is known ---------------------------------------------------------------------

MIXTURE = MixtureData(torch.tensor([0.4, 0.6]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[0.3], [0.2]]))
GAUSSIAN = GaussianData(torch.tensor([0.7]), torch.tensor([0.3]))
SCHEDULE = S.VarianceExploding()
POINTS = torch.tensor([[-1.3], [-0.2], [0.1], [0.9]], dtype=f64)


def levels_of(steps: int) -> list[NoiseLevel]:
    return S.chain(SCHEDULE, np.linspace(0.8, 0.35, steps + 1).tolist())


def by_k_diffusion(sampler: Callable[..., Tensor], **settings) -> Callable:
    """Their sampler of VE levels: run(data, levels, x, noise), ``noise`` one of each step."""

    def run(data, levels, x, noise):
        numbers = iter(noise)

        def model(x, sigma):
            return data.predict(x, NoiseLevel(sigma, torch.ones_like(sigma), sigma, -2 * sigma.log())).x

        sigmas = torch.stack([level.sigma for level in levels])
        return sampler(model, x, sigmas, disable=True, noise_sampler=lambda *_: next(numbers), **settings)

    return run


def by_diffusers(algorithm: str, order: int) -> Callable:
    """DPMSolverMultistepScheduler on levels of ours, whose states are x/√(1 + sigma²), in float32."""

    def run(data, levels, x, noise):
        scheduler = diffusers().DPMSolverMultistepScheduler(
            solver_order=order,
            algorithm_type=algorithm,
            prediction_type="sample",
            lower_order_final=False,
            final_sigmas_type="sigma_min",
        )
        scheduler.set_timesteps(len(levels) - 1)
        scheduler.sigmas = torch.stack([level.sigma for level in levels])
        scheduler.timesteps = torch.arange(len(levels) - 1)
        root = [float((1 + level.sigma**2).sqrt()) for level in levels]
        x = x / root[0]
        for k, level in enumerate(levels[:-1]):
            clean = data.predict(root[k] * x, level).x
            x = scheduler.step(clean, k, x, variance_noise=noise[k] if len(noise) else None, return_dict=False)[0]
        return (root[-1] * x).double()

    return run


def by_ours(solver: Solver) -> Callable:
    def run(data, levels, x, noise):
        numbers = iter(noise)
        *_, last = trajectory(
            data.denoiser(SCHEDULE), solver, levels, x, lambda n: next(numbers)[None] if n else x[None][:0]
        )
        return last.x

    return run


def strong(run: Callable, steps: int) -> float:
    """The error of the flow of a mixture of two Gaussians."""
    levels = levels_of(steps)
    x = POINTS * torch.sqrt(1 + levels[0].sigma ** 2)
    return float((run(MIXTURE, levels, x, []) - MIXTURE.flow(x, levels[0], levels[-1])).norm())


def weak(run: Callable, steps: int) -> float:
    """The error of a Gaussian's mean and variance, from the affine map that the sampler is."""
    levels = levels_of(steps)
    start, noise = torch.zeros(2 + steps, 1, dtype=f64), torch.zeros(steps, 2 + steps, 1, dtype=f64)
    start[1] = 1
    noise[torch.arange(steps), 2 + torch.arange(steps)] = 1
    out = run(GAUSSIAN, levels, start, noise)[:, 0]
    gain, fresh = out[1] - out[0], out[2:] - out[0]
    at_start, at_end = (float(level.sigma**2 + GAUSSIAN.cov) for level in (levels[0], levels[-1]))
    var = float(gain**2 * at_start + (fresh**2).sum())
    return abs(float(gain * GAUSSIAN.m + out[0] - GAUSSIAN.m)) + abs(var - at_end)


def order(errors: list[float]) -> float:
    """The slope over doublings of the steps."""
    return float(-np.polyfit(np.arange(len(errors)), np.log2(errors), 1)[0])


def main() -> None:
    """The table of `docs/peers.md`: the order over 64, 128 and 256 steps, and the error at 64."""
    from mistakes import OtherThird

    from undiffuse.sampling.solvers.dpm_multistep import Multistep

    K = import_k_diffusion()
    flow, sde = "DPM-Solver++ 3M, the flow", "DPM-Solver++ 3M, the SDE"
    rows = [
        (flow, "ours", strong, by_ours(Multistep(3))),
        (flow, 'ours, `start="low"`', strong, by_ours(Multistep(3, start="low"))),
        (flow, "ours with ½ M₂ for M₂", strong, by_ours(OtherThird())),
        (flow, "k-diffusion", strong, by_k_diffusion(K.sample_dpmpp_3m_sde, eta=0.0)),
        (flow, "diffusers", strong, by_diffusers("dpmsolver++", 3)),
        (sde, "ours", weak, by_ours(Multistep(3, 1.0))),
        (sde, "ours with ½ M₂ for M₂", weak, by_ours(OtherThird(eta=1.0))),
        (sde, "k-diffusion", weak, by_k_diffusion(K.sample_dpmpp_3m_sde)),
        (sde, "ours with ½ M₂ − 1 for M₂", weak, by_ours(OtherThird(eta=1.0, more=-1.0))),
        (sde, "diffusers", weak, by_diffusers("sde-dpmsolver++", 3)),
    ]
    print("| method | whose | order | error at 64 steps |\n| --- | --- | --- | --- |")
    for method, whose, measure, run in rows:
        errors = [measure(run, steps) for steps in (64, 128, 256)]
        print(f"| {method} | {whose} | {order(errors):.2f} | {errors[0]:.1e} |")


if __name__ == "__main__":
    main()
