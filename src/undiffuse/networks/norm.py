"""Group and layer norm for feature maps, which keep the dtype of their input under autocast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def num_groups_for(width: int) -> int:
    """The largest divisor of ``width`` up to 32 with at least four channels a group, or 1."""
    return max(n for n in range(1, 33) if width % n == 0 and n <= max(width // 4, 1))


class GroupNorm(nn.GroupNorm):
    """(h − mean)/√(var + eps) · weight + bias, moments over each group's channels and positions.

    The kernel sums in float32 for every dtype; the result has h's dtype, also under autocast. ``groups`` is by default
    chosen by the width.
    """

    def __init__(self, width: int, groups: int = 0, eps: float = 1e-6) -> None:
        super().__init__(groups or num_groups_for(width), width, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class LayerNorm(nn.LayerNorm):
    """(h − mean)/√(var + 1e-6) · weight + bias, moments over the channels of each position.

    The kernel is fast on channels-last memory, which is also the faster layout of convolutions on a CPU.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input.movedim(1, -1), self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


NORMS: dict[str, Callable[[int], nn.Module]] = {"group": GroupNorm, "layer": LayerNorm}


def to_fast_layout(network: nn.Module) -> nn.Module:
    """``network``, with channels-last weights if it has 2-D convolutions and is on a GPU or has a `LayerNorm`.

    On a CPU group norms lose more by it than the convolutions gain.
    """
    convolutions = any(isinstance(module, nn.Conv2d) for module in network.modules())
    layer_norms = any(isinstance(module, LayerNorm) for module in network.modules())
    if convolutions and (layer_norms or next(network.parameters()).device.type == "cuda"):
        return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return network
