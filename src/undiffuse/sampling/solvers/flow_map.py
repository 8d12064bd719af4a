# pyright: reportIncompatibleVariableOverride=false
"""Sampling with a flow map: one network call goes from one level to any other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.denoising.two_times import flow_map
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling.solvers.solver import Solver, State


@dataclass(frozen=True)
class FlowMapSampling(Solver):
    """x_s = X_{t→s}(x_t) = alpha_s x̂ + sigma_s ε̂, where the network gets the level s too [Boffi25; Geng25].

    For models with two times, of which one step is a sample. With another model this is deterministic DDIM.
    """

    order = 1

    def step(
        self, denoise: Denoiser, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, state: State, noise: Tensor
    ) -> tuple[Tensor, State]:
        return flow_map(denoise, x_t, t, s), state
