"""Parts of ``benchmarks/bench`` that measure networks, with untrained ones and with numbers in place of samples."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEventAvg

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


def event(key, device_type, microseconds, is_user_annotation=False):
    found = FunctionEventAvg()
    found.key, found.count, found.use_device, found.device_type = key, gpu.PROFILED, "cuda", device_type
    found.self_device_time_total, found.is_user_annotation = microseconds, is_user_annotation
    return found


def test_the_profile_of_a_gpu_counts_the_time_of_a_kernel_once():
    """torch has it three times: of the operation, of the kernel, and of an annotation around both."""
    events = [
        event("aten::mm", DeviceType.CPU, 9e3),
        event("gemm", DeviceType.CUDA, 6e3),
        event("reduce", DeviceType.CUDA, 3e3),
        event("Optimizer.step", DeviceType.CUDA, 9e3, is_user_annotation=True),
    ]
    rows = gpu.longest(events, on_gpu=True)
    assert [(row["operation"], row["ms a step"], row["share"]) for row in rows] == [
        ("gemm", "2.00", "66.7 %"),
        ("reduce", "1.00", "33.3 %"),
    ]
    assert "CUDA time total: 9.000ms" in EventList(events, use_device="cuda").table()


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
