"""The optimizer of a run: AdamW, alone or beside Muon for the matrices of the network's blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.model.config import TrainConfig
from undiffuse.networks import protocol
from undiffuse.runtime.precision import autocast_dtype
from undiffuse.training.distributed import distribute_like, full_tensor

MOMENTUM = 0.95
"""Momentum of Muon."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""a, b, c of the polynomial a s + b s³ + c s⁵ that every step applies to the singular values [Jordan24]."""
NEWTON_SCHULZ_STEPS = 5
SMALLEST = 1e-7
"""Norm of a gradient below which a step is shorter."""
MUON_RMS = 0.4
"""Root mean square of Muon's step in units of the learning rate: twice AdamW's, which is that of [Liu25 §2.2], because
the best rate of Muon for the presets is at least twice that of AdamW (benchmarks/RECORDS.md)."""


def make_optimizer(groups: list[dict[str, Any]], network: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of parameter ``groups``, see `Task.parameter_groups`, after the ``network`` has been sharded.

    With "muon" a network whose blocks have no matrices is left to AdamW. The products of Muon are in bfloat16 where
    ``precision`` is.
    """
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "fused": True}
    matrices = block_matrices(network) if settings.optimizer == "muon" else []
    if not matrices:
        return torch.optim.AdamW(groups, **options)
    return Muon(groups, matrices, autocast_dtype(settings.precision), **options)


def block_matrices(network: nn.Module) -> list[nn.Parameter]:
    """The trained weights of linear layers and convolutions in the network's blocks.

    No embeddings of labels, no biases or norms, and nothing before the first or after the last block.
    """
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    modules = [module for block in protocol.blocks(network) for module in block.modules()]
    weights = (module.weight for module in modules if isinstance(module, layers))
    return [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]


def orthogonalize(matrix: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """U diag(p(s/‖s‖)) Vᵀ for ``matrix`` = U diag(s) Vᵀ, p five times the polynomial `NEWTON_SCHULZ` [Jordan24].

    Near the polar factor U Vᵀ: singular values above 0.01 ‖s‖ end between 0.68 and 1.14. A norm ‖s‖ below `SMALLEST`
    is taken for it, so that rounding errors of a gradient that is 0 do not become a step. The products are in
    ``dtype``, by default that of ``matrix``; those in bfloat16 turn the result by about 1°, in half the time where the
    device multiplies in it.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = (x / x.norm().clamp(min=SMALLEST)).to(dtype or matrix.dtype)
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)


class Muon(torch.optim.AdamW):
    """AdamW for all parameters but the ``matrices``, which Muon moves at the same learning rate [Jordan24, Liu25].

    m ← μ m + (1 − μ) g; w ← w − lr (weight_decay w + 0.4 √max(n, k) O), O = `orthogonalize` of
    (1 − μ) g + μ m, a matrix (n, k): a convolution's weight (n, in, …) has k = in · kernel size. √max(n, k) O has a
    root mean square of 1, see `MUON_RMS`. A gradient is used up by the step. Of a sharded matrix every process
    computes the whole O, and keeps its shard. The products of O are in ``dtype``, by default that of the weights.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        matrices: Iterable[nn.Parameter],
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(groups, **options)
        self.matrices, self.dtype = set(matrices), dtype

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects AdamW's moments for every parameter

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight in self.matrices and weight.grad is not None:
                    self._move(weight, group["lr"], group["weight_decay"])
                    weight.grad = None  # AdamW passes over it
        return super().step(closure)

    @torch.no_grad()
    def _move(self, weight: Tensor, lr: float, weight_decay: float) -> None:
        state, grad = self.state[weight], weight.grad
        assert grad is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"].lerp_(grad, 1 - MOMENTUM)
        matrix = full_tensor(grad.lerp(momentum, MOMENTUM)).flatten(1)
        scale = MUON_RMS * math.sqrt(max(matrix.shape))
        move = distribute_like(orthogonalize(matrix, self.dtype).reshape(weight.shape), weight)
        weight.mul_(1 - lr * weight_decay).sub_(move, alpha=lr * scale)


def has_moment(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> bool:
    """Whether ``name`` is a tensor of the ``optimizer``'s state of this parameter."""
    by_muon = isinstance(optimizer, Muon) and parameter in optimizer.matrices
    return (name == "momentum") == by_muon
