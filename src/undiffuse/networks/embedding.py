"""What a network knows beside x: the time (any real number) and, where it hears them, a label and a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.conditioning import Condition


def sinusoids(time: Tensor, width: int) -> Tensor:
    """(n, width) = [sin(f time), cos(f time)], f = 10000^(−j/(width/2 − 1)), j = 0 … width/2 − 1 [Ho20].

    The slow half tells integer steps in the thousands apart, the fast half log-SNR and its like. Never below
    float32: in bfloat16 the steps 999 and 1000 are one number.
    """
    half = width // 2
    time = time if time.dtype == torch.float64 else time.float()
    rate = -math.log(10_000) / max(half - 1, 1)
    angle = time.reshape(-1, 1) * torch.exp(rate * torch.arange(half, device=time.device, dtype=time.dtype))
    return torch.cat([angle.sin(), angle.cos()], 1)


class Vector(nn.Module):
    """(B or 1, width) W₂ SiLU(W₁ (vector − mean)/std), and a row of its own for a vector with NaN or for none at all.

    ``mean`` and ``std`` are 0 and 1 until `start_from` says what the data's are.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.rise = nn.Linear(size, width)
        self.mix = nn.Linear(width, width)
        self.null = nn.Parameter(torch.randn(1, width))

    def start_from(self, mean: Tensor, std: Tensor) -> None:
        """Before any training, takes the moments (size,) of the data's vectors."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, vector: Tensor | None) -> Tensor:
        if vector is None:
            return self.null
        known = ~vector.isnan().any(1, keepdim=True)
        inner = torch.where(known, (vector.to(self.mean.dtype) - self.mean) / self.std, 0.0)
        return torch.where(known, self.mix(F.silu(self.rise(inner))), self.null)


class Embedding(nn.Module):
    """(B or 1, width) SiLU of what the blocks are told: an MLP of the time's sinusoids, plus the label's row, `Vector`.

    Row 0 is the null class (label −1), and where no label comes at all it is the row that is taken. What a
    network does not hear (``classes`` or ``vector`` 0) is not looked at.
    """

    def __init__(self, features: int, width: int, classes: int, vector: int = 0) -> None:
        super().__init__()
        self.features = features
        self.rise = nn.Linear(features, width)
        self.mix = nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.vector = Vector(vector, width) if vector else None

    def forward(self, time: Tensor, cond: Condition | None) -> Tensor:
        with torch.autocast(time.device.type, enabled=False):  # a few rows: exactness here costs nothing
            told = sinusoids(time, self.features).to(self.rise.weight.dtype)
            told = self.mix(F.silu(self.rise(told)))
            if self.vector is not None:
                told = told + self.vector(cond.vector if cond is not None else None)
        if self.label is not None:
            label = cond.label if cond is not None else None
            told = told + self.label(told.new_zeros(1, dtype=torch.int64) if label is None else label + 1)
        return F.silu(told)
