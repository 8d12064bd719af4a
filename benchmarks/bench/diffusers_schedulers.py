"""Samples by the schedulers of diffusers with a network of ours: the same weights, levels and noise at t = 1."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from undiffuse.model.diffusion import Diffusion
from undiffuse.process.seeded_noise import ItemNoise

CHAIN = 1000
"""Levels of the chain of their schedulers."""


def samples(model: Diffusion, seed: int, scheduler: Any, calls: int) -> Callable[[int, int], Tensor]:
    """more(first, n): the samples of the items from ``first`` on, as values of the data (n, *item_shape)."""
    denoise, stochastic = model.sampling_denoiser(), "generator" in signature(scheduler.step).parameters

    def more(first: int, n: int) -> Tensor:
        scheduler.set_timesteps(calls)
        x = ItemNoise(seed, range(first, first + n), model.item_shape)(1)[0] * scheduler.init_noise_sigma
        noise = {"generator": torch.Generator().manual_seed(first)} if stochastic else {}
        for k in scheduler.timesteps:
            level = model.schedule(torch.tensor((float(k) + 1) / len(scheduler.betas), dtype=torch.float64))
            with torch.no_grad():
                eps = denoise(scheduler.scale_model_input(x, k), level).eps
            x = scheduler.step(eps, k, x, return_dict=False, **noise)[0]
        return model.transform.to_data(x)

    return more


def schedulers(model: Diffusion, spacings: Sequence[str]) -> dict[str, Any]:
    """By name those with the noise levels of ``model`` and their usual ``spacings``. Raises ModuleNotFoundError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import schedulers as theirs
    t = torch.arange(1, CHAIN + 1, dtype=torch.float64) / CHAIN
    alpha_bar = model.schedule(t).alpha ** 2
    betas = (1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])).numpy()
    common = {"trained_betas": betas, "num_train_timesteps": CHAIN}
    found: dict[str, Any] = {}
    for spacing in spacings:
        settings = common | {"timestep_spacing": spacing}
        found[f"DDIM, {spacing}"] = theirs.DDIMScheduler(**settings, clip_sample=False)
        found[f"DDPM, {spacing}"] = theirs.DDPMScheduler(**settings, clip_sample=False)
        found[f"Euler ancestral, {spacing}"] = theirs.EulerAncestralDiscreteScheduler(**settings)
        for karras in (False, True):
            more = settings | {"use_karras_sigmas": karras}
            name = f"{spacing}{', Karras' if karras else ''}"
            found[f"DPM-Solver++ 2M, {name}"] = theirs.DPMSolverMultistepScheduler(**more)
            for order in (2, 3):
                sde = more | {"algorithm_type": "sde-dpmsolver++", "solver_order": order}
                found[f"DPM-Solver++ {order}M SDE, {name}"] = theirs.DPMSolverMultistepScheduler(**sde)
            found[f"UniPC, {name}"] = theirs.UniPCMultistepScheduler(**more)
            found[f"Euler, {name}"] = theirs.EulerDiscreteScheduler(**more)
            found[f"Heun, {name}"] = theirs.HeunDiscreteScheduler(**more)
    return found
