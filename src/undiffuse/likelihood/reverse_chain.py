"""The reverse process of a denoiser, which every bound of a chain evaluates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser, Prediction
from undiffuse.networks.condition import Condition
from undiffuse.process.gaussian import Gaussian, Variance, reverse
from undiffuse.process.noise_level import NoiseLevel


@dataclass(frozen=True)
class ReverseChain:
    """The steps p(x_s given x_t) of a denoiser between ``noise_levels``, which go from noise to data.

    ``variance`` is ``"small"``, ``"large"``, ``"learned"`` or a function of (t, s), and ``first_large`` the large
    variance of the step that ends in data, ``"beta"`` or ``"clipped"``; see `reverse`. ``cond`` is the condition of
    the batch.
    """

    denoise: Denoiser
    noise_levels: Sequence[NoiseLevel]
    variance: Variance = "small"
    cond: Condition | None = None
    first_large: str = "beta"

    def step(self, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, dtype: torch.dtype | None = None) -> Gaussian:
        """p(x_s given x_t) = N(μ(x̂, x_t, t, s), Σ(t, s)) [Ho20 eq. 1], in ``x_t``'s dtype.

        ``x_t`` (B, ...); ``s`` is cleaner than ``t``. The denoiser gets x_t as ``dtype``, by default unchanged.
        """
        prediction = self.denoise(x_t.to(dtype or x_t.dtype), t, self.cond, s)
        prediction = Prediction(*(None if part is None else part.to(x_t) for part in prediction))  # type: ignore[arg-type]
        return reverse(prediction, x_t, t, s, self.variance, self.first_large)
