"""Random numbers as functions of a key (seed, purpose, index).

The noise of an item is `ItemNoise`: it depends on (seed, purpose, item) alone, so it is the same in any batch, on any
number of processes and, before the normal transform, on any device. Training draws its other numbers from one
`generator` per step, by (seed, purpose, step).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from undiffuse.runtime.device import to_device

Noise = Callable[[int], Tensor]
"""noise(n) returns the next n standard normal tensors of a batch, (n, B, ...)."""

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
CALL_VALUES = 2**15
"""Numbers that `ItemNoise` makes at once, for several calls, if a call is smaller: each operation has a fixed cost."""

BLOCK_VALUES = 2**21
"""Most numbers that `ItemNoise` computes at once: their counters and words are 64-bit integers, of several times the
memory of the numbers."""


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator for this key; different keys give unrelated numbers."""
    return torch.Generator().manual_seed(_digest(f"{seed}/{purpose}/{index}") >> 1)


def uniform(n: int, source: torch.Generator) -> Tensor:
    """n numbers in [0, 1), float32 whatever torch's default is, on which the numbers of a seed would depend."""
    return torch.rand(n, generator=source, dtype=torch.float32)


def philox(key: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Philox 4×32 with ten rounds [Salmon11]: 128 random bits for each 64-bit ``key`` and 128-bit counter.

    ``low`` and ``high``, int64 of shapes that broadcast to (...), are the counter's halves. Returns the words 0 and 2
    and the words 1 and 3, (2, ...) each, int64 from 0 to 2³² − 1: the same bits on every device.
    """
    low, high = torch.broadcast_tensors(low, high)
    even, odd = torch.stack([low & WORD, high & WORD]), torch.stack([low >> 32, high >> 32])
    multipliers, keys = _constants(key, low.ndim, low.device)
    for round_key in keys:
        product = even * multipliers  # modulo 2⁶⁴, as unsigned numbers
        even, odd = (product >> 32).flip(0).bitwise_xor_(odd).bitwise_xor_(round_key), product.flip(0)
        even &= WORD
    return even, odd & WORD


@functools.lru_cache(maxsize=8)
def _constants(key: int, ndim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The multipliers (2, 1, ...) and the key of each round (10, 2, 1, ...), for words of ``ndim`` dimensions."""
    keys = [
        [(part + r * step) & WORD for part, step in zip((key, key >> 32), KEY_STEPS, strict=True)] for r in range(10)
    ]
    ones = (1,) * ndim
    multipliers, keys = to_device(torch.tensor(MULTIPLIERS), device), to_device(torch.tensor(keys), device)
    return multipliers.view(2, *ones), keys.view(10, 2, *ones)


class ItemNoise:
    """Standard normal noise of the items ``items``: ``noise(n)`` is (n, B, *shape), on ``device``.

    An item gets bit-identical numbers in any batch. They are Box and Muller's transform of the words of `philox`, whose
    counter is the item and the position in the item's sequence; those of float32 and float64 agree up to rounding.
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
        self.key = _digest(f"{seed}/{purpose}")
        if isinstance(items, range):  # made on a GPU without a copy, for which the host would wait
            self.items = torch.arange(items.start, items.stop, items.step, device=device)
        else:
            self.items = torch.tensor([int(item) for item in items], dtype=torch.int64, device=device)
        self.shape, self.dtype, self.position = tuple(shape), dtype, 0
        self.ahead: list[Tensor] = []
        """Noise for the next calls with the same n, last call first."""

    def __call__(self, n: int) -> Tensor:
        size = n * math.prod(self.shape)
        if size == 0:  # a deterministic step
            return torch.empty(n, len(self.items), *self.shape, device=self.items.device, dtype=self.dtype)
        if not self.ahead or len(self.ahead[-1]) != n:
            again = self.position > 0  # the first call is often the only one
            self.ahead = self._draw(n, max(1, CALL_VALUES // max(1, size * len(self.items))) if again else 1)
        self.position += -(-size // 4)
        return self.ahead.pop()

    @torch.inference_mode(False)  # a later call may be outside of it
    def _draw(self, n: int, calls: int) -> list[Tensor]:
        """The noise of the next ``calls`` calls with ``n``, last call first; each starts a block of four numbers."""
        items, size, device = len(self.items), n * math.prod(self.shape), self.items.device
        length = -(-size // 4)
        total, block = length * calls, max(1, BLOCK_VALUES // (4 * max(1, items)))
        normal = torch.empty(items, 4, total, device=device, dtype=self.dtype)
        for first in range(0, total, block):
            part = slice(first, min(first + block, total))
            self._fill(normal[:, :, part], self.position + part.start)
        by_call = normal.view(items, 4, calls, length).permute(2, 0, 1, 3).flatten(2)[:, :, :size]
        return list(by_call.reshape(calls, items, n, *self.shape).transpose(1, 2).contiguous())[::-1]

    def _fill(self, normal: Tensor, position: int) -> None:
        """Sets ``normal`` (B, 4, k) to the numbers of the k counters from ``position`` on."""
        counter = torch.arange(position, position + normal.shape[2], device=normal.device)
        even, odd = philox(self.key, counter, self.items[:, None])
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        radius = even.to(real).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = odd.to(real).mul_(2 * math.pi * 2.0**-32)
        normal[:, :2] = (radius * torch.cos(angle)).transpose(0, 1)
        normal[:, 2:] = (radius * torch.sin(angle)).transpose(0, 1)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
