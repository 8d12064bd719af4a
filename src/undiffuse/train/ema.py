"""The average of weights that samples and likelihoods use."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from undiffuse.train.parallel import own, whole


@functools.cache
def exponent(length: float) -> float:
    """The p whose profile τ^p on [0, 1] has the std √((p+1)/((p+2)²(p+3))) = ``length`` [Karras24 §3.1]."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        wide = ((middle + 1) / ((middle + 2) ** 2 * (middle + 3))) ** 0.5 > length
        low, high = (middle, high) if wide else (low, middle)
    return (low + high) / 2


class Average:
    """A float32 average whose k-th step moves it by 1 − (1 − 1/k)^(p+1) towards the weights [Karras24 §3.1].

    A power-function profile: its length is a share of the run so far, so it needs no warm-up and begins with
    the weights after the first step. What is float64, as a learned schedule, is averaged in float64.
    """

    def __init__(self, network: nn.Module, length: float) -> None:
        self.power = exponent(length) + 1
        self.mean = {name: _wide(tensor.detach()).clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Takes in the weights after the optimiser's ``step``-th step, counted from 1."""
        move = 1 - (1 - 1 / step) ** self.power
        for name, tensor in network.state_dict().items():
            own(self.mean[name]).lerp_(_wide(own(tensor)), move)

    def copy_to(self, network: nn.Module) -> None:
        """Loads the average into ``network``, in its own dtypes; every process does at the same time."""
        network.load_state_dict({name: whole(tensor) for name, tensor in self.mean.items()})

    def load(self, mean: dict[str, Tensor]) -> None:
        self.mean = {name: _wide(tensor) for name, tensor in mean.items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
