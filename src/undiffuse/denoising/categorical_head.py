"""A head for integer data: the network returns the probability of each value, and Bayes' rule returns x̂."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import DataStatistics, blocks

LOGIT_FEATURES = 24
"""Outputs of the network for each element; `CategoricalHead` maps them linearly to the logits of all values."""
MAX_VALUES = 1024
"""The most values that data may have."""
CHUNK_ELEMENTS = (2**27, 2**18)
"""Elements times values in a chunk, on a GPU and on a CPU (where a chunk fits into the cache)."""


class CategoricalHead(nn.Module):
    """x̂ = Σ_k v_k softmax_k(logits_k − (x_t − alpha v_k)²/(2 sigma²)), of x_t's shape, float32 at least.

    The mean of x given x_t, where x is one of the ``num_values`` values v_k = −1 … 1 and the logits of the ``network``
    are their prior given the neighbours of the element. Near the clean end it rounds, as the exact mean does, without
    having to learn that. The network returns `LOGIT_FEATURES` channels for each channel of x, from which the logits are
    linear; further channels (a learned variance) are returned after x̂.
    """

    def __init__(self, network: nn.Module, channels: int, num_values: int) -> None:
        super().__init__()
        self.network, self.channels, self.num_values = network, channels, num_values
        k = torch.arange(num_values)
        waves = torch.cos(math.pi * torch.outer(torch.arange(LOGIT_FEATURES - 2), (k + 0.5) / num_values))
        ends = torch.stack([k == 0, k == num_values - 1]).float()
        self.weight = nn.Parameter(torch.cat([waves, ends]).repeat(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, num_values))

    @torch.no_grad()
    def init_from_counts(self, counts: Tensor) -> None:
        """Sets the bias to the log-frequencies of the values, from their ``counts`` (channels, values) in the data."""
        frequency = (counts.double() + 1) / (counts.double() + 1).sum(1, keepdim=True)
        self.bias.copy_(frequency.log()[:, None])

    def init_statistics(self, statistics: DataStatistics) -> None:
        self.init_from_counts(statistics.counts)

    def blocks(self) -> list[nn.Module]:
        return blocks(self.network)

    def forward(
        self,
        scaled: Tensor,
        time: Tensor,
        cond: Condition | None,
        x_t: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        values: Tensor | None = None,
    ) -> Tensor:
        """(x̂, further channels of the network) from its own inputs, and x_t (B, C, ...) with its level's scales.

        With ``values`` (B, C, ...), the integers k of x, the result is log p(x given x_t), of x_t's shape and dtype:
        the logarithm of the softmax at k.
        """
        y = self.network(scaled, time, cond).to(torch.promote_types(scaled.dtype, torch.float32))
        features, rest = y[:, : self.channels * LOGIT_FEATURES], y[:, self.channels * LOGIT_FEATURES :]
        features = features.reshape(x_t.shape[0], self.channels, LOGIT_FEATURES, -1).transpose(2, 3)
        dtype = torch.promote_types(x_t.dtype, features.dtype)
        x_t_columns = x_t.to(dtype).reshape(x_t.shape[0], self.channels, -1, 1)
        alpha, sigma = (scale.reshape(-1, 1, 1, 1).expand(x_t.shape[0], 1, 1, 1) for scale in (alpha, sigma))
        inputs, function = [features, x_t_columns, alpha, sigma], self._mean
        if values is not None:
            inputs, function = [*inputs, values.reshape(x_t_columns.shape)], self._log_prob
        size = max(1, CHUNK_ELEMENTS[x_t.device.type == "cpu"] // (x_t_columns[0].numel() * self.num_values))
        with torch.autocast(x_t.device.type, enabled=False):
            if torch.compiler.is_exporting():  # a graph for any batch cannot depend on the number of parts
                result = function(*inputs)
            else:
                result = torch.cat([function(*p) for p in zip(*(part.split(size) for part in inputs), strict=True)])
        result = result.reshape(x_t.shape)
        return torch.cat([result, rest], 1) if values is None else result

    def _logits(self, features: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_k − (x_t − alpha v_k)²/(2 sigma²), v) in x_t's dtype, with the values in the last dimension."""
        k, largest = torch.arange(self.num_values, device=x_t.device).to(x_t), self.num_values - 1
        v = (2 * k - largest) / largest
        logits = F.pad(features, (0, 1), value=1.0) @ torch.cat([self.weight, self.bias], 1).to(features)
        off = x_t / sigma - alpha / sigma * v
        return torch.addcmul(logits.to(off), off, off, value=-0.5), v

    def _mean(self, *inputs: Tensor) -> Tensor:
        """The mean; values whose probability is below √(smallest normal number) of the largest one count as 0.

        Their products with a gradient would be denormal numbers, with which some processors are several times slower.
        """
        logits, v = self._logits(*inputs)
        with torch.no_grad():  # the softmax and its gradient are the same after a shift, and 0 at −∞
            logits -= logits.amax(-1, keepdim=True)
            torch.threshold_(logits, 0.5 * math.log(torch.finfo(logits.dtype).tiny), -math.inf)
        return torch.softmax(logits, -1) @ v

    def _log_prob(self, features: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, values: Tensor) -> Tensor:
        logits, _ = self._logits(features, x_t, alpha, sigma)
        return torch.log_softmax(logits, -1).gather(-1, values)
