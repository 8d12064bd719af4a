"""Shared parts of several tasks: held-out share, transform and facts of the data, optimizer's groups, pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from undiffuse.data.dataset import Dataset, Split
from undiffuse.data.transform import DataTransform, transform_for
from undiffuse.model.config import TrainConfig
from undiffuse.networks.condition import Condition
from undiffuse.training.run_folder import describe


def held_out_share(data: Dataset, requested: float, models: Mapping[str, Any]) -> tuple[float, str | None]:
    """The share of ``data`` to hold out, and a sentence if it is less than ``requested``.

    It is `Dataset.held_out_fraction`, or the share of one of ``models`` that were trained on these data (or on data of
    their name, which may have changed since), by their description: such a model was trained on all
    other items. The part of a smaller share lies within the part of a larger one.
    """
    share, reason = data.held_out_fraction(requested)
    for name, model in models.items():
        if data.may_be_of(model.info) and (theirs := float(model.info.get("held_out", 0.1))) < share:
            share, reason = theirs, f"held_out is {theirs:g}, that of {name}, which was trained on the other items"
    return share, reason


def fitted_transform(data: Dataset, split: Split) -> DataTransform:
    """The transform of ``data``; that of continuous data has the moments of the training part."""
    return transform_for(data, None if data.num_values is not None else data.moments(split.train))


def data_facts(data: Dataset, settings: TrainConfig) -> dict[str, Any]:
    """What a model's file records of the ``data``."""
    return describe(data) | {"held_out": settings.held_out}


def optimizer_groups(
    settings: TrainConfig, network: nn.Module, others: Iterable[nn.Parameter] = (), lr_factor: float = 1.0
) -> list[dict[str, Any]]:
    """The ``network``, then ``others``, which are no part of it, without weight decay and with their ``lr_factor``."""
    groups = [{"params": list(network.parameters()), "weight_decay": settings.weight_decay, "lr_factor": 1.0}]
    others = list(others)
    return groups + [{"params": others, "weight_decay": 0.0, "lr_factor": lr_factor}] * bool(others)


def picture_path(folder: Path, name: str, step: int | None) -> Path:
    """The path of a picture at ``step``, NAME-STEP.png, or at the end, NAME.png."""
    return folder / (f"{name}.png" if step is None else f"{name}-{step:08d}.png")


def picture_condition(data: Dataset, items: np.ndarray, conditional: bool) -> Condition | None:
    """Each label in turn if there are only labels, else the conditions of ``items`` (n,), None without any."""
    if conditional and data.condition_sizes.keys() == {"classes"}:
        return Condition(label=torch.arange(len(items)) % len(data.classes))
    return data.given_condition(items, conditional)
