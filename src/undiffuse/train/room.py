"""Whether a training fits into memory, asked before it begins: a system that runs short kills without a word."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from undiffuse.config import TrainConfig
from undiffuse.data.memory import available
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.train.predict import memory

NUMBER = 4 * 4
"""Bytes of each number of a batch: the value, two noises and what the network says."""


class Held(TorchDispatchMode):
    """Sees every operation, forward and backward, and counts the bytes of what they made and is still held.

    ``most`` is the largest count so far; past ``limit`` it raises `MemoryError`. Libraries' workspaces are not seen.
    """

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.limit, self.now, self.most = limit, 0, 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)):
            if storage._cdata not in self.known | given:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        if self.most > self.limit:
            raise MemoryError

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def activations(diffusion: Diffusion, limit: float = float("inf")) -> int:
    """Bytes that one item of a pass takes while its loss and gradient are computed, measured on an item of zeros.

    A pass of n items takes n times as many. Nothing random or trained is touched. Raises `MemoryError` past ``limit``.
    """
    noise = torch.zeros(1, *diffusion.item_shape, device=diffusion.device)
    values = diffusion.codec.decode(noise)
    with torch.random.fork_rng(devices=[]), Held(limit) as held:
        loss = diffusion.loss(values, torch.full((1,), 0.5), noise, noise).sum()
        torch.autograd.grad(loss, list(diffusion.parameters()), allow_unused=True)
    return held.most


def require_room(diffusion: Diffusion, settings: TrainConfig, processes: int = 1) -> None:
    """Raises `ConfigError` where weights, batch and activations need more memory than there is.

    On another device than the CPU only the batch is asked for: it is made here.
    """
    here = diffusion.device.type == "cpu"
    weights = memory(sum(p.numel() for p in diffusion.parameters())) if here else 0
    batch = NUMBER * settings.batch * diffusion.dims
    _refuse(settings, weights, batch, "Give a smaller batch")
    if here:
        items = -(-settings.batch // processes // settings.accumulate)
        left = available() - weights
        try:
            each = activations(diffusion, left)
        except MemoryError:
            each = left + 1  # or more
        fix = "Give a smaller batch, more passes (train.accumulate) or a smaller network"
        _refuse(settings, weights, batch + items * each, fix)


def _refuse(settings: TrainConfig, weights: float, items: float, fix: str) -> None:
    if weights + items > available():
        where = f"train.batch = {settings.batch:,}" if items > weights else "model.network"
        cause = f"training needs at least {(weights + items) / 1e9:,.1f} GB of memory, and {available() / 1e9:,.1f} GB"
        fix = fix if items > weights else "Give a smaller network"
        raise ConfigError("CONFIG", where, f"{cause} may be used here", fix)
