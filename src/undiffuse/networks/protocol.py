"""What a network may declare beside its forward pass, and the default for each declaration.

A network is an ``nn.Module`` whose ``forward(x, time, cond=None)`` returns y (B, out_channels, ...): x is (B, C, ...)
or (B, D), y has the size of x, ``time`` (B,) is a real number and ``cond`` a `Condition` or None. x has the type of the
weights; the time is float32 at least, as steps and log-SNRs are not distinct in bfloat16. The rest is optional:

- Arguments of its constructor called ``channels``, ``out_channels``, ``dims`` (dimensions beside the channels) and
  ``item_shape`` are supplied by the model. All others are settings, plain data in the configuration.
- Settings called ``classes``, ``vector``, ``tokens``, ``image`` and ``text`` are the sizes of the conditions that it
  accepts; without the setting it does not accept that condition.
- A setting called ``two_times`` makes it accept ``cond.end_time`` (B,), encoded like ``time``: it is then a flow map.
  Without an end time, and with one that equals ``time``, its output is the same. `undiffuse distill` sets it.
- ``item_dims``, a class attribute: the numbers of dimensions beside the channels that it accepts; default any.
- ``blocks()``: the modules to recompute in the backward pass (activation checkpointing) and to shard one by one;
  default the entries of every ``nn.ModuleList`` directly in it.
- ``init_statistics(statistics)``, of any sub-module: sets what starts from `DataStatistics`; default nothing.
- ``encoder()``: its modules before the output as a module of their own, which maps (x, time, cond) to features
  (B, ``feature_channels``, ...), normalized for a classifier by ``feature_norm``, a row of `NORMS` (default "group");
  default: a classifier is the network itself, its output averaged over positions. For attention pooling it also has
  a method ``feature_size(size)``, the size of the features of items of ``size``, and may have ``feature_heads``, the
  number of heads (default 1).
- ``zero_ends``, an attribute of any sub-module: names of its parameters that are set to zero where they are new in a
  network that starts from the weights of one without them, so that its output is that network's at first.
- ``adapt_weights(weights, label_rows)``, of any sub-module: its tensors by name, from its ``weights`` in a network with
  other conditions, where shapes, order or names are others; ``label_rows`` has for each class its number there, −1 for
  a class that is new, and is None where the classes are the same.
- ``settings`` and ``condition_sizes``, attributes of an instance that was built by hand: the arguments of its
  constructor, for loading by class, and the conditions that it accepts, such as ``{"classes": 10}``; default none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from undiffuse.errors import ConfigError
from undiffuse.networks.condition import CONDITION_SETTINGS, Condition

CHECK_ITEMS = 2
"""Items of the forward pass on zeros that `check_output` does."""


class DataStatistics(Protocol):
    """Statistics of the training data, computed when they are read."""

    @property
    def counts(self) -> Tensor:
        """(channels, num_values): how often each value of discrete data occurs."""
        ...

    @property
    def vector_moments(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (D,) of the vectors of conditions, 1 where they do not vary; None without."""
        ...


def declared_method(network: nn.Module, name: str) -> Callable[..., Any] | None:
    """The method called ``name``; None without one, also where that is a sub-module or a number."""
    attribute = getattr(network, name, None)
    return attribute if callable(attribute) and not isinstance(attribute, nn.Module) else None


def weight_dtype(network: nn.Module, default: torch.dtype) -> torch.dtype:
    """The type of the network's first weight, in which it gets its input; ``default`` without weights."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), default)


@contextmanager
def evaluation_mode(*networks: nn.Module) -> Iterator[None]:
    """Context in which all ``networks`` are in evaluation mode; afterwards each of their modules has its mode again."""
    training = [module for network in networks for module in network.modules() if module.training]
    for network in networks if training else ():
        network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def in_evaluation_mode(steps: Iterator[Any], *networks: nn.Module) -> Iterator[Any]:
    """``steps``, each computed in the `evaluation_mode` of the ``networks``."""
    while True:
        with evaluation_mode(*networks):
            try:
                step = next(steps)
            except StopIteration:
                return
        yield step


def accepts_dims(network: nn.Module | type[nn.Module], dims: int) -> bool:
    """Whether the network, or class, takes items of ``dims`` dimensions beside the channels."""
    item_dims = getattr(network, "item_dims", None)
    return item_dims is None or dims in item_dims


def condition_sizes(settings: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of the conditions that a network of these ``settings`` accepts, by the name of the setting."""
    return {name: size for name in CONDITION_SETTINGS if (size := settings.get(name, 0))}


def blocks(network: nn.Module) -> list[nn.Module]:
    """The modules to recompute and to shard one by one, disjoint and each called as a module in the forward pass."""
    if (declared := declared_method(network, "blocks")) is not None:
        return list(declared())
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


def set_checkpointing(network: nn.Module, on: bool) -> None:
    """Makes the backward pass recompute the `blocks`, or without any the whole network, instead of keeping them.

    The names of the tensors and all results stay the same.
    """
    for block in blocks(network) or [network]:
        block.__dict__.pop("forward", None)
        if on:
            block.forward = functools.partial(_recomputed, block)


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def init_statistics(network: nn.Module, statistics: DataStatistics) -> None:
    """Gives the statistics of the training data to every sub-module that starts from them. Before any training."""
    for module in network.modules():
        if (start := declared_method(module, "init_statistics")) is not None:
            start(statistics)


def adapt_weights(
    network: nn.Module, weights: Mapping[str, Tensor], label_rows: Sequence[int] | None
) -> dict[str, Tensor]:
    """The ``weights`` of a network with other conditions, adapted by the sub-modules of ``network`` that declare how.

    By name, and others than the network's where no sub-module adapts them. ``label_rows`` as in the declaration.
    """
    adapted = dict(weights)
    for name, module in network.named_modules():
        if (adapt := declared_method(module, "adapt_weights")) is not None:
            prefix = f"{name}." if name else ""
            own = {key.removeprefix(prefix): adapted.pop(key) for key in list(adapted) if key.startswith(prefix)}
            adapted |= {prefix + key: tensor for key, tensor in adapt(own, label_rows).items()}
    return adapted


@torch.no_grad()
def zero_new_ends(network: nn.Module, new: Collection[str]) -> None:
    """Sets the ``zero_ends`` of every sub-module to zero that are among the names ``new``."""
    for name, module in network.named_modules():
        own = dict(module.named_parameters())
        for end in getattr(module, "zero_ends", ()):
            if (f"{name}.{end}" if name else end) in new:
                own[end].zero_()


def check_output(
    network: nn.Module, item_shape: Sequence[int], out_channels: int, sizes: Mapping[str, int], name: str
) -> None:
    """Raises `ConfigError` unless ``network`` has weights and maps zeros (B, *item_shape) to (B, out_channels, ...).

    Called once without a condition and, if it accepts any (``sizes``), once with the null condition. The network's
    modes and the random state stay as they are.
    """
    first = next(network.parameters(), None)
    if first is None:
        raise ConfigError("NETWORK", name, "it has no parameters", "Give a network that can be trained")
    B, device = CHECK_ITEMS, first.device
    x, time = torch.zeros(B, *item_shape, device=device, dtype=first.dtype), torch.zeros(B, device=device)
    time = time.to(torch.promote_types(first.dtype, time.dtype))
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus), torch.no_grad(), evaluation_mode(network):
            outputs = [network(x, time, cond) for cond in [None, *([_null_condition(sizes, x)] if sizes else [])]]
    except Exception as error:
        cause = f"its forward pass fails on items of shape {tuple(item_shape)} ({type(error).__name__}: {error})"
        raise ConfigError("NETWORK", name, cause[:300], "Correct it; it is called as forward(x, time, cond)") from error
    expected = (B, out_channels, *item_shape[1:])
    for y in outputs:
        shape = tuple(y.shape) if isinstance(y, Tensor) else f"no tensor ({type(y).__name__})"
        if shape != expected:
            cause = f"from zeros of shape {tuple(x.shape)} it makes {shape}, not {expected}"
            fix = f"Give it {out_channels} output channels (an argument out_channels of its constructor is set to that)"
            if out_channels != item_shape[0]:
                fix += ", or train with output = 'values' and a fixed variance, which need one for each channel of x"
            raise ConfigError("NETWORK", name, cause, fix)


def _null_condition(sizes: Mapping[str, int], x: Tensor) -> Condition:
    B, vector, tokens, image = len(x), sizes.get("vector"), sizes.get("tokens"), sizes.get("image")
    return Condition(
        label=x.new_zeros(B, dtype=torch.int64) if sizes.get("classes") else None,
        vector=x.new_zeros(B, vector) if vector else None,
        tokens=x.new_zeros(B, 1, tokens) if tokens else None,
        image=x.new_zeros(B, image, *x.shape[2:]) if image else None,
        text=x.new_zeros(B, 1, dtype=torch.int64) if sizes.get("text") else None,
    ).null()
