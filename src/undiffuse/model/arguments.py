"""Checks of the arguments of `Diffusion`'s methods: a wrong one is an error that names it, before any computation."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.data.transform import DataTransform, IntegerLevels, values_transform
from undiffuse.denoising.guidance import Guide
from undiffuse.errors import ConfigError, DataError
from undiffuse.model.config import ModelConfig
from undiffuse.model.noisy_classifier import NoisyClassifier
from undiffuse.networks.condition import Condition
from undiffuse.sampling.sampler import DEFAULT_NUM_STEPS, Sampler

OPTIONAL = ("mc_samples",)


def check_counts(**arguments: tuple[Any, int]) -> None:
    """Raises `ConfigError` unless each argument, (value, minimum) by name, is a whole number or, if optional, None."""
    for name, (value, minimum) in arguments.items():
        if value is None and name in OPTIONAL:
            continue
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)  # NumPy's integers too
        if not whole or value < minimum:  # pyright: ignore[reportOptionalOperand]
            cause = f"it is not a whole number of at least {minimum}"
            raise ConfigError("ARGUMENT", f"{name} = {value!r}"[:80], cause, "Give such a number")


def check_items(name: str, x: Any, item_shape: tuple[int, ...]) -> Tensor:
    """``x``, if it is a tensor (n, *item_shape) of at least one item. Raises `ConfigError`."""
    if not isinstance(x, Tensor):
        fix = "Give a tensor, such as torch.from_numpy(array)"
        raise ConfigError("ARGUMENT", name, f"it is a {type(x).__name__}, not a tensor", fix)
    if tuple(x.shape[1:]) != item_shape or not x.ndim:
        cause = f"its shape is {tuple(x.shape)}, not (n, {', '.join(map(str, item_shape))})"
        raise ConfigError("ARGUMENT", name, cause, "Give a batch of items of the model's shape")
    if not len(x):
        raise ConfigError("ARGUMENT", name, "it has no items", "Give one or more")
    return x


def check_values(values: Any, item_shape: tuple[int, ...], transform: DataTransform) -> Tensor:
    """``values``, if they are items in the units of the data that the model can have been trained on.

    Raises `ConfigError` for a wrong type or shape, `DataError` for integers outside of the levels, and for NaN or
    infinite numbers.
    """
    check_items("values", values, item_shape)
    transform = values_transform(transform)
    if isinstance(transform, IntegerLevels):
        if values.is_floating_point() or values.is_complex():
            cause = f"they are {values.dtype}, and the model is of whole numbers"
            raise ConfigError("ARGUMENT", "values", cause, "Give integers, the values of the data themselves")
        low, high = (int(end) for end in values.to(torch.int64).aminmax())
        if low < 0 or high >= transform.num_values:
            cause = f"they range from {low} to {high}, and the model's values are 0 to {transform.num_values - 1}"
            raise DataError("RANGE", "values", cause, "Give values of the data that the model was trained on")
    elif not bool(torch.isfinite(values).all()):
        raise DataError("NON_FINITE", "values", "some are NaN or infinite", "Remove these items")
    return values


def check_batch(x: Any, u: Any, eps: Any, z: Any, item_shape: tuple[int, ...]) -> None:
    """Raises `ConfigError` unless values, uniform numbers and noise of a training step are of one batch."""
    for name, noise in (("values", x), ("eps", eps), *([] if z is None else [("z", z)])):
        check_items(name, noise, item_shape)
        if len(noise) != len(x):
            raise ConfigError("ARGUMENT", name, f"it has {len(noise)} items, and values {len(x)}", "Give one for each")
    if not isinstance(u, Tensor) or u.shape != x.shape[:1]:
        cause = f"its shape is {tuple(getattr(u, 'shape', ()))}, not ({len(x)},)"
        raise ConfigError("ARGUMENT", "u", cause, "Give a number of [0, 1) for each item")


def check_condition(cond: Any) -> Condition:
    """``cond``, if it is a `Condition`. Raises `ConfigError`."""
    if not isinstance(cond, Condition):
        cause, fix = f"it is a {type(cond).__name__}, not a Condition", "Give Condition(label=labels), for example"
        raise ConfigError("CONDITION", "cond", cause, fix)
    return cond


def check_guide(guide: Any, sizes: Mapping[str, int]) -> None:
    """Raises `ConfigError` unless ``guide`` is None or a `Guide` whose negative condition is an item of ``sizes``."""
    if guide is None:
        return
    if not isinstance(guide, Guide):
        fix = "Give Guide(negative=...), for example"
        raise ConfigError("GUIDANCE", "guide", f"it is a {type(guide).__name__}, not a Guide", fix)
    if guide.negative is not None:
        check_condition(guide.negative).validate_for(sizes, 1)


def check_classifier_labels(guide: Guide | None, cond: Condition) -> None:
    """Raises `ConfigError` if the classifier of ``guide``, where it is known, lacks a label of ``cond``."""
    classifier = getattr(guide and guide.log_prob, "__self__", None)
    if isinstance(classifier, NoisyClassifier):
        classifier.check_labels(cond)


def check_small_image(cond: Condition | None, sizes: Mapping[str, int]) -> None:
    """Raises `ConfigError` if a super-resolution model gets no image to enlarge."""
    if "image" in sizes and (cond is None or cond.image is None):
        cause = "the model enlarges images, and there is none to enlarge"
        raise ConfigError("CONDITION", "cond", cause, "Give Condition(image=...), or use a Cascade")


def check_sampler(sampler: Any, chain_length: int) -> Sampler:
    """``sampler``, or that of a solver's name, with `DEFAULT_NUM_STEPS` on a chain of so many. Raises `ConfigError`."""
    if isinstance(sampler, str):
        return Sampler(sampler, min(DEFAULT_NUM_STEPS, chain_length))
    if not isinstance(sampler, Sampler):
        cause = f"it is a {type(sampler).__name__}, neither a Sampler nor the name of a solver"
        raise ConfigError("ARGUMENT", "sampler", cause, "Give Sampler(...), or a name such as 'ddim'")
    return sampler


def check_predicts_mean(config: ModelConfig, where: str | Path = "this model") -> None:
    """Raises `ConfigError` for a consistency model; a flow map with s = t predicts means like its teacher."""
    if config.few_call_solver == "consistency":
        cause = "it is a consistency model: its predictions are samples of the data, and this needs their means"
        raise ConfigError("DISTILLED", where, cause, "Use the model that it was distilled from")


def check_trainable(model: nn.Module, what: str) -> None:
    """Raises `ConfigError` if the weights are inference tensors, because ``what`` needs gradients."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        cause = f"the weights were made under torch.inference_mode, and {what} needs gradients through them"
        raise ConfigError("INFERENCE_MODE", "model", cause, "Build, load, cast and move the model outside of it")


def outside_inference_mode(tensor: Tensor) -> Tensor:
    """``tensor``, or its copy that can be part of a gradient if it was made under inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
