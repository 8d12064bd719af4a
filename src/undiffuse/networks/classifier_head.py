"""Classifiers from networks: logits (B, labels), whose softmax is p(label|x)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.networks.condition import Condition
from undiffuse.networks.norm import NORMS
from undiffuse.networks.protocol import declared_method


class ClassifierHead(nn.Module):
    """W mean(SiLU(norm(h))) + b, (B, labels) in x's dtype, with h the features of ``encoder``, averaged over positions.

    Zero at initialisation [Dhariwal21 §4 uses attention in place of the mean].
    """

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        width: int = encoder.feature_channels  # type: ignore[assignment]
        self.norm = NORMS[getattr(encoder, "feature_norm", "group")](width)
        self.fc = nn.Linear(width, labels)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.encoder = encoder

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        h = F.silu(self.norm(self.encoder(x, time, cond)))
        return self.fc(h.flatten(2).mean(2) if h.ndim > 2 else h).to(x.dtype)


class PooledOutput(nn.Module):
    """(B, labels): the output (B, labels, ...) of ``network`` averaged over positions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, time: Tensor, cond: Condition | None = None) -> Tensor:
        y = self.network(x, time, cond)
        return y.flatten(2).mean(2) if y.ndim > 2 else y


def make_classifier(network: nn.Module, labels: int) -> nn.Module:
    """A classifier from a network of ``labels`` output channels: on its ``encoder()`` if it declares one."""
    encoder = declared_method(network, "encoder")
    return PooledOutput(network) if encoder is None else ClassifierHead(encoder(), labels)
