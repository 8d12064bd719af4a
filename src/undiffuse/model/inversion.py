"""Items to the noise that generates them under a model's flow, and back; items between two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import ConditionedDenoiser, Denoiser, in_float32
from undiffuse.model import arguments
from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import evaluation_mode
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.sampling.ddim_inversion import ddim_generate, ddim_invert, finite_levels, slerp
from undiffuse.sampling.trajectory import check_finite


def to_noise(model: Any, values: Tensor, num_steps: int | None = None, cond: Condition | None = None) -> Tensor:
    """`Diffusion.to_noise`."""
    x = model.transform.to_model(arguments.check_values(values, model.item_shape, model.transform), model.dtype)
    x = arguments.outside_inference_mode(x.to(model.device))
    denoise, levels = _conditioned(model, cond, len(x)), _levels(model, num_steps)
    with evaluation_mode(model):
        return check_finite(ddim_invert(denoise, x, levels)).cpu()


def from_noise(model: Any, noise: Tensor, num_steps: int | None = None, cond: Condition | None = None) -> Tensor:
    """`Diffusion.from_noise`."""
    noise = arguments.check_items("noise", noise, model.x_shape).to(model.device, model.dtype)
    denoise, levels = _conditioned(model, cond, len(noise)), _levels(model, num_steps)
    with evaluation_mode(model):
        x = check_finite(ddim_generate(denoise, noise, levels))
    return model.transform.to_data(x).cpu()


def interpolate(
    model: Any, ends: Tensor, n: int, num_steps: int | None = None, cond: Condition | None = None
) -> Tensor:
    """n ≥ 2 items on the way between two, as values (n, *item_shape): their noises by `slerp` at equal weights.

    ``ends`` (2, *item_shape) are the two items, and up to the solver's error the first and the last result. ``cond``
    holds the condition of each of the n items; its first and its last are those of the ends.
    """
    one, other = to_noise(model, ends, num_steps, cond and cond.take(torch.tensor([0, n - 1])))
    return from_noise(model, slerp(one, other, torch.linspace(0, 1, n)), num_steps, cond)


def _levels(model: Any, num_steps: int | None) -> list[NoiseLevel]:
    arguments.check_predicts_mean(model.config)
    sampler = arguments.check_sampler("ddim", model.chain_length)
    sampler = sampler if num_steps is None else replace(sampler, num_steps=num_steps)
    return finite_levels(model.schedule, model.noise_levels(sampler))


def _conditioned(model: Any, cond: Condition | None, items: int) -> Denoiser:
    return ConditionedDenoiser(in_float32(model.denoiser()), cond and model.prepare_condition(cond, items))
