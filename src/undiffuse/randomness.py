"""Randomness is an argument: every random number is a function of a key, and no generator is ever stored.

Sampling and evaluation have one generator an item, from (seed, purpose, item), so an item's noise is the
same in any batch and on any number of processes. Training has one a step, from (seed, purpose, step).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Noise = Callable[[int], Tensor]
"""noise(draws) gives the next standard normal numbers of a batch, (draws, B, ...)."""


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A generator of this key's numbers, on the CPU; keys that differ anywhere give unrelated numbers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class ItemNoise:
    """Noise with one generator an item: ``noise(draws)`` is (draws, B, *shape), on ``device``.

    Two batches that hold an item give it bit-identical numbers, whatever else they hold.
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

    def __call__(self, draws: int) -> Tensor:
        if draws == 0:
            return torch.empty(0, len(self.generators), *self.shape, device=self.device, dtype=self.dtype)
        items = [torch.randn(draws, *self.shape, generator=g, dtype=self.dtype) for g in self.generators]
        return torch.stack(items, dim=1).to(self.device)
