"""Parts of ``benchmarks/bench`` that measure networks, with untrained ones and with numbers in place of samples."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from undiffuse import preset
from undiffuse.data.transform import IntegerLevels
from undiffuse.model.diffusion import Diffusion

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


def test_an_imported_network_has_the_layout_that_training_gives_it(monkeypatch):
    """Here that of a network with layer norms, which has it on a processor too; others have it on a GPU."""
    monkeypatch.setattr(same_network, "cpu_multiplies_bfloat16", lambda: False)
    recipe = preset("cpu-small").model
    network = {**recipe.network, "widths": (8, 8), "attention": (), "heads": 1}
    model = Diffusion(replace(recipe, network=network), (3, 8, 8), IntegerLevels(256))

    def fast():
        convolutions = [module for module in model.network.modules() if isinstance(module, torch.nn.Conv2d)]
        return all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in convolutions)

    assert not fast()
    check = SimpleNamespace(what="outputs of the network", difference=0.0, holds=True)
    found = same_network.pair("theirs", SimpleNamespace(checks=[check], model=model), torch.zeros(1), {}, {})
    assert found.model is model
    assert fast()
