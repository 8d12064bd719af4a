"""Parts of ``benchmarks/bench`` that measure networks, with untrained ones and with numbers in place of samples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from bench import gpu, same_network  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

CPU = torch.device("cpu")


@pytest.mark.parametrize("waits", [True, False])
def test_a_training_step_takes_the_norm_of_the_weights_and_reads_it_where_reading_is_free(monkeypatch, waits):
    """As `UnreadSteps` does: on a GPU the norm is computed at each step, and read later."""
    reads = []

    class Norm:
        def __float__(self):
            reads.append("read")
            return 1.0

    norms = []
    monkeypatch.setattr(same_network, "reading_waits", lambda device: waits)
    monkeypatch.setattr(same_network, "weights_norm", lambda model: norms.append(model) or Norm())
    model = gpu.cifar10_model(gpu.DRY, CPU)
    values = torch.randint(256, (2, 3, gpu.DRY.side, gpu.DRY.side))
    step = same_network.our_training_step(model, values, None)
    step()
    step()
    assert norms == [model, model]
    assert reads == ([] if waits else ["read", "read"])
