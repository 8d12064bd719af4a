"""The moving average of weights from which a model samples and evaluates."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from undiffuse.training.distributed import full_tensor, local_shard


@functools.cache
def power_for_length(length: float) -> float:
    """The p whose profile τ^p on [0, 1] has standard deviation √((p+1)/((p+2)²(p+3))) = ``length`` [Karras24 §3.1]."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        too_wide = ((middle + 1) / ((middle + 2) ** 2 * (middle + 3))) ** 0.5 > length
        low, high = (middle, high) if too_wide else (low, middle)
    return (low + high) / 2


class PowerEMA:
    """An average that step k moves by 1 − (1 − 1/k)^(p+1) towards the weights [Karras24 §3.1], ``mean`` by name.

    Its profile is a power function: ``length`` is a fraction of the run so far, so that it needs no warmup and starts
    at the weights after the first step. float32, or float64 for weights in float64 (a learned schedule). Buffers of
    integers and bools are copied.
    """

    def __init__(self, model: nn.Module, length: float) -> None:
        self.power = power_for_length(length) + 1
        self.mean = {name: _at_least_float32(tensor.detach()).clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average to the weights after optimizer step ``step``, counted from 1."""
        move = 1 - (1 - 1 / step) ** self.power
        weights = model.state_dict()
        averaged = [name for name, weight in weights.items() if is_real(weight)]
        means = [local_shard(self.mean[name]) for name in averaged]
        torch._foreach_lerp_(means, [_at_least_float32(local_shard(weights[name])) for name in averaged], move)  # pyright: ignore[reportPrivateImportUsage]
        for name in weights.keys() - averaged:
            self.mean[name].copy_(weights[name])

    def copy_to(self, model: nn.Module) -> None:
        """Load the average into ``model``, in the model's dtypes. All processes must call it at the same time."""
        model.load_state_dict({name: full_tensor(tensor) for name, tensor in self.mean.items()})

    @torch.no_grad()
    def load(self, mean: dict[str, Tensor]) -> None:
        """Replace the numbers of the average; its device and its layout of memory stay."""
        for name, tensor in self.mean.items():
            tensor.copy_(mean[name])


def is_real(tensor: Tensor) -> bool:
    """Whether an average of ``tensor`` makes sense: it does not hold integers or bools."""
    return tensor.is_floating_point() or tensor.is_complex()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if is_real(tensor) else tensor
