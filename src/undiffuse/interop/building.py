"""A model from what was inferred of a foreign file, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.runtime.device import float32_by_default, kept_random_state
from undiffuse.runtime.tensor_file import check_tensors


def build_model(
    path: Path, settings: Mapping[str, Any], shape: tuple[int, ...], values: int, info: dict[str, Any], fix: str
) -> Diffusion:
    """The model with the ``settings`` of `ModelConfig`, of integer items of ``shape``.

    Raises `CheckpointError` with the remedy ``fix`` where no model has these settings.
    """
    try:
        with kept_random_state(), float32_by_default():
            return Diffusion(ModelConfig(**settings), shape, IntegerLevels(values), info)
    except ConfigError as error:
        cause = f"not a model that is supported ({error.where}: {error.cause})"[:400]
        raise CheckpointError("DESCRIPTION", path, cause, fix) from None


def load_weights(path: Path, model: Diffusion, named: Mapping[str, Tensor]) -> None:
    """Load the tensors ``named`` as those of the model's network. Raises `CheckpointError` if they do not fit."""
    check_tensors(path, model.network.state_dict(), named, "The file is damaged, or another kind of network")
    model.network.load_state_dict(named)
    model.eval()
