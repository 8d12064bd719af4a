"""Other packages beside a torch for processors, which cannot load the operators of pip's torchvision."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


def hide_operators() -> None:
    """Import torchvision, if it is installed, as its submodules alone: its ``__init__`` requires the operators.

    Its transforms, which the packages use, are Python. For a process that has not imported torchvision.
    """
    found = importlib.util.find_spec("torchvision") if "torchvision" not in sys.modules else None
    if found is not None:
        alone = types.ModuleType("torchvision")
        alone.__spec__, alone.__path__ = found, list(found.submodule_search_locations or ())
        sys.modules["torchvision"] = alone


def import_denoising_diffusion() -> Any:
    """denoising-diffusion-pytorch. Raises ModuleNotFoundError where it, or torchvision, is not installed."""
    hide_operators()
    return importlib.import_module("denoising_diffusion_pytorch")


def import_k_diffusion() -> types.ModuleType:
    """The sampling functions of k-diffusion, without the rest of the package. Raises ModuleNotFoundError."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'k_diffusion'")
    hidden = {name: types.ModuleType(name) for name in ("torchsde", "torchdiffeq", "torchvision")}
    hidden["torchvision.transforms"] = types.ModuleType("torchvision.transforms")
    hidden["torchdiffeq"].odeint = hidden["torchvision.transforms"].functional = None  # type: ignore[attr-defined]
    package = types.ModuleType("k_diffusion")
    package.__path__, package.__spec__ = list(found.submodule_search_locations), found
    before = {name: sys.modules.get(name) for name in hidden}
    sys.modules.update(hidden, k_diffusion=package)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
