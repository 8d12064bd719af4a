"""Normalisation that picks its own groups and leaves the dtype alone."""

from __future__ import annotations

from collections.abc import Callable

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


class LayerNorm(nn.LayerNorm):
    """(h − mean)/√(var + 1e-6) · weight + bias, moments over the channels of each position.

    Its kernel is fast where the channels lie together (channels last), which convolutions on a processor like too.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


NORMS: dict[str, Callable[[int], nn.Module]] = {"group": GroupNorm, "layer": LayerNorm}


def in_fast_layout(network: nn.Module) -> nn.Module:
    """``network`` with the channels of its images' weights last, where that is faster: on a GPU, and with `LayerNorm`.

    On a processor group norms lose more by it than the convolutions gain.
    """
    images = any(isinstance(module, nn.Conv2d) for module in network.modules())
    likes = any(isinstance(module, LayerNorm) for module in network.modules())
    if images and (likes or next(network.parameters()).device.type == "cuda"):
        return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network
