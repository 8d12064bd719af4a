"""What a run may do to the items that it trains on, and to no others: mirror them and move them a little."""

from __future__ import annotations

import numpy as np
import torch

from undiffuse.config import TrainConfig
from undiffuse.errors import ConfigError
from undiffuse.randomness import generator


def check(settings: TrainConfig, item_shape: tuple[int, ...]) -> None:
    """Raise `ConfigError` where the items cannot be mirrored or moved as the settings say."""
    size = item_shape[1:]
    for name in ("flip", "flip_vertical"):
        if getattr(settings, name) and len(size) != 2:
            raise ConfigError("FLIP", f"train.{name}", "only images can be mirrored", "Set it to false for these data")
    if settings.crop and settings.crop >= min(size, default=1):
        cause = f"items of size {'x'.join(map(str, size)) or 'none'} cannot be moved so far"
        fix = "Give less than the shortest side, or 0"
        raise ConfigError("CROP", f"train.crop = {settings.crop}", cause, fix)


def augmented(values: np.ndarray, settings: TrainConfig, step: int) -> np.ndarray:
    """``values`` (B, C, *size) as the step sees them: each mirrored or not, and moved; from (seed, purpose, step).

    ``flip`` turns left and right about with probability 1/2, ``flip_vertical`` top and bottom. ``crop`` = k cuts each
    item out of itself with k cells of its mirror image on every side, anywhere: it moves by −k … k along each axis.
    """
    batch, dims = len(values), values.ndim - 2
    for name, axis in (("flip", -1), ("flip_vertical", -2)):
        if getattr(settings, name):
            mirrored = torch.rand(batch, generator=generator(settings.seed, name, step)) < 0.5
            values = np.where(mirrored.numpy().reshape(-1, *[1] * (dims + 1)), np.flip(values, axis), values)
    if k := settings.crop:
        by = torch.randint(-k, k + 1, (dims, batch), generator=generator(settings.seed, "crop", step)).numpy()
        for axis in range(dims):
            n = values.shape[axis + 2]
            places = n - 1 - np.abs(n - 1 - np.abs(np.arange(n) + by[axis, :, None]))
            places = places.reshape(batch, 1, *[n if other == axis else 1 for other in range(dims)])
            values = np.take_along_axis(values, places, axis + 2)
    return values
