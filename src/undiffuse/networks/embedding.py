"""The embedding of the time (any real number) and, where a network accepts them, of a label, a vector, a level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import DataStatistics


def sinusoids(time: Tensor, width: int, longest: float = 10_000) -> Tensor:
    """(n, width) = [sin(f time), cos(f time)], f = ``longest``^(−j/(width/2 − 1)), j = 0 … width/2 − 1 [Ho20].

    The low frequencies distinguish integer steps in the thousands, the high ones values such as log-SNR. Never below
    float32: in bfloat16 the steps 999 and 1000 are equal.
    """
    half = width // 2
    time = time if time.dtype == torch.float64 else time.float()
    rate = -math.log(longest) / max(half - 1, 1)
    angle = time.reshape(-1, 1) * torch.exp(rate * torch.arange(half, device=time.device, dtype=time.dtype))
    return torch.cat([angle.sin(), angle.cos()], 1)


MAX_IMAGE_LEVEL = 10.0
"""Log-SNRs of conditioning images are clamped to ± this; the noise is then below 0.7 % of black to white, or all."""


class VectorEmbedding(nn.Module):
    """(B or 1, width) W₂ SiLU(W₁ (vector − mean)/std), a learned row for a vector with NaN and without a vector.

    ``mean`` and ``std`` are 0 and 1 until `init_moments`.
    """

    zero_ends = ("fc2.weight", "fc2.bias", "null")
    mean: Tensor
    std: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.fc1 = nn.Linear(size, width)
        self.fc2 = nn.Linear(width, width)
        self.null = nn.Parameter(torch.randn(1, width))

    def init_moments(self, mean: Tensor, std: Tensor) -> None:
        """Sets the moments (size,) of the training data's vectors. Before any training."""
        self.mean.copy_(mean)
        self.std.copy_(std)

    def init_statistics(self, statistics: DataStatistics) -> None:
        if moments := statistics.vector_moments:
            self.init_moments(*moments)

    def forward(self, vector: Tensor | None) -> Tensor:
        if vector is None:  # through the same operations, because DDP expects a gradient of every weight
            vector = self.mean.new_full((1, len(self.mean)), math.nan)
        given = ~vector.isnan().any(1, keepdim=True)
        h = torch.where(given, (vector.to(self.mean.dtype) - self.mean) / self.std, 0.0)
        return torch.where(given, self.fc2(F.silu(self.fc1(h))), self.null)


class EndTimeEmbedding(nn.Module):
    """(B, width) E(end) − E(time), E(t) = W₂ SiLU(W₁ sinusoids(t)), W₂ = 0 at initialization; 0 where end = time."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.fc1 = nn.Linear(features, width)
        self.fc2 = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, time: Tensor, end: Tensor) -> Tensor:
        at_time, at_end = (F.silu(self.fc1(sinusoids(t, self.features).to(self.fc1.weight.dtype))) for t in (time, end))
        return self.fc2(at_end - at_time)


class ConditionEmbedding(nn.Module):
    """(B or 1, width) SiLU(MLP(sinusoids(time)) + row of the label + `VectorEmbedding`), which conditions the blocks.

    ``pooled`` (B, width), that of a text, is one more term. Row 0 is the null class (label −1), which is also used
    without a label. A condition of size 0 (``classes`` or ``vector``) is ignored. With ``image`` the log-SNR of the
    conditioning image enters the MLP beside the time; without an image it is the lowest one. With ``two_times`` the
    `EndTimeEmbedding` of a condition's end time is added. ``waves`` maps the time and ``features`` to (n, features);
    ``activation`` is that of the MLP. With ``label_first`` the rows of the labels (features) are added to the waves.
    """

    zero_ends = ("label.weight", "image_level.weight", "image_level.bias")

    def __init__(
        self,
        features: int,
        width: int,
        classes: int,
        vector: int = 0,
        image: int = 0,
        two_times: bool = False,
        waves: Callable[[Tensor, int], Tensor] = sinusoids,
        activation: Callable[[Tensor], Tensor] = F.silu,
        label_first: bool = False,
    ) -> None:
        super().__init__()
        self.features, self.waves, self.activation, self.label_first = features, waves, activation, label_first
        self.fc1 = nn.Linear(features, width)
        self.fc2 = nn.Linear(width, width)
        self.label = nn.Embedding(classes + 1, features if label_first else width) if classes else None
        self.vector = VectorEmbedding(vector, width) if vector else None
        self.image_level = nn.Linear(features, width) if image else None
        self.end = EndTimeEmbedding(features, width) if two_times else None

    def forward(self, time: Tensor, cond: Condition | None, pooled: Tensor | None = None) -> Tensor:
        with torch.autocast(time.device.type, enabled=False):  # a few rows: full precision costs nothing here
            h = self.waves(time, self.features).to(self.fc1.weight.dtype)
            if self.label_first:
                h = self._add_label(h, cond)
            h = self.fc1(h)
            if self.image_level is not None:
                level = cond.image_level if cond is not None else None
                level = time.new_full((1,), -math.inf) if level is None else level
                level = level.clamp(-MAX_IMAGE_LEVEL, MAX_IMAGE_LEVEL)
                h = h + self.image_level(sinusoids(level, self.features).to(h.dtype))
            h = self.fc2(self.activation(h))
            if self.vector is not None:
                h = h + self.vector(cond.vector if cond is not None else None)
            if self.end is not None and cond is not None and cond.end_time is not None:
                h = h + self.end(time, cond.end_time)
            if pooled is not None:
                h = h + pooled.to(h.dtype)
        return F.silu(h if self.label_first else self._add_label(h, cond))

    def _add_label(self, h: Tensor, cond: Condition | None) -> Tensor:
        if self.label is None:
            return h
        label = cond.label if cond is not None else None
        return h + self.label(h.new_zeros(1, dtype=torch.int64) if label is None else label + 1)

    def adapt_weights(self, weights: Mapping[str, Tensor], label_rows: Sequence[int] | None) -> dict[str, Tensor]:
        """The rows of the labels in the order of the classes here; a new class starts as the null class."""
        if self.label is None or label_rows is None or "label.weight" not in weights:
            return dict(weights)
        return {**weights, "label.weight": weights["label.weight"][[0, *(row + 1 for row in label_rows)]]}
