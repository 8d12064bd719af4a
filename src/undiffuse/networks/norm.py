"""Group normalisation that picks its own groups and leaves the dtype alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def groups_of(width: int) -> int:
    """The largest divisor of ``width`` up to 32 that leaves four channels a group, where one can."""
    return max(n for n in range(1, 33) if width % n == 0 and n <= max(width // 4, 1))


class GroupNorm(nn.GroupNorm):
    """(h − mean)/√(var + 1e-6) · weight + bias, moments over each group's channels and positions.

    The kernel sums in float32 whatever h is; the result keeps h's dtype also where autocast would widen it.
    """

    def __init__(self, width: int) -> None:
        super().__init__(groups_of(width), width, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)
