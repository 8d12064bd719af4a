"""Configuration as plain data: frozen dataclasses, a strict loader, JSON in checkpoints and TOML in recipe files."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import reprlib
import sys
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from undiffuse.errors import ConfigError
from undiffuse.runtime.side_files import unique_keys

MAX_FILE_BYTES, MAX_TEXT_LENGTH = 1 << 20, 1000
"""The most bytes of a recipe file, and the most characters of a string in it."""

LENGTHS = ("max_steps", "minutes")
"""The settings of `TrainConfig` that are the length of a run; at most one is given."""

MAX_CALLS = 16
"""The most network calls of a sample of a distilled model."""

Settings = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """The parts of a model, each the ``name`` (of a network the ``kind``) of a row of its table, with settings.

    ``chain_length`` is T of the chain for the bound and the samplers (a tabulated schedule must have the same T);
    ``loss`` is ``weighted_mse`` (of the target), ``hybrid`` (with a learned variance), ``bound``, ``full_bound``
    (every step of the chain at once) or ``continuous`` (infinitely many steps; the only loss that trains a
    ``learned`` schedule); ``variance`` is that of the reverse process. ``output`` of the network is ``values`` of the
    target or ``categorical``, logits of all values of the data (`undiffuse.denoising.categorical_head`). ``calls`` is
    0, or for a distilled model the network calls of a sample (`undiffuse.model.consistency`). ``divergence``: a flow
    map also returns the divergence of the flow, for a likelihood by few calls. ``autoencoder`` is the fingerprint of
    the autoencoder of a latent model, else empty.
    """

    network: Settings = field(default_factory=lambda: {"kind": "unet"})
    schedule: Settings = field(default_factory=lambda: {"name": "linear_log_snr"})
    target: Settings = field(default_factory=lambda: {"name": "v"})
    weight: Settings = field(default_factory=lambda: {"name": "edm"})
    times: Settings = field(default_factory=lambda: {"name": "uniform"})
    preconditioning: Settings = field(default_factory=lambda: {"scale": "none", "time": "log_snr"})
    chain_length: int = 1000
    loss: str = "weighted_mse"
    variance: str = "small"
    output: str = "values"
    calls: int = 0
    divergence: bool = False
    autoencoder: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.calls <= MAX_CALLS:
            fix = f"Give a number from 0 to {MAX_CALLS}"
            raise ConfigError("CONFIG", f"model.calls = {self.calls!r}", "out of range", fix)
        if self.divergence and self.few_call_solver != "flow_map":
            raise ConfigError("CONFIG", "model.divergence", "only a flow map has it", "Leave it out")
        if self.autoencoder and not re.fullmatch("[0-9a-f]{64}", self.autoencoder):
            where = f"model.autoencoder = {reprlib.repr(self.autoencoder)}"
            raise ConfigError("CONFIG", where, "not a fingerprint", "Leave it out: --autoencoder sets it")

    @property
    def few_call_solver(self) -> str:
        """The solver of a distilled model: "flow_map" if its network has two times, else "consistency"; else ""."""
        return ("flow_map" if self.network.get("two_times") else "consistency") if self.calls else ""


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. Durations are in optimizer steps unless their name says minutes.

    The learning rate rises over ``warmup`` steps, stays, and falls linearly to 0 over the last fraction ``decay`` of
    the run, which ends after ``max_steps`` steps or about ``minutes`` minutes. ``ema`` is the length of the average of
    the weights as a fraction of the run (a power-function profile); at least ``snapshots`` times, and at most twice as
    often, two averages are saved from which `undiffuse.training.posthoc_ema` computes those of other lengths (each save
    takes 8 bytes a parameter on disk; in memory it takes 4; 0: none). ``precision`` is ``auto``, ``float32`` or
    ``bfloat16``. ``flip`` and ``flip_vertical`` mirror images at random, ``crop`` shifts items by up to that many cells
    along each axis (`undiffuse.training.augmentation`), in training only. With ``conditional`` the network gets all
    conditions of the data (labels, vectors, tokens, text), except for the fraction ``condition_dropout`` of the items,
    which get the null condition. Super-resolution gets the low resolution of an item with noise of a standard deviation
    uniform from 0 to ``image_noise`` in units of x, for a tenth of the items 0; it is never dropped. ``previews`` is
    how often the run is evaluated; a checkpoint is written then, and every ``save_minutes``. A step with a NaN or
    infinite loss or gradient stops the run; with ``on_nonfinite`` "skip" it is skipped, at most five in a row.

    With several processes ``shard`` splits weights, averages and moments among them (FSDP2); otherwise every process
    holds all (DDP). ``checkpointing`` recomputes the blocks of the network in the backward pass to save memory,
    ``compile`` compiles the network; if it is not given, a long run on one GPU measures both forms and takes the faster
    (`undiffuse.training.compiled`). None of the three changes the results except for rounding and, in a compiled
    network, for the random numbers of dropout.
    """

    batch: int = 128
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.4
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.05
    snapshots: int = 4
    max_steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    precision: str = "auto"
    shard: bool = False
    checkpointing: bool = False
    compile: bool | None = None
    flip: bool = False
    flip_vertical: bool = False
    crop: int = 0
    held_out: float = 0.1
    previews: int = 8
    save_minutes: float = 10.0
    conditional: bool = False
    condition_dropout: float = 0.1
    image_noise: float = 1.0
    on_nonfinite: str = "stop"

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 1, name, value, "must be a whole number, at least 1")
        _require(
            self.batch % self.accumulate == 0, "accumulate", self.accumulate, f"must divide the batch, {self.batch}"
        )
        _require(0 < self.lr < math.inf, "lr", self.lr, "must be above 0 and finite")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "must be in [0, 1)")
        _require(0 <= self.held_out < 0.5, "held_out", self.held_out, "must be a fraction of the data, below 0.5")
        dropout = self.condition_dropout
        _require(0 <= dropout <= 1, "condition_dropout", dropout, "must be a fraction of the items, in [0, 1]")
        _require(0 <= self.image_noise <= 1, "image_noise", self.image_noise, "must be a standard deviation in [0, 1]")
        for name in ("warmup", "weight_decay", "crop", "previews", "snapshots"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be below 0")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must be a whole number from 0 to 2^63 - 1")
        _require(0 <= self.decay <= 1, "decay", self.decay, "must be a fraction of the run, in [0, 1]")
        _require(0 < self.ema < 0.28, "ema", self.ema, "must be a fraction of the run, between 0 and 0.28")
        _require(0 < self.clip < math.inf, "clip", self.clip, "must be above 0 and finite")
        _require(0 < self.save_minutes < math.inf, "save_minutes", self.save_minutes, "must be above 0 and finite")
        for name in LENGTHS:
            value = getattr(self, name)
            _require(value is None or 0 < value < 2**63, name, value, "must be above 0 and below 2^63")
        both = self.max_steps is not None and self.minutes is not None
        _require(not both, "max_steps", self.max_steps, f"minutes = {self.minutes} is the length of the run too")
        _require(self.precision in ("auto", "float32", "bfloat16"), "precision", self.precision, "unknown")
        _require(self.optimizer in ("adamw", "muon"), "optimizer", self.optimizer, "must be adamw or muon")
        _require(self.on_nonfinite in ("stop", "skip"), "on_nonfinite", self.on_nonfinite, "must be stop or skip")


@dataclass(frozen=True)
class Config:
    """A recipe: a model and its training. `undiffuse.model.presets` has named ones."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def _require(holds: bool, name: str, value: object, cause: str) -> None:
    if not holds:
        raise ConfigError("CONFIG", f"train.{name} = {value!r}", cause, "Change this setting")


def to_dict(config: Any) -> Settings:
    """A configuration as plain data that JSON can hold."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], data: object, where: str = "config") -> T:
    """The configuration of ``kind`` from plain ``data``. Raises `ConfigError` for an unknown key or a wrong type."""
    if not isinstance(data, dict):
        raise ConfigError(
            "CONFIG", where, f"expected a table of settings, got {type(data).__name__}", "Write it as a table"
        )
    hints = _hints(kind)
    for key in data:
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f"Did you mean {close[0]!r}?" if close else f"It has {', '.join(hints)}"
            raise ConfigError("CONFIG", f"{where}.{str(key)[:80]}", "no such setting", hint.rstrip("?"))
    return kind(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()})


_hints = functools.cache(typing.get_type_hints)  # annotations of this module, resolved once


def _value(hint: Any, value: object, where: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin is types.UnionType:
        if value is None and type(None) in options:
            return None
        return _value(next(o for o in options if o is not type(None)), value, where)
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(options):
        return tuple(_value(o, v, f"{where}[{i}]") for i, (o, v) in enumerate(zip(options, value, strict=True)))
    if origin is dict and isinstance(value, dict) and _is_plain(value):
        return {str(k): v for k, v in value.items()}
    if hint is float and type(value) in (int, float) and _is_plain(value):
        return float(value)  # type: ignore[arg-type]
    if hint in (int, str, bool) and type(value) is hint and _is_plain(value):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise ConfigError("CONFIG", where, f"expected {name}, got {reprlib.repr(value)}", "Correct the value")


def _is_plain(value: object, deep: int = 4) -> bool:
    """Whether a setting is a short string, a boolean, a finite number, or nested lists and tables of these."""
    if isinstance(value, dict | list | tuple):
        return deep > 0 and all(_is_plain(v, deep - 1) for v in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max
    return value is None or (isinstance(value, str) and len(value) <= MAX_TEXT_LENGTH)


def read(path: Path, base: T) -> T:
    """``base`` with the settings of a TOML or JSON file, tables ``model`` and ``train``. Raises `ConfigError`.

    A table such as ``model.network`` without its ``kind`` (or ``name``) changes settings of that of ``base``; one with
    it takes the place of that of ``base``. ``minutes`` and ``max_steps`` take the place of each other.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"it is longer than {MAX_FILE_BYTES:,} bytes")
        text = content.decode("utf-8")
        data = json.loads(text, object_pairs_hook=unique_keys) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError("CONFIG", path, f"cannot be read as a recipe ({error})"[:300], "Give a TOML file") from None
    if not isinstance(data, dict):
        raise ConfigError("CONFIG", path, f"expected tables, got {type(data).__name__}", "Give [model] and [train]")
    merged = to_dict(base)
    for section, settings in data.items():
        if section == "train" and isinstance(settings, dict) and settings.keys() & LENGTHS:
            settings = dict.fromkeys(LENGTHS) | settings
        merged[section] = _changed(merged.get(section), settings)
    return from_dict(type(base), merged, path.name)


def _changed(base: object, given: object) -> object:
    """``given``, with the settings of ``base`` that it has not where both are tables of the same thing."""
    if not isinstance(base, dict) or not isinstance(given, dict) or "kind" in given or "name" in given:
        return given
    return {**base, **{key: _changed(base.get(key), value) for key, value in given.items()}}


def replace_train(config: T, **settings: Any) -> T:
    """The recipe, of a model or of a classifier, with changed settings of training: replace_train(recipe, minutes=20).

    Raises `ConfigError` for a value out of range, TypeError for an unknown setting.
    """
    train = dataclasses.replace(config.train, **settings)  # pyright: ignore[reportAttributeAccessIssue]
    return dataclasses.replace(config, train=train)  # pyright: ignore[reportArgumentType, reportCallIssue]
