"""Parts of ``benchmarks/bench`` that measure networks, with untrained ones and with numbers in place of samples."""

from __future__ import annotations

import argparse
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
from bench import gpu, same_calls, same_network  # noqa: E402

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


def test_samples_are_compared_at_the_number_of_the_floor():
    """Images of one distribution are as far as the floor; a tenth of them would be several times as far."""
    g = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randn(n, 16, generator=g, dtype=torch.float64)

    rows = {("ours", "equal"): lambda first, n: draw(n), ("ours", "shifted"): lambda first, n: draw(n) + 0.5}
    train, held_out = draw(600), draw(300)
    table, raw = same_calls.measure(rows, lambda x: x, train, held_out, 400)
    assert [row["package"] for row in table] == ["real images", "ours", "ours"]
    assert {numbers["n"] for numbers in raw.values()} == {400}
    floor, equal, shifted = (numbers["frechet"] for numbers in raw.values())
    assert abs(equal[0] - floor[0]) < 3 * (equal[1] ** 2 + floor[1] ** 2) ** 0.5
    assert shifted[0] > 5 * floor[0]
    few = same_calls.measure({}, lambda x: x, train, held_out, 40)[1]
    assert few["real images, the floor"]["frechet"][0] > 2 * floor[0]


def test_the_part_of_the_same_calls_says_how_its_floor_was_measured(monkeypatch):
    transform = IntegerLevels(17)
    model = SimpleNamespace(transform=transform, info={"held_out": 0.1})
    rows = {("ours", "noise"): lambda first, n: transform.to_data(torch.randn(n, 1, 8, 8))}
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(same_calls, "trained_model", lambda data: model)
    monkeypatch.setattr(same_calls, "rows_of", lambda model: (rows, []))
    found = same_calls.run(argparse.Namespace(threads=1))
    assert found.tables[0].title.endswith(
        "1,000 samples of digits, one network, 2.5 minutes of training; distances to 351 held-out images"
    )
    assert [row["sampler"] for row in found.tables[0].rows] == ["the floor", "noise"]
    assert found.notes[0].startswith("The floor is the distance of 1,000 training images, as many as the samples")
    assert "351 images" in found.notes[0]


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
