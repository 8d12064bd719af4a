"""Random mirror images and translations of training items; validation and test items are never changed."""

from __future__ import annotations

import numpy as np
import torch

from undiffuse.errors import ConfigError
from undiffuse.model.config import TrainConfig
from undiffuse.process.seeded_noise import generator, uniform

FLIPS = {"flip": -1, "flip_vertical": -2}
"""The settings that mirror items, and their axes."""


def check_augmentation(settings: TrainConfig, item_shape: tuple[int, ...]) -> None:
    """Raise `ConfigError` if items of this shape cannot be mirrored or translated as ``settings`` require."""
    size = item_shape[1:]
    for name in FLIPS:
        if getattr(settings, name) and len(size) != 2:
            raise ConfigError("FLIP", f"train.{name}", "only images can be mirrored", "Set it to false for these data")
    if settings.crop and settings.crop >= min(size, default=1):
        cause = f"items of size {'x'.join(map(str, size)) or 'none'} cannot be moved so far"
        fix = "Give less than the shortest side, or 0"
        raise ConfigError("CROP", f"train.crop = {settings.crop}", cause, fix)


def mirrored(name: str, settings: TrainConfig, step: int, batch: int) -> np.ndarray:
    """Which items of the batch of a step are mirrored by the setting ``name``, (batch,) bool."""
    return (uniform(batch, generator(settings.seed, name, step)) < 0.5).numpy()


def augment(values: np.ndarray, settings: TrainConfig, step: int) -> np.ndarray:
    """``values`` (B, C, *size), each item mirrored and translated at random; a function of (seed, purpose, step).

    ``flip`` exchanges left and right with probability 1/2, ``flip_vertical`` top and bottom. ``crop`` = k pads each
    item by k cells of its reflection and crops it back: a translation by −k … k along each axis.
    """
    batch, dims = len(values), values.ndim - 2
    for name, axis in FLIPS.items():
        if getattr(settings, name):
            chosen = mirrored(name, settings, step, batch).reshape(-1, *[1] * (dims + 1))
            values = np.where(chosen, np.flip(values, axis), values)
    if k := settings.crop:
        shift = torch.randint(-k, k + 1, (dims, batch), generator=generator(settings.seed, "crop", step)).numpy()
        for axis in range(dims):
            n = values.shape[axis + 2]
            indices = n - 1 - np.abs(n - 1 - np.abs(np.arange(n) + shift[axis, :, None]))
            indices = indices.reshape(batch, 1, *[n if other == axis else 1 for other in range(dims)])
            values = np.take_along_axis(values, indices, axis + 2)
    return values
