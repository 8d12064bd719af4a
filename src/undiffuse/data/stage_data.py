"""The data of a stage of a cascade, made from images of full resolution: the low resolution, or the rest given it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.data.dataset import Dataset
from undiffuse.data.resolution import ResolutionSplit
from undiffuse.data.transform import IntegerLevels
from undiffuse.errors import ConfigError, DataError
from undiffuse.networks.condition import Condition
from undiffuse.runtime.atomic_file import json_digest


@dataclass(frozen=True, eq=False, kw_only=True)
class StageData(Dataset):
    """The low resolution of ``full``, or the rest with the low resolution ``low`` (N, C, *size) as condition.

    The content of the images of full resolution decides their parts (`split`), so that an item is held out in all
    stages or in none. ``low`` is None for the base of a cascade.
    """

    resolution: ResolutionSplit
    full: Dataset
    low: np.ndarray | None = None

    @property
    def condition_sizes(self) -> dict[str, int]:
        """Those of ``full``, and the channels of the low resolution as ``image``."""
        sizes = self.full.condition_sizes
        return sizes if self.low is None else {**sizes, "image": self.low.shape[1]}

    def condition(self, indices: np.ndarray, u: np.ndarray | None = None) -> Condition:
        """The conditions of the items ``indices`` of ``full``, and their image without noise in units of x."""
        return self.with_image(self.full.condition(indices, u), indices)

    def given_condition(self, indices: np.ndarray, conditional: bool, u: np.ndarray | None = None) -> Condition | None:
        """The image, if there is one, and if ``conditional`` all other conditions."""
        cond = self.full.given_condition(indices, conditional, u)
        return cond if self.low is None else self.with_image(cond or Condition(), indices)

    def with_image(self, cond: Condition, indices: np.ndarray) -> Condition:
        """``cond`` with the image of the items ``indices``, if there is one."""
        return cond if self.low is None else add_image(cond, self.resolution, self.low[indices])

    def full_values(self, values: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, int | None]:
        """Images made of ``values`` (n, *item_shape) with the low resolution of ``indices``; their number of values."""
        if self.low is None:
            return values, self.num_values
        return self.resolution.join(self.low[indices], values), self.resolution.num_values

    @property
    def digests(self) -> np.ndarray:
        """(N,) uint64, those of the full resolution."""
        return self.full.digests

    @property
    def fingerprint(self) -> str:
        """sha256 in hex over the fingerprint of the full resolution and the split."""
        return json_digest(self.stage)

    @property
    def stage(self) -> dict[str, Any]:
        """Facts for the run and for the model's file, from which `undiffuse.model.cascade` knows what fits."""
        return stage_facts(self.resolution, self.full.fingerprint, self.low is None)


def stage_facts(resolution: ResolutionSplit, fingerprint: str, is_base: bool) -> dict[str, Any]:
    """`StageData.stage` of data of full resolution with this ``fingerprint``."""
    return resolution.to_dict() | {"is_base": is_base, "fingerprint": fingerprint}


def add_image(cond: Condition, resolution: ResolutionSplit, low: np.ndarray) -> Condition:
    """``cond`` with the image ``low`` (n, *low_shape), integers, without noise in the units of x."""
    image: Tensor = IntegerLevels(resolution.num_values).to_model(torch.from_numpy(np.ascontiguousarray(low)))
    named = {f.name: getattr(cond, f.name) for f in fields(cond)}
    return Condition(**named | {"image": image, "image_level": None})


def reduce_data(data: Dataset, side: int, name: str = "mean") -> StageData:
    """The low resolution of ``data`` with the shortest side ``side`` by the map ``name``: data of a cascade's base.

    Raises `ConfigError` and `DataError` where ``data`` cannot be divided so.
    """
    resolution = _resolution(data, side, name)
    return _stage(data, resolution, values=resolution.low(data.values))


def split_data(data: Dataset, side: int, name: str = "mean") -> StageData:
    """The rest of ``data`` given the low resolution, for a super-resolution model; arguments as of `reduce_data`."""
    resolution = _resolution(data, side, name)
    low, rest = resolution.low(data.values), resolution.rest(data.values)
    return _stage(data, resolution, values=rest, num_values=resolution.rest_num_values, low=low)


def _stage(data: Dataset, resolution: ResolutionSplit, **changed: Any) -> StageData:
    kept = {f.name: getattr(data, f.name) for f in fields(Dataset)}
    return StageData(**(kept | changed), resolution=resolution, full=data)


def _resolution(data: Dataset, side: int, name: str) -> ResolutionSplit:
    if len(data.item_shape) < 2 or data.num_values is None:
        cause = "a cascade is of images with integer values"
        raise DataError("CASCADE", data.name, cause, "Leave out --from and --reduce, or give images")
    short = min(data.item_shape[1:])
    if not 1 <= side < short or short % side:
        sides = "×".join(str(n) for n in data.item_shape[1:])
        cause = f"images of {sides} cannot be divided down to it by a whole number"
        divisors = [str(n) for n in range(1, short) if short % n == 0]
        fix = f"Give one of {', '.join(divisors[-6:])}" if divisors else "Give larger images"
        raise ConfigError("SIDE", f"the side {side}", cause, fix)
    return ResolutionSplit(name, short // side, data.item_shape, data.num_values)
