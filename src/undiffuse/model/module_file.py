"""The file of an autoencoder or a classifier: its weights, and under the name of its kind its description."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.runtime.device import float32_by_default, kept_random_state, resolve_device
from undiffuse.runtime.tensor_file import FORMAT, check_tensors, model_path, read_tensors, write_tensors


class Described(Protocol):
    """A module that can be saved: ``initial_tensors`` are those that it was built with, on the device meta."""

    initial_tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Any]: ...


M = TypeVar("M", bound=nn.Module)


def save_module(module: Described, path: str | Path, kind: str, description: dict[str, Any]) -> None:
    """Write weights and ``description`` of a module of a ``kind`` to ``path``, atomically.

    Raises `CheckpointError`, and writes nothing, for weights that `load_module` would refuse; `ResourceError`.
    """
    path, tensors, text = Path(path), module.state_dict(), json.dumps(description, sort_keys=True)
    check_tensors(path, module.initial_tensors, tensors, f"Save the {kind} as it was built")
    write_tensors(path, tensors, {"undiffuse": str(FORMAT), kind: text})


def load_module(path: str | Path, kind: str, build: Callable[[Any], M], device: torch.device | str, source: str) -> M:
    """The module of a ``kind`` of a file or run folder, in evaluation mode on ``device``, a name of `resolve_device`.

    ``build`` makes it from its description, with weights that are replaced; ``source`` says what to give instead of a
    file of another kind. The global generator stays as it is. Raises `CheckpointError`, and `ConfigError` for a device
    that is not here.
    """
    path, device = model_path(Path(path)), resolve_device(device)
    tensors, metadata = read_tensors(path)
    if kind not in metadata:
        raise CheckpointError("KIND", path, f"this is not {'an' if kind[0] in 'aeio' else 'a'} {kind}", source)
    try:
        wide = any(t.dtype == torch.float64 for t in tensors.values())  # written where float64 is the default
        with kept_random_state(), nullcontext() if wide else float32_by_default():
            module = build(json.loads(metadata[kind]))
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        cause = f"this version cannot read its description ({error})"
        raise CheckpointError("DESCRIPTION", path, cause[:300], "Use the version that wrote it") from None
    check_tensors(path, module.state_dict(), tensors)
    module.load_state_dict(tensors)
    return module.to(device).eval()
