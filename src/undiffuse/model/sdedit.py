"""Image to image by noise and back: variants of an item that are as close to it as a strength says [Meng22]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from undiffuse.data.transform import is_latent, values_transform
from undiffuse.denoising.denoiser import ConditionedDenoiser
from undiffuse.errors import ConfigError
from undiffuse.model.arguments import check_counts, check_items, check_sampler
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import in_evaluation_mode
from undiffuse.process.gaussian import diffuse
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.trajectory import check_finite, last_step, rescale, trajectory


@torch.inference_mode(False)
@torch.no_grad()
def sdedit(
    model: Diffusion,
    x: Tensor,
    n: int,
    strength: float,
    seed: int = 0,
    num_steps: int | None = None,
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
    cond: Condition | None = None,
) -> Tensor:
    """n variants of ``x``, as data values (n, *item_shape); the noise of item i depends on (seed, i) alone.

    ``x`` (*item_shape) in the units of the transform of the values; a latent model takes the latents of it. The
    trajectory starts at the time ``strength``, with alpha x + sigma eps there [Meng22 alg. 1], and takes the steps of
    `variant_levels` along the probability flow. eps is the noise that `Diffusion.sample` starts from for the same seed:
    at strength 1, where alpha is 0, the variants are the samples by the solver "ddim". ``progress`` is called with the
    number of item-steps done. ``cond`` holds the condition of each of the n items. Raises `ConfigError` and
    `NonFiniteError`.
    """
    check_counts(n=(n, 1), batch=(batch, 1), seed=(seed, 0))
    levels = variant_levels(model, strength, num_steps)
    x = check_items("x", x[None], model.item_shape).to(model.device, model.dtype)
    if is_latent(model.transform):
        x = model.transform.to_model(values_transform(model.transform).to_data(x), model.dtype)
    cond = None if cond is None else model.prepare_condition(cond, n)
    sampler, values = flow_sampler(model), []
    for first in range(0, n, batch):
        items = range(first, min(first + batch, n))
        own = cond and cond.take(slice(items.start, items.stop))
        denoise = ConditionedDenoiser(model.sampling_denoiser(sampler), own)
        noise = ItemNoise(seed, items, model.x_shape, device=model.device)
        start = diffuse(x, levels[0], noise(1)[0].to(model.dtype))
        steps = in_evaluation_mode(trajectory(denoise, model.build_solver(sampler), levels, start, noise), model)
        last = last_step(steps, partial(progress, len(items)) if progress else None)
        values.append(model.transform.to_data(check_finite(rescale(last.x, last.level), first)).cpu())
    return torch.cat(values)


def flow_sampler(model: Diffusion) -> Sampler:
    """DDIM in 50 steps, or those of a shorter chain; the own sampler of a distilled model."""
    return model.default_sampler if model.config.calls else check_sampler("ddim", model.chain_length)


def variant_levels(model: Diffusion, strength: float, num_steps: int | None = None) -> list[NoiseLevel]:
    """The levels of `sdedit`: ``num_steps`` (those of `flow_sampler`) equal steps from t = ``strength`` to 0.

    On a table the times are multiples of 1/T, so that there are at most strength T steps. A distilled model takes the
    times of its own sampler, multiplied by the strength, whatever ``num_steps`` is. Raises `ConfigError`.
    """
    if not 0 < strength <= 1:
        raise ConfigError("STRENGTH", f"strength = {strength:g}", "out of range", "Give a number above 0, at most 1")
    sampler, T = flow_sampler(model), model.schedule.chain_length
    steps = sampler.num_steps if num_steps is None else num_steps
    assert steps is not None  # `flow_sampler` has a number of steps
    steps = min(steps, model.chain_length)
    check_counts(num_steps=(steps, 1))
    last = strength if T is None else max(1, round(strength * T))  # in units of 1/T on a table
    steps = steps if T is None else min(steps, int(last))
    times = [last * (steps - i) / steps for i in range(steps + 1)]
    if sampler.times is not None:  # a distilled model's
        times = [strength * t for t in sampler.times]
    elif T is not None:
        times = [int(k + 0.5) / T for k in times]
    return model.noise_levels(replace(sampler, times=tuple(times)))
