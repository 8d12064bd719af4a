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
