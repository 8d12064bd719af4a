"""Networks y(x, time, cond): they know nothing of diffusion, only of shapes, a real number and a condition."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from undiffuse.data.memory import available
from undiffuse.networks.check import require
from undiffuse.networks.mlp import MLP
from undiffuse.networks.unet import UNet

__all__ = ["MLP", "NETWORKS", "UNet", "build"]

COPIES = 2
"""Of its weights, that no use of a network does without."""
NETWORKS: dict[str, type[nn.Module]] = {"unet": UNet, "mlp": MLP}


def build(kind: str, **settings) -> nn.Module:
    """The network of that ``kind`` with those settings; ``ConfigError`` for a kind or setting there is not."""
    require(kind in NETWORKS, "kind", f"there is no network {kind!r}", f"Choose {' or '.join(NETWORKS)}")
    known = list(inspect.signature(NETWORKS[kind]).parameters)
    unknown = next((name for name in settings if name not in known), None)
    require(
        unknown is None,
        str(unknown),
        f"a network of kind {kind!r} has no such setting",
        f"Choose from {', '.join(known)}",
    )
    require("channels" in settings, "channels", "missing", "Give the number of channels of the data")
    with torch.device("meta"):  # a sketch, which has no weights
        sketch = NETWORKS[kind](**settings)
    need = COPIES * 4.0 * sum(parameter.numel() for parameter in sketch.parameters())
    wide = max(("widths", "width"), key=lambda name: name in settings)
    cause = f"its weights alone need {need / 1e9:,.0f} GB of memory, and {available() / 1e9:,.0f} GB may be used here"
    require(need <= available(), wide, cause, "Give a smaller network")
    return NETWORKS[kind](**settings)
