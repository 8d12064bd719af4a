"""Configuration is data: frozen dataclasses, a strict loader, JSON in the checkpoint and TOML for people."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import reprlib
import sys
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from undiffuse.errors import ConfigError

LARGEST, LONGEST = 1 << 20, 1000
"""Bytes that a recipe's file may have, and characters that a text in it may."""

Settings = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """What a model is. Each part is a row of its table by ``name`` (a network by ``kind``) with its settings.

    ``steps`` is T of the chain that the bound and the samplers walk (a table's own T must be equal);
    ``loss`` is ``matching`` (the weighted loss in the frame of the target), ``hybrid`` (with a learned
    variance), ``bound``, ``full_bound`` (every step of the chain at once) or ``continuous`` (infinitely many
    steps, which alone trains a ``learned`` schedule); ``variance`` is the reverse process's. ``output`` is what
    the network says: ``values``, of the target, or ``levels``, how likely each level of the data is
    (`undiffuse.lattice`).
    """

    network: Settings = field(default_factory=lambda: {"kind": "unet"})
    schedule: Settings = field(default_factory=lambda: {"name": "linear_log_snr"})
    target: Settings = field(default_factory=lambda: {"name": "v"})
    weight: Settings = field(default_factory=lambda: {"name": "edm"})
    times: Settings = field(default_factory=lambda: {"name": "uniform"})
    preconditioning: Settings = field(default_factory=lambda: {"scale": "none", "time": "log_snr"})
    steps: int = 1000
    loss: str = "matching"
    variance: str = "small"
    output: str = "values"


@dataclass(frozen=True)
class TrainConfig:
    """How it is trained. Lengths of time are in optimiser steps unless they say minutes.

    The learning rate rises over ``warmup`` steps, stays, and falls linearly to 0 over the last ``decay``
    share of the run, which ends after ``steps`` steps or about ``minutes`` minutes. ``ema`` is the length of
    the average of weights as a share of the run (a power-function profile); ``snapshots`` says how often those of two
    lengths are written down, from which `undiffuse.train.profiles` makes any other: 8 bytes a parameter on disk
    each, 4 in memory, nothing with 0. ``precision`` is ``auto``,
    ``float32`` or ``bfloat16``; ``flip`` and ``flip_vertical`` mirror images at random, ``crop`` moves items by
    up to so many cells along each axis (`undiffuse.train.augment`): off unless asked for, and in training only. With
    ``conditional`` the network is told all that the data tell of an item (labels, vectors, tokens) but for a share
    ``condition_dropout`` of the items, told nothing: what it says without a condition is trained on these.
    A checkpoint is written at each of the ``previews`` looks at the run and when ``save_minutes`` have passed since.
    A step whose loss or gradient is no number stops the run; with ``on_nonfinite`` "skip" it is left out, at most
    five in a row.

    Past one process, ``shard`` cuts weights, averages and moments into shares (FSDP2); else each process holds all
    (DDP). ``checkpointing`` computes what a U-Net's stages hold again in the backward pass rather than keep it,
    ``compile`` lets torch compile the network. None of them changes what is computed but for its rounding.
    """

    batch: int = 128
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.05
    snapshots: int = 4
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    precision: str = "auto"
    shard: bool = False
    checkpointing: bool = False
    compile: bool = False
    flip: bool = False
    flip_vertical: bool = False
    crop: int = 0
    held_out: float = 0.1
    previews: int = 8
    save_minutes: float = 10.0
    conditional: bool = False
    condition_dropout: float = 0.1
    on_nonfinite: str = "stop"

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        _require(
            self.batch % self.accumulate == 0, "accumulate", self.accumulate, f"must divide the batch, {self.batch}"
        )
        _require(0 < self.lr < math.inf, "lr", self.lr, "must be above 0 and finite")
        _require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "must be in [0, 1)")
        _require(0 <= self.held_out < 0.5, "held_out", self.held_out, "must be a share of the data, below 0.5")
        dropped = self.condition_dropout
        _require(0 <= dropped <= 1, "condition_dropout", dropped, "must be a share of the items, in [0, 1]")
        for name in ("warmup", "weight_decay", "crop", "previews", "snapshots"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be below 0")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "must be a whole number from 0 to 2^63 - 1")
        _require(0 <= self.decay <= 1, "decay", self.decay, "must be a share of the run, in [0, 1]")
        _require(0 < self.ema < 0.28, "ema", self.ema, "must be a share of the run, between 0 and 0.28")
        _require(self.clip > 0, "clip", self.clip, "must be above 0")
        _require(self.save_minutes > 0, "save_minutes", self.save_minutes, "must be above 0")
        for name in ("steps", "minutes"):
            value = getattr(self, name)
            _require(value is None or 0 < value < math.inf, name, value, "must be above 0 and finite")
        _require(self.precision in ("auto", "float32", "bfloat16"), "precision", self.precision, "unknown")
        _require(self.on_nonfinite in ("stop", "skip"), "on_nonfinite", self.on_nonfinite, "is neither stop nor skip")


@dataclass(frozen=True)
class Config:
    """A whole recipe; `undiffuse.presets` holds named ones."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def _require(good: bool, name: str, value: object, cause: str) -> None:
    if not good:
        raise ConfigError("CONFIG", f"train.{name} = {value!r}", cause, "Change this setting")


def to_dict(config: Any) -> Settings:
    """A configuration as plain data, ready for JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], data: object, where: str = "config") -> T:
    """The configuration of ``kind`` that ``data`` says; an unknown key or a wrong type is a `ConfigError`."""
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


_hints = functools.cache(typing.get_type_hints)  # our own annotations, worked out once


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
    """Whether a setting is short text, a switch, a number that a float can hold, or lists and tables of such."""
    if isinstance(value, dict | list | tuple):
        return deep > 0 and all(_is_plain(v, deep - 1) for v in (value.values() if isinstance(value, dict) else value))
    if isinstance(value, int | float):
        return abs(value) <= sys.float_info.max
    return value is None or (isinstance(value, str) and len(value) <= LONGEST)


def read(path: Path, base: Config) -> Config:
    """The recipe of a TOML (or JSON) file with tables ``model`` and ``train``, over ``base``. Raises `ConfigError`."""
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it is longer than {LARGEST:,} bytes")
        text = content.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ConfigError("CONFIG", path, f"cannot be read as a recipe ({error})"[:300], "Give a TOML file") from None
    if not isinstance(data, dict):
        raise ConfigError("CONFIG", path, f"expected tables, got {type(data).__name__}", "Give [model] and [train]")
    merged = to_dict(base)
    for section, settings in data.items():
        merged[section] = (
            {**merged[section], **settings} if isinstance(settings, dict) and section in merged else settings
        )
    return from_dict(Config, merged, path.name)


def _once(pairs: list[tuple[str, Any]]) -> Settings:
    """A table of JSON; ValueError where a key occurs twice."""
    if len(found := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in found if keys.count(k) > 1)[:80]!r} occurs twice")
    return found


def replace_train(config: Config, **settings: Any) -> Config:
    """The recipe with some settings of its training changed."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))


def build_part(part: str, build: Callable[..., Any], settings: dict[str, Any], **given: Any) -> Any:
    """What ``build`` makes of ``settings`` and of what the model itself gives, which settings must not contradict."""
    key = {"network": "kind", "preconditioning": None}.get(part, "name")
    if key is not None and not isinstance(settings.get(key), str):
        raise ConfigError("CONFIG", f"model.{part}: {settings!r}", f"this part has no {key}", f"Give its {key}")
    for name, value in given.items():
        if settings.get(name, value) != value:
            cause = f"the rest of the model and the data make it {value!r}"
            raise ConfigError("CONFIG", f"model.{part}.{name} = {settings[name]!r}", cause, "Leave it out")
    try:
        return build(**{**settings, **given})
    except (TypeError, ValueError) as error:
        raise ConfigError("CONFIG", f"model.{part}", str(error)[:200], "Check its settings") from None
