"""The runs of a studio. A request names a run by its index, and nothing else on the disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undiffuse.data.dataset import Dataset
from undiffuse.data.transform import IntegerLevels, values_transform
from undiffuse.errors import ConfigError, ResourceError, UndiffuseError
from undiffuse.model import checkpoint
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.text_conditions import class_names, text_encoder_of
from undiffuse.networks.condition import Condition
from undiffuse.runtime.tensor_file import model_path
from undiffuse.studio.fields import Fields
from undiffuse.studio.pictures import Picture, decode_upload, from_values
from undiffuse.training.run_folder import Run

MAX_IMAGES, MAX_IMAGES_BYTES = 64, 96 << 20
"""Uploaded images that are kept; older ones are dropped."""
MAX_PROMPT = 1000


class StudioRun:
    """A run or a model file: its model and its data, each loaded when first used."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.path, self.device = path, device
        self.run = Run(path if path.is_dir() else path.parent)
        self._lock = threading.Lock()
        self._model: Diffusion | None = None
        self._stamp: tuple[int, int] | None = None
        self._data: Dataset | None = None

    @property
    def model(self) -> Diffusion:
        """The model; loaded again when training has written its file anew. Raises `CheckpointError`."""
        file = model_path(self.path)
        with self._lock:
            stat = file.stat() if file.is_file() else None
            stamp = stat and (stat.st_mtime_ns, stat.st_size)
            if self._model is None or stamp != self._stamp:
                self._model, self._stamp = checkpoint.load(self.path, self.device), stamp
            return self._model

    @property
    def data(self) -> Dataset:
        """The data that the run was trained on. Raises `ConfigError` and `DataError`."""
        trained_on = ((self.run.record or {}).get("data") or {}).get("fingerprint")
        if self._data is None or self._data.fingerprint != trained_on:  # the run may be another one by now
            try:
                self._data = self.run.load_data()
            except ConfigError as error:  # the page has no place for the name of DATA
                raise ConfigError(error.code, error.where, error.cause, "Give an image") from None
        return self._data

    def describe(self) -> dict[str, Any]:
        """What the page shows of the run: of the model, or the ``error`` why there is none."""
        plain: dict[str, Any] = {"path": str(self.path)}
        try:
            model = self.model
        except UndiffuseError as error:
            return plain | {"error": str(error)}
        own = model.default_sampler
        return plain | {
            "data": str(model.info.get("name", "unknown data")),
            "kind": kind_of(model),
            "shape": list(model.item_shape),
            "classes": class_names(model),
            "prompts": text_encoder_of(model) is not None,
            "longest": model.chain_length,
            "calls": model.config.calls,
            "solver": str(own.solver),
            "likelihood": not model.config.calls or model.config.few_call_solver == "flow_map",
        }

    def condition(self, fields: Fields, n: int) -> tuple[Condition | None, dict[str, Any]]:
        """The condition of ``n`` items by the fields ``label`` and ``prompt``, and the options of a command for it."""
        model = self.model
        names = class_names(model)
        label = fields.optional_integer("label", 0, max(len(names) - 1, 0))
        prompt = fields.text("prompt", MAX_PROMPT, "").strip()
        condition, options = None, {}
        if prompt:
            text = model.text_condition([prompt])
            condition, options = text.take(torch.zeros(n, dtype=torch.int64)), {"--prompt": prompt}
        if label is not None:
            if not names:
                raise ConfigError("LABEL", f"label {label}", "the model was trained without labels", "Leave it out")
            condition = replace(condition or Condition(), label=torch.full((n,), label))
            options = {"--label": names[label] if names.count(names[label]) == 1 else str(label)} | options
        return condition, options

    def picture(self, fields: Fields, images: Images) -> Picture:
        """The image that the field ``item`` (an index of the run's data) or ``image`` (an uploaded one) names."""
        model = self.model
        channels, *sides = model.item_shape
        if fields.has("image"):
            content = images.get(fields.text("image", 64))
            fields.done()
            return decode_upload(content, channels, sides)
        index = fields.integer("item", 0, 2**31)
        fields.done()
        data = self.data
        if index >= len(data):
            raise ConfigError("ITEM", f"item {index}", f"the data have {len(data):,} items", "Give a smaller number")
        if data.num_values is None or data.item_shape != model.item_shape:
            raise ConfigError(
                "ITEM", f"item {index}", "the items of the data are not those of the model", "Give an image"
            )
        return Picture(from_values(np.asarray(data.values[index : index + 1])[0], data.num_values))


def kind_of(model: Diffusion) -> str:
    """``images`` (grey or RGB), ``points`` (two numbers), or ``other``, which the page does not show."""
    if "image" in model.condition_sizes:
        return "other"  # a stage of a cascade needs smaller images
    channels, *sides = model.item_shape
    if isinstance(values_transform(model.transform), IntegerLevels) and len(sides) == 2 and channels in (1, 3):
        return "images"
    return "points" if model.item_shape == (2,) else "other"


class Images:
    """Uploaded files by a random name, the newest few."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, bytes] = OrderedDict()

    def add(self, name: str, content: bytes) -> None:
        self._files[name] = content
        while len(self._files) > MAX_IMAGES or self.num_bytes > MAX_IMAGES_BYTES:
            self._files.popitem(last=False)

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self._files.values()))

    def get(self, name: str) -> bytes:
        """Raises `ResourceError` for a name that is not there, or not any more."""
        if name not in self._files:
            raise ResourceError("NO_IMAGE", "image", "it is no longer stored", "Upload it again")
        return self._files[name]


def open_runs(paths: Sequence[Path], device: str = "cpu") -> list[StudioRun]:
    """The runs of ``paths``. Raises `ConfigError` for one that is not there; its model may come later."""
    for path in paths:
        if not path.exists():
            raise ConfigError("NOT_FOUND", path, "no such run", "Name a run folder or a model file")
        if path.is_dir() and not any((path / name).exists() for name in ("run.json", "model.safetensors")):
            raise ConfigError("NOT_FOUND", path, "there is no run in this folder", "Name a run folder or a model file")
    return [StudioRun(path, device) for path in paths]
