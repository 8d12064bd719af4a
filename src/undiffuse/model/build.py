"""Construction of a model's parts from their settings, and the checks that they fit together."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from undiffuse.data.transform import DataTransform, IntegerLevels
from undiffuse.denoising.categorical_head import MAX_VALUES
from undiffuse.errors import ConfigError
from undiffuse.model.config import ModelConfig, Settings
from undiffuse.networks import registry
from undiffuse.networks.protocol import check_output, condition_sizes
from undiffuse.process import time_sampling as times
from undiffuse.process.discrete_schedule import LearnedChain
from undiffuse.process.learned_schedule import LearnedSchedule
from undiffuse.process.noise_level import NoiseLevel, stack
from undiffuse.process.schedule import Schedule
from undiffuse.process.target import Target
from undiffuse.process.weighting import Weight

MAX_CHAIN_LENGTH = 10_000
"""The largest T of a chain."""
MAX_ITEM_VALUES = 1 << 40
"""The most numbers of an item."""
CHOICES = {
    "loss": ("weighted_mse", "hybrid", "bound", "full_bound", "continuous"),
    "variance": ("small", "large", "learned"),
    "output": ("values", "categorical"),
}


def build_part(part: str, build: Callable[..., Any], settings: Settings, **supplied: Any) -> Any:
    """``build(**settings, **supplied)``, where ``settings`` must not contradict what the model supplies."""
    key = {"network": "kind", "preconditioning": None}.get(part, "name")
    if key is not None and not isinstance(settings.get(key), str):
        raise ConfigError("CONFIG", f"model.{part}: {settings!r}", f"this part has no {key}", f"Give its {key}")
    for name, value in supplied.items():
        if settings.get(name, value) != value:
            cause = f"the rest of the model and the data make it {value!r}"
            raise ConfigError("CONFIG", f"model.{part}.{name} = {settings[name]!r}", cause, "Leave it out")
    try:
        return build(**{**settings, **supplied})
    except (TypeError, ValueError) as error:
        raise ConfigError("CONFIG", f"model.{part}", str(error)[:200], "Check its settings") from None


def check_item_shape(item_shape: Sequence[int]) -> None:
    """Raise `ConfigError` unless ``item_shape`` is (C, ...) or (D,), whole numbers from 1 with a possible product."""
    is_valid = bool(item_shape) and all(type(n) is int and n >= 1 for n in item_shape)
    if not is_valid or math.prod(item_shape) > MAX_ITEM_VALUES:
        cause = f"{tuple(item_shape)} is not the shape of an item"[:300]
        fix = f"Give whole numbers from 1 with a product of at most {MAX_ITEM_VALUES:,}"
        raise ConfigError("SHAPE", "item_shape", cause, fix)


def build_network(
    settings: Settings,
    item_shape: tuple[int, ...],
    out_channels: int,
    network: nn.Module | type[nn.Module] | None = None,
) -> nn.Module:
    """The network of ``settings`` from x (B, *item_shape) to (B, out_channels, ...).

    ``network`` is its class where that is not registered, or the network itself. Raises `ConfigError` where it does
    not take items of this shape, cannot be built, or does not make the output: see `undiffuse.networks.protocol`.
    """
    check_item_shape(item_shape)
    kind, sizes = settings.get("kind"), condition_sizes(settings)
    if isinstance(network, nn.Module):
        registry.check_dims(network, registry.kind_of(network), item_shape)
        check_output(network, item_shape, out_channels, sizes, registry.kind_of(network))
        return network
    supplied: dict[str, Any] = {"channels": item_shape[0], "out_channels": out_channels}
    supplied |= {"dims": len(item_shape) - 1, "item_shape": item_shape}
    if not isinstance(kind, str):
        return build_part("network", registry.build, settings)  # which refuses them
    cls = registry.find(kind) if network is None else network
    registry.check_dims(cls, kind, item_shape)
    supplied = {name: supplied[name] for name in registry.accepted(cls, supplied)}
    built = build_part("network", functools.partial(_construct, cls), settings, **supplied)
    if not registry.is_built_in(cls):
        check_output(built, item_shape, out_channels, sizes, kind)
    return built


def _construct(cls: type[nn.Module], *, kind: str, **settings: Any) -> nn.Module:
    return registry.construct(cls, kind, settings)


def check_chain_length(chain_length: int, schedule: Schedule) -> None:
    """Raises `ConfigError` unless T is in range and that of the ``schedule``, where it has one."""
    if schedule.chain_length not in (None, chain_length):
        cause = f"{chain_length}, but the schedule has {schedule.chain_length}"
        raise ConfigError("CONFIG", "model.chain_length", cause, "Give the same number to both")
    if not 1 <= chain_length <= MAX_CHAIN_LENGTH:
        fix = f"Give a number from 1 to {MAX_CHAIN_LENGTH:,}"
        raise ConfigError("CONFIG", "model.chain_length", f"{chain_length} steps", fix)


def check_choices(
    config: ModelConfig, transform: DataTransform, schedule: Schedule, time_sampling: times.TimeDistribution
) -> None:
    """Raises `ConfigError` where loss, variance, output, times and schedule are unknown or do not go together."""
    for name, choices in CHOICES.items():
        if (chosen := getattr(config, name)) not in choices:
            fix = f"Use {', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
            raise ConfigError("CONFIG", f"model.{name} = {chosen!r}", "unknown", fix)
    discrete = isinstance(transform, IntegerLevels) and transform.num_values <= MAX_VALUES
    if config.output == "categorical" and not discrete:
        cause = f"the data are not whole numbers of at most {MAX_VALUES} values"
        raise ConfigError("CONFIG", "model.output = 'categorical'", cause, "Use 'values'")
    if (config.loss == "hybrid") != (config.variance == "learned") and "bound" not in config.loss:
        cause = f"loss {config.loss!r} does not train variance {config.variance!r}"
        raise ConfigError("CONFIG", "model.loss", cause, "Use 'hybrid' or 'bound' with 'learned', else 'weighted_mse'")
    if config.loss == "continuous" and isinstance(time_sampling, times.UniformSteps | times.LossAwareSteps):
        cause = f"the times {config.times['name']!r} are steps of a chain, and this loss is of continuous time"
        raise ConfigError("CONFIG", "model.times", cause, "Use the times 'uniform'")
    if isinstance(schedule, LearnedChain) and config.loss != "full_bound":
        cause = "only the loss 'full_bound' trains it, with a variance of any kind"
        raise ConfigError("CONFIG", "model.schedule 'learned_chain'", cause, "Use it, or 'tabulated'")
    trains_schedule = config.loss == "continuous" and time_sampling == times.UniformTime()
    if isinstance(schedule, LearnedSchedule) and not trains_schedule:
        cause = "only the continuous loss at uniform times, {'name': 'uniform', 'low': 0.0}, trains it"
        raise ConfigError("CONFIG", "model.schedule 'learned'", cause, "Use them, or 'linear_log_snr'")


def check_process(
    config: ModelConfig,
    schedule: Schedule,
    time_sampling: times.TimeDistribution,
    weight: Weight,
    target: Target,
    chain: Sequence[NoiseLevel],
    next_level: Callable[[NoiseLevel], NoiseLevel],
) -> None:
    """Raises `ConfigError` for a loss of infinite weight, or if x cannot be recovered from the target on the chain."""
    try:
        t = schedule(time_sampling.sample(torch.tensor([0.0, 0.5, 1 - 1e-7], dtype=torch.float64)))
        s = next_level(t)
        continuous = config.loss == "continuous"
        w = -schedule.log_snr_rate(t.t) if continuous else weight(t, s)
        if not torch.isfinite(target.weight(w, t, s)).all():
            name = "the weight of the continuous loss" if continuous else f"weight {weight.name!r}"
            cause = f"{name} is not finite at every time of {config.times['name']!r}"
            raise ConfigError("CONFIG", "model.weight", cause, "Use the times 'uniform', or the weight 'simple'")
        if not target.needs_next_level:  # all levels at once: one by one they take most of the time of a small model
            target.check(stack(chain[:-1]))
            return
        for t, s in itertools.pairwise(chain):
            target.check(t, s)
    except (TypeError, ValueError) as error:
        fix = "Check the settings of times, weight and target"
        raise ConfigError("CONFIG", "model", f"its parts do not work together ({error})", fix) from None
