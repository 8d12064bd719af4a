"""Networks that name what they see: a row of numbers for each item, whose softmax is p(label|x)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse import networks
from undiffuse.conditioning import Condition
from undiffuse.networks.unet import UNet


class Encoder(nn.Module):
    """(B, labels) in x's dtype: the way down of ``unet`` and its middle, averaged over the cells, and a linear map.

    The rest of ``unet`` is dropped. Zero at initialisation [a mean where Dhariwal21 §4 attends].
    """

    def __init__(self, unet: UNet, labels: int) -> None:
        super().__init__()
        self.norm = type(unet.norm)(unet.deepest)  # pyright: ignore[reportCallIssue]
        self.leave = nn.Linear(unet.deepest, labels)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        del unet.up, unet.norm, unet.leave
        self.unet = unet

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        h = self.unet.encode(x, time, cond)[0][-1]
        return self.leave(F.silu(self.norm(h)).flatten(2).mean(2)).to(x.dtype)


def build(labels: int, *, kind: str, **settings) -> nn.Module:
    """The network of that ``kind`` that says ``labels`` numbers: an `Encoder` for ``unet``. Raises `ConfigError`."""
    network = networks.build(kind, out_channels=labels, **settings)
    return Encoder(network, labels) if isinstance(network, UNet) else network
