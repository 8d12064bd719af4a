"""The memory of a process is what its tensors take; the time is what the formula says."""

import pytest
import torch
from torch import nn

from undiffuse.train.ema import Average
from undiffuse.train.predict import memory, seconds
from undiffuse.train.profiles import Profiles


@pytest.mark.parametrize(("length", "times", "averages"), [(0.05, 4, 2), (0.07, 4, 3), (0.05, 0, 1)])
def test_the_memory_is_that_of_the_tensors(tmp_path, length, times, averages):
    network, shown = nn.Linear(30, 50), nn.Linear(30, 50)
    optimiser = torch.optim.AdamW(network.parameters())
    average = Average(network, length)
    kept = Profiles(network, average, length, times, tmp_path)
    network(torch.ones(1, 30)).sum().backward()
    optimiser.step()
    held = [*network.parameters(), *shown.parameters(), *(p.grad for p in network.parameters())]
    held += [*average.mean.values(), *kept.memory.values()]
    held += [t for moments in optimiser.state.values() for t in moments.values() if t.ndim]
    parameters = sum(p.numel() for p in network.parameters())
    assert memory(parameters, averages=averages) == sum(t.nbytes for t in held)


def test_shares_divide_all_but_the_model_that_is_shown():
    assert memory(1_000_000) == memory(1_000_000, 8) == 28_000_000
    assert memory(1_000_000, 8, shard=True) == 4_000_000 + 24_000_000 // 8
    assert memory(1, 8, shard=True) == 4 + 3


def test_the_time():
    assert seconds(10**6, 64, 1, 0.01, 1e9) == pytest.approx(0.64)
    assert seconds(10**6, 64, 4, 0.01, 1e9, 1e-3) == pytest.approx(0.16 + 2 * (1e-3 + 0.75 * 0.004))
    assert seconds(10**6, 64, 4, 0.01, 1e9, 1e-3, True) == pytest.approx(0.16 + 3 * (1e-3 + 0.75 * 0.004))
