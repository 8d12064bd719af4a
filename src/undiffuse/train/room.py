"""Whether a training fits into memory, asked before it begins: a system that runs short kills without a word."""

from __future__ import annotations

from undiffuse.config import TrainConfig
from undiffuse.data.memory import available
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError

PARAMETER = 7 * 4
"""Bytes of a parameter: itself, its gradient, two moments, two averages and the one that is looked at."""
NUMBER = 4 * 4
"""Bytes of each number of a batch: the value, two noises and what the network says."""


def require_room(diffusion: Diffusion, settings: TrainConfig) -> None:
    """Raises `ConfigError` where weights or batch alone need more memory than there is; activations come on top.

    On another device than the CPU only the batch is asked for: it is made here.
    """
    parameters = sum(p.numel() for p in diffusion.parameters()) if diffusion.device.type == "cpu" else 0
    weights, batch = float(PARAMETER * parameters), float(NUMBER * settings.batch * diffusion.dims)
    if weights + batch > available():
        where = f"train.batch = {settings.batch:,}" if batch > weights else "model.network"
        cause = f"training needs at least {(weights + batch) / 1e9:,.1f} GB of memory, and {available() / 1e9:,.1f} GB"
        fix = "Give a smaller batch" if batch > weights else "Give a smaller network"
        raise ConfigError("CONFIG", where, f"{cause} may be used here", fix)
