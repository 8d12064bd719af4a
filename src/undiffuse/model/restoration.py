"""Restoration: samples of a model given an item degraded by blur, shrinking, a mask and noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from undiffuse.data.transform import IntegerLevels, is_latent, values_transform
from undiffuse.denoising.denoiser import ConditionedDenoiser, in_float32
from undiffuse.denoising.linear_operators import DecodedOperator, LinearOperator, blur, identity, mask, mean_pool
from undiffuse.denoising.posterior_guidance import Observation
from undiffuse.errors import ConfigError
from undiffuse.model.arguments import check_counts, check_items, check_predicts_mean
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform
from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import in_evaluation_mode
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.prior import prior_sample
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers.product import Factor, observation_factor
from undiffuse.sampling.solvers.repaint import resampling_levels
from undiffuse.sampling.solvers.solver import Solver
from undiffuse.sampling.tables import RESTORATION_METHODS, RESTORATION_STEPS
from undiffuse.sampling.trajectory import check_finite, last_step, rescale, trajectory

SOLVER_METHODS = ("repaint", "product")
"""The rows of `RESTORATION_METHODS` that are solvers; the others are denoisers."""
JUMP_LENGTH, JUMP_REPEATS = 10, 4
"""RePaint's jumps back (`resampling_levels`), as measured in docs/inverse.md."""


@dataclass(frozen=True)
class Degradation:
    """y = M S B x + noise_std n of items of ``shape``, (C, ...): B blurs, S takes means of blocks, M masks.

    ``blur`` is the Gaussian's standard deviation in pixels (0: none), ``shrink`` the side of a block, ``noise_std`` in
    the units of x (2 from black to white), ``known`` a mask that broadcasts to the shrunken item, True where it is
    observed. Raises `ConfigError` for values out of range, and for a ``shrink`` that does not divide the shape.
    """

    shape: tuple[int, ...]
    blur: float = 0.0
    shrink: int = 1
    noise_std: float = 0.0
    known: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.noise_std < math.inf:
            cause = "it must be finite and not below 0"
            raise ConfigError("NOISE", f"noise_std = {self.noise_std:g}", cause, "Give 0 or more")
        if self.known is not None and not bool(self.known.any()):
            raise ConfigError("MASK", "mask", "it hides the whole image", "Use 'sample'")
        _ = self.full_operator  # raises `ConfigError` for a blur or shrink that it cannot apply

    @property
    def full_operator(self) -> LinearOperator:
        """S B, from x to the image before masking."""
        operator = blur(self.blur, self.shape) if self.blur else identity(self.shape)
        return mean_pool(self.shrink, self.shape) @ operator if self.shrink != 1 else operator

    def observe(self, image: Tensor) -> Tensor:
        """M applied to an ``image`` (B, *S B shape): y."""
        return image if self.known is None else mask(self.known, tuple(image.shape[1:]))(image)

    @property
    def operator(self) -> LinearOperator:
        """M S B."""
        full = self.full_operator
        return full if self.known is None else mask(self.known, full.out_shape) @ full

    @property
    def is_elementwise(self) -> bool:
        """Whether each element of y depends on one element of x: no blur and no shrinking."""
        return not self.blur and self.shrink == 1

    @property
    def is_inpainting(self) -> bool:
        """Whether y is a part of x itself: a mask without blur, shrinking or noise."""
        return self.known is not None and self.is_elementwise and not self.noise_std


def rounding_std(num_values: int) -> float:
    """2/((num_values − 1)√12): the standard deviation in x of rounding, uniform over a bin."""
    return 2 / (num_values - 1) / math.sqrt(12)


def degrade(degradation: Degradation, x: Tensor, seed: int, num_values: int) -> Tensor:
    """S B x + noise_std n of one item before masking, rounded to ``num_values`` values as in a file."""
    image = degradation.full_operator(x[None])
    noise = ItemNoise(seed, [0], image.shape[1:], "degraded")(1)[0]
    rounding = IntegerLevels(num_values)
    return rounding.to_model(rounding.to_data(image + degradation.noise_std * noise))[0]


def check_method(model: Diffusion, degradation: Degradation, method: str) -> None:
    """Raise `ConfigError` unless ``method`` can restore this degradation with this model."""
    check_predicts_mean(model.config)
    if method not in RESTORATION_METHODS:
        fix = f"Use one of {', '.join(RESTORATION_METHODS)}, or sdedit for variants"
        raise ConfigError("METHOD", repr(method), "no such method", fix)
    if method in SOLVER_METHODS and is_latent(model.transform):
        cause = "it changes pixels at each step, and this is a model of latents"
        raise ConfigError("METHOD", repr(method), cause, "Use 'mmps', 'pigdm' or 'dps'")
    if method == "repaint" and not degradation.is_inpainting:
        cause = "it fills in masked parts only, without blur, shrinking or noise"
        raise ConfigError("METHOD", "'repaint'", cause, "Use 'mmps'")
    if method == "product" and not degradation.is_elementwise:
        cause = "it multiplies by a factor for each element, and blur and shrinking mix elements"
        raise ConfigError("METHOD", "'product'", cause, "Use 'mmps' or 'pigdm'")


@torch.inference_mode(False)
@torch.no_grad()
def restore(
    model: Diffusion,
    degradation: Degradation,
    image: Tensor,
    n: int,
    method: str = "mmps",
    seed: int = 0,
    num_steps: int | None = None,
    batch: int = 16,
    floor: float = 0.0,
    progress: Callable[[int], None] | None = None,
    cond: Condition | None = None,
) -> Tensor:
    """n samples of x given y, as data values (n, *item_shape); the noise of item i depends on (seed, i) alone.

    ``image`` (*S B shape) in the units of x; the part that the mask hides is not read. ``method`` is one of
    `RESTORATION_METHODS`; ``num_steps`` is by default `RESTORATION_STEPS`, or the length of a shorter chain. ``floor``
    is added to the noise in quadrature, such as that of rounding. If the degradation is inpainting, the known values
    of the samples are those of the image. ``progress`` is called with the number of item-steps done. ``cond`` holds
    the condition of each of the n items. Raises `ConfigError` and `NonFiniteError`.
    """
    check_method(model, degradation, method)
    check_counts(n=(n, 1), batch=(batch, 1), seed=(seed, 0))
    image = check_items("image", image[None], degradation.full_operator.out_shape).to(model.device, model.dtype)
    cond = None if cond is None else model.prepare_condition(cond, n)
    solver, levels = _solver_and_levels(model, degradation, image, method, num_steps, floor)
    parts = []
    for first in range(0, n, batch):
        items = range(first, min(first + batch, n))
        own = model.denoiser() if method in SOLVER_METHODS else in_float32(model.denoiser())
        denoise = ConditionedDenoiser(own, cond and cond.take(slice(items.start, items.stop)))
        if method not in SOLVER_METHODS:
            denoise = RESTORATION_METHODS[method](denoise, _observation(model, degradation, image, floor))
        noise = ItemNoise(seed, items, model.x_shape, device=model.device)
        start = prior_sample(levels[0], noise(1)[0].to(model.dtype))
        steps = in_evaluation_mode(trajectory(model.clip(denoise), solver, levels, start, noise), model)
        last = last_step(steps, partial(progress, len(items)) if progress else None)
        x = check_finite(rescale(last.x, last.level), items.start)
        parts.append(model.transform.decode(x) if isinstance(model.transform, LatentTransform) else x)
    x = torch.cat(parts)
    if degradation.is_inpainting and degradation.known is not None:
        x = torch.where(degradation.known.to(x.device), image, x)
    return values_transform(model.transform).to_data(x).cpu()


def _solver_and_levels(
    model: Diffusion, degradation: Degradation, image: Tensor, method: str, num_steps: int | None, floor: float
) -> tuple[Solver, list[NoiseLevel]]:
    """Ancestral sampling in ``num_steps`` steps, for repaint with the known part of ``image`` and with jumps back.

    For product each step is multiplied by the factor of ``image`` and its noise.
    """
    sampler = Sampler("ancestral", _steps(model, num_steps))
    solver, levels = model.build_solver(sampler), model.noise_levels(sampler)
    if method == "product":
        factor = element_factor(degradation, image, floor)
        return RESTORATION_METHODS["product"](factor=factor, variance=model.config.variance), levels
    if method != "repaint" or degradation.known is None:
        return solver, levels
    repaint = RESTORATION_METHODS["repaint"](image, degradation.known.to(image.device), solver)
    return repaint, resampling_levels(levels, JUMP_LENGTH, JUMP_REPEATS)


def element_factor(degradation: Degradation, image: Tensor, floor: float = 0.0) -> Factor:
    """The factor of `Product` for y = x + noise where known: the known values themselves if it is inpainting.

    ``image`` (1, *shape), in the units of x; ``floor`` as in `restore`.
    """
    known = torch.ones_like(image, dtype=torch.bool) if degradation.known is None else degradation.known
    std = 0.0 if degradation.is_inpainting else math.hypot(degradation.noise_std, floor)
    log_var = torch.where(known.to(image.device), 2 * math.log(std) if std else -math.inf, math.inf)
    return observation_factor(image, log_var.to(image).expand(image.shape))


def _observation(model: Diffusion, degradation: Degradation, image: Tensor, floor: float) -> Observation:
    operator = degradation.operator
    if isinstance(model.transform, LatentTransform):
        operator = DecodedOperator(operator, model.transform.decode, model.x_shape)
    return Observation(operator, degradation.observe(image), math.hypot(degradation.noise_std, floor))


def data_residual(model: Diffusion, degradation: Degradation, image: Tensor, values: Tensor) -> Tensor:
    """√mean (y − M S B x)² of each of ``values`` (n, *item_shape), (n,): that of noise and rounding if they fit."""
    x = values_transform(model.transform).to_model(values)
    return (degradation.operator(x) - degradation.observe(image[None])).flatten(1).square().mean(1).sqrt()


def default_method(degradation: Degradation, latent: bool = False) -> str:
    """The method that was most accurate in the measurements of docs/inverse.md; of latents one with few decodings."""
    return "pigdm" if degradation.blur and not latent else "mmps"


def _steps(model: Diffusion, num_steps: int | None) -> int:
    return min(RESTORATION_STEPS, model.chain_length) if num_steps is None else num_steps


def num_steps_of(model: Diffusion, method: str, num_steps: int | None = None) -> int:
    """The number of steps of `restore` for one item, jumps back included."""
    levels = model.noise_levels(Sampler(num_steps=_steps(model, num_steps)))
    return len(resampling_levels(levels, JUMP_LENGTH, JUMP_REPEATS) if method == "repaint" else levels) - 1


def check_image_model(model: Diffusion, where: str | Path) -> IntegerLevels:
    """The transform of a model of grey or RGB images. Raises `ConfigError` for ``where`` if it is another model."""
    channels, *sides = model.item_shape
    transform = values_transform(model.transform)
    if not isinstance(transform, IntegerLevels) or len(sides) != 2 or channels not in (1, 3):
        shape = "x".join(map(str, model.item_shape))
        fix = "Use a run that was trained on images"
        raise ConfigError("NOT_IMAGES", where, f"its items are {shape}, not grey or RGB images", fix)
    if "image" in model.condition_sizes:
        cause = "it is a super-resolution model, whose images need smaller ones"
        raise ConfigError("CASCADE", where, cause, "Use a run that was trained without --from")
    return transform
