"""A device is computed on as it was named, or refused by name; nothing falls back to the CPU without a word."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState

from undiffuse.cli import main
from undiffuse.errors import ConfigError
from undiffuse.model.checkpoint import load
from undiffuse.runtime.device import default_batch, halve_while_out_of_memory, resolve_device
from undiffuse.training.distributed import start_accelerator

NO_GPU = torch.accelerator.current_accelerator(check_available=True) is None
ABSENT = ["cuda:99", "mps", "xpu", "hpu", "vulkan", *(["cuda", "cuda:0"] if NO_GPU else [])]


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu"), *(["auto"] if NO_GPU else [])])
def test_the_cpu(name):
    assert resolve_device(name) == torch.device("cpu")
    assert start_accelerator(name).device == torch.device("cpu")


def test_float32_is_float32_in_convolutions_too(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    resolve_device("cpu")
    assert torch.backends.cudnn.allow_tf32 is False


def test_a_process_of_a_launcher_computes_on_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("undiffuse.runtime.device._problem", lambda device: None)
    resolve_device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    resolve_device("cpu")
    assert chosen == []
    resolve_device("cuda")
    assert chosen == [1]


@pytest.mark.parametrize("name", ABSENT)
@pytest.mark.parametrize("use", [resolve_device, start_accelerator, lambda name: load("nothing", name)])
def test_a_device_that_is_not_here_is_refused(use, name):
    with pytest.raises(ConfigError, match=rf"error\[DEVICE\] device '{name}': torch finds no such device on this mach"):
        use(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "Cuda", "", "auto ", None, 1.5, [1]])
def test_a_name_that_is_none_of_torch_is_refused(name):
    with pytest.raises(ConfigError, match=r"error\[DEVICE\] device .*: torch has no such device\. Use auto or cpu"):
        resolve_device(name)


def test_a_device_without_data_or_float64_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="device 'meta': it holds no data"):
        resolve_device("meta")
    zeros = torch.zeros

    def zeros_of_mps(*size, dtype=torch.float32, device):
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return zeros(*size, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", zeros_of_mps)
    with pytest.raises(ConfigError, match="device 'mps': it does not compute in float64, in which likelihoods are su"):
        resolve_device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert resolve_device("auto") == torch.device("cpu")


def test_auto_is_the_accelerator_that_torch_finds(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("xpu"))
    monkeypatch.setattr("undiffuse.runtime.device._problem", lambda place: None)
    assert resolve_device("auto") == torch.device("xpu")
    assert start_accelerator("cuda:1").device == torch.device("cuda:1"), "not accelerate's own choice, the first GPU"


def test_a_launcher_gives_each_process_its_device(monkeypatch):
    from undiffuse.runtime.distributed_group import check_own_device

    monkeypatch.setenv("WORLD_SIZE", "2")
    check_own_device("cuda", torch.device("cuda:1"))
    for name in ("cuda:1", "xpu"):
        with pytest.raises(ConfigError, match=f"device '{name}': a launcher gives each of its 2 processes a device of"):
            check_own_device(name, torch.device("cuda:1"))


def test_precision_and_accumulation_are_those_of_the_recipe_and_not_of_the_launcher(monkeypatch):
    """accelerate reads both variables into a state of the whole process, which is built again here and afterwards."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state(True)
    try:
        accelerator = start_accelerator("cpu")
    finally:
        AcceleratorState._reset_state(True)
    assert (accelerator.native_amp, accelerator.scaler, accelerator.gradient_accumulation_steps) == (False, None, 1)


def test_the_command_line_names_its_flag(capsys, tmp_path):
    assert main(["train", "digits", "--out", str(tmp_path / "run"), "--device", "mps"]) == 2
    assert "error[DEVICE] --device mps: torch finds no such device on this machine. Use auto or cpu" in (
        " ".join(capsys.readouterr().err.split())
    )


@pytest.mark.parametrize(
    ("dims", "batch"),
    [(1, 1024), (64, 1024), (784, 1024), (1024, 1024), (1025, 512), (3072, 256), (12288, 64), (2**20, 64), (2**24, 64)],
)
def test_the_default_batch_is_a_function_of_device_and_items_alone(dims, batch):
    assert default_batch(dims, torch.device("cuda")) == batch
    assert default_batch(dims, torch.device("cpu")) == 64


@pytest.mark.parametrize(
    ("batch", "largest", "tried"), [(64, 64, [64]), (64, 20, [64, 32, 16]), (3, 1, [3, 1]), (1, 1, [1])]
)
def test_a_batch_is_halved_until_it_fits(batch, largest, tried):
    seen, lines = [], []

    def draw(batch):
        seen.append(batch)
        if batch > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "samples"

    assert halve_while_out_of_memory(draw, batch, lines.append) == ("samples", tried[-1])
    assert seen == tried
    assert lines == [f"the GPU has too little memory for batches of {batch}: {tried[-1]} from here on"] * (
        len(tried) > 1
    )


def test_an_item_that_does_not_fit_is_an_error():
    def draw(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        halve_while_out_of_memory(draw, 4, print)
