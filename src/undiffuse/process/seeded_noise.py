"""Random numbers as functions of a key: no generator is ever stored.

Sampling and evaluation use one generator per item, from (seed, purpose, item), so an item's noise is the same in any
batch and on any number of processes. Training uses one per step, from (seed, purpose, step).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Noise = Callable[[int], Tensor]
"""noise(n) returns the next n standard normal tensors of a batch, (n, B, ...)."""


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator for this key; different keys give unrelated numbers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class ItemNoise:
    """Noise with one generator per item: ``noise(n)`` is (n, B, *shape), on ``device``.

    An item gets bit-identical numbers in any batch.
    """

    def __init__(
        self,
        seed: int,
        items: Iterable[int],
        shape: Sequence[int],
        purpose: str = "sample",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.generators = [generator(seed, purpose, int(item)) for item in items]
        self.shape, self.device, self.dtype = tuple(shape), device, dtype

    def __call__(self, n: int) -> Tensor:
        if n == 0:
            return torch.empty(0, len(self.generators), *self.shape, device=self.device, dtype=self.dtype)
        items = [torch.randn(n, *self.shape, generator=g, dtype=self.dtype) for g in self.generators]
        return torch.stack(items, dim=1).to(self.device)
