"""Feature extractors by name, built from the training part. The table `EXTRACTORS` can be read without torch.

None of them is the Inception network, so numbers are comparable only with others of the same extractor, data and n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from undiffuse.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

MAX_RAW_DIMS = 64
"""Items of at most so many values are compared by the values themselves, unless another extractor is named."""
MAX_COMPONENTS = 64
MAX_FIT_ITEMS = 2000
"""Training items from which an extractor is built, at most."""
CONV_WIDTHS = (32, 64, 128)
CONV_SEED = 0
CONV_BATCH = 256

Features = Callable[["Tensor"], "Tensor"]
"""(N, *item_shape) in model units to rows (N, D), float64."""


class Extractor(NamedTuple):
    """``build`` makes the features from some training items (M, *item_shape) in model units.

    ``fitted``: the features depend on these items, which therefore must not be among the compared ones.
    """

    description: str
    build: Callable[[Tensor], Features]
    fitted: bool = False


def raw(train: Tensor) -> Features:
    """The values themselves, scaled as for the model: integers and ranges to [−1, 1], others standardized."""
    return lambda x: x.flatten(1).double()


def pca(train: Tensor) -> Features:
    """Coordinates (x − mean) V along the first principal components V of ``train``, at most `MAX_COMPONENTS`."""
    mean, axes = principal_components(train.flatten(1).double())
    return lambda x: (x.flatten(1).double() - mean) @ axes


def principal_components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (D,), V (D, K)) of ``rows`` (M, D): the first principal components, at most `MAX_COMPONENTS`."""
    import torch

    mean = rows.mean(0)
    return mean, torch.linalg.svd(rows - mean, full_matrices=False).Vh[:MAX_COMPONENTS].mT


def random_conv(train: Tensor) -> Features:
    """Means and standard deviations over space of the channels of a random convolutional network, as in [Naeem20 §3.3].

    Three 3 × 3 convolutions of stride 2 with He-normal weights from a fixed seed and ReLU: local textures, without any
    training and without a download. It knows no objects. For items with at least one spatial dimension.
    """
    import torch
    from torch.nn import functional

    dims = train.ndim - 2
    if dims < 1:
        cause = "random_conv needs images, volumes or sequences"
        raise ConfigError("FEATURES", "--features random_conv", cause, "Use raw or pca")
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[dims]
    g, weights, channels = torch.Generator().manual_seed(CONV_SEED), [], train.shape[1]
    for width in CONV_WIDTHS:
        weight = torch.randn(width, channels, *(3,) * dims, generator=g, dtype=torch.float32)
        weights.append(weight * math.sqrt(2 / (channels * 3**dims)))
        channels = width

    def features(x: Tensor) -> Tensor:
        parts = []
        for h in x.float().split(CONV_BATCH):
            pooled = []
            for weight in weights:
                h = convolve(h, weight, stride=2, padding=1).relu()
                flat = h.flatten(2)
                pooled += [flat.mean(2), flat.std(2, correction=0)]
            parts.append(torch.cat(pooled, 1).double())
        return torch.cat(parts)

    return features


EXTRACTORS: dict[str, Extractor] = {
    "raw": Extractor("the values, scaled", raw),
    "pca": Extractor(f"at most {MAX_COMPONENTS} principal components of the training part", pca, fitted=True),
    "random_conv": Extractor("a fixed random convolutional network (not Inception)", random_conv),
}


def default_extractor(item_shape: tuple[int, ...]) -> str:
    """ "raw" for items of at most `MAX_RAW_DIMS` values, "pca" for larger ones."""
    return "raw" if math.prod(item_shape) <= MAX_RAW_DIMS else "pca"


def get_extractor(name: str) -> Extractor:
    """The extractor called ``name``. Raises `ConfigError`."""
    if name not in EXTRACTORS:
        fix = f"Use one of {', '.join(EXTRACTORS)}"
        raise ConfigError("FEATURES", f"--features {name}", "no such extractor", fix)
    return EXTRACTORS[name]
