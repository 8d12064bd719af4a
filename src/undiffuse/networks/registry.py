"""Kinds of networks by name, a user's own among them."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from undiffuse.errors import ConfigError
from undiffuse.networks.condition import CONDITION_NAMES, CONDITION_SETTINGS
from undiffuse.networks.protocol import accepts_dims
from undiffuse.networks.settings import require
from undiffuse.networks.tables import BUILT_IN_NETWORKS, INSTALLED_NETWORKS
from undiffuse.runtime.machine import available_memory

NETWORKS: dict[str, Any] = dict(BUILT_IN_NETWORKS)
"""The class of each kind; `register` adds to it, and `find` the kinds of plugins when they are looked up."""
BUILT_IN = tuple(NETWORKS.items())

WEIGHT_COPIES = 2
"""Copies of its weights that every use of a network needs."""


def register(name: str, cls: type[nn.Module]) -> None:
    """Makes ``cls`` a kind of network called ``name`` for configurations and checkpoints, until the process ends.

    `undiffuse.networks.protocol` lists what the class may declare. Raises `ConfigError` for a class that is no
    ``nn.Module`` and for the name of a built-in kind.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ConfigError("NETWORK", repr(name), f"{cls!r} is not a subclass of nn.Module", "Give a class that is")
    if name in dict(BUILT_IN) and cls is not dict(BUILT_IN)[name]:
        raise ConfigError("NETWORK", repr(name), "this is a built-in kind of network", "Choose another name")
    NETWORKS[name] = cls


def kind_of(network: nn.Module | type[nn.Module]) -> str:
    """The name that a checkpoint records: the registered one of a class, else the name of the class.

    An instance has the registered name only if it declares its ``settings``, from which it can be built again.
    """
    rebuildable = isinstance(network, type) or isinstance(getattr(network, "settings", None), Mapping)
    return names_of(network)[0 if rebuildable else -1]


def names_of(network: nn.Module | type[nn.Module]) -> list[str]:
    """The names that a network, or class, is registered under, and last the name of its class."""
    cls = network if isinstance(network, type) else type(network)
    return [*(name for name, registered in NETWORKS.items() if registered is cls), cls.__name__]


def network_settings(network: nn.Module | type[nn.Module], settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` of a configuration, if they are of the kind of ``network`` or name none, else its kind alone.

    An instance adds what it declares. Raises `ConfigError` where this is no plain data, or where ``settings`` contain
    a condition that the instance does not declare, or name no kind and are not those of the instance.
    """
    kind = kind_of(network)
    chosen = {"kind": kind, **settings} if settings.get("kind", kind) == kind else {"kind": kind}
    if isinstance(network, type):
        return chosen
    declared = dict(getattr(network, "settings", None) or {})
    for name in settings if "kind" not in settings else ():
        if name not in CONDITION_SETTINGS and settings[name] != declared.get(name):
            cause = f"the setting {name!r} is for a class, and this network is built already"
            raise ConfigError("NETWORK", kind, cause, "Give the class, or leave the setting out")
    declared |= {name: size for name, size in (getattr(network, "condition_sizes", None) or {}).items() if size}
    for name in CONDITION_SETTINGS:
        if chosen.get(name, 0) != declared.get(name, 0) and name in chosen:
            cause = f"it does not declare the condition {name!r} of size {chosen[name]}"
            fix = (
                "Give it an attribute condition_sizes, see undiffuse.networks.protocol, or train without --conditional"
            )
            raise ConfigError("NETWORK", kind, cause, fix)
    try:
        return json.loads(json.dumps({**chosen, **declared}, allow_nan=False))
    except (TypeError, ValueError) as error:
        cause = f"its settings are not plain data ({error})"
        raise ConfigError("NETWORK", kind, cause[:300], "Keep numbers, strings and lists in the attribute") from None


def find(kind: str) -> type[nn.Module]:
    """The class of a ``kind``. Raises `ConfigError`."""
    if kind not in NETWORKS and kind in INSTALLED_NETWORKS:
        register(kind, INSTALLED_NETWORKS[kind])  # pyright: ignore[reportArgumentType]
    names = dict.fromkeys([*INSTALLED_NETWORKS, *NETWORKS])
    fix = f"Choose {' or '.join(names)}, or register your own class (--network FILE.py:NAME on the command line)"
    require(kind in NETWORKS, "kind", f"there is no network {kind!r}", fix)
    return NETWORKS[kind]


def build(kind: str, **settings: Any) -> nn.Module:
    """The network of that ``kind`` with those settings. Raises `ConfigError` for an unknown kind or setting."""
    return construct(find(kind), kind, settings)


def construct(cls: type[nn.Module], kind: str, settings: Mapping[str, Any]) -> nn.Module:
    """``cls(**settings)``. Raises `ConfigError` for settings that it does not take and weights that need more memory
    than there is.

    Of a class that is not built in every failure is a `ConfigError`.
    """
    parameters = _parameters(cls)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown = next((name for name in settings if name not in parameters), None)
        cause = f"a network of kind {kind!r} has no such setting"
        fix = f"Choose from {', '.join(parameters) or 'none'}"
        if unknown in CONDITION_NAMES:
            cause = f"a network of kind {kind!r} cannot be conditioned on {CONDITION_NAMES[unknown]}"
            fix = "Train without them, or with another kind of network, such as unet"
        require(unknown is None, str(unknown), cause, fix)
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        require(name in settings or not needed, name, f"a network of kind {kind!r} needs this setting", "Give it")
    need = WEIGHT_COPIES * 4.0 * _count_parameters(cls, settings)
    widest = max(("widths", "width"), key=lambda name: name in settings)
    limit = available_memory()
    cause = f"its weights alone need {need / 1e9:,.0f} GB of memory, and {limit / 1e9:,.0f} GB may be used here"
    require(need <= limit, widest, cause, "Give a smaller network")
    try:
        return cls(**settings)
    except (ConfigError, MemoryError):
        raise
    except Exception as error:
        if is_built_in(cls):
            raise
        cause = f"its constructor fails ({type(error).__name__}: {error})"
        fix = f"Correct the class, or its settings ({', '.join(settings) or 'none'})"
        raise ConfigError("NETWORK", kind, cause[:300], fix) from error


def accepted(cls: type[nn.Module], names: Iterable[str]) -> list[str]:
    """Those of the ``names`` that are arguments of the constructor of ``cls``."""
    return [name for name in names if name in _parameters(cls)]


def with_defaults(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` of a network of that ``kind`` and the defaults of all others, where the kind is known."""
    cls = NETWORKS.get(kind) or INSTALLED_NETWORKS.get(kind)
    parameters = _parameters(cls).items() if isinstance(cls, type) else ()
    return {name: p.default for name, p in parameters if p.default is not p.empty} | dict(settings)


def check_dims(network: nn.Module | type[nn.Module], kind: str, item_shape: tuple[int, ...]) -> None:
    """Raises `ConfigError` where the network, or class, does not take items of ``item_shape``."""
    dims = len(item_shape) - 1
    if not accepts_dims(network, dims):
        others = [repr(name) for name, cls in NETWORKS.items() if accepts_dims(cls, dims)]
        cause = f"a network of kind {kind!r} does not take items of shape {item_shape}"
        raise ConfigError("CONFIG", "model.network", cause, f"Use {' or '.join(others)}")


def load_class(text: str) -> type[nn.Module]:
    """The class NAME of ``FILE.py:NAME``, which is a user's own file: it is run. Raises `ConfigError`.

    No file that undiffuse writes or reads leads here: the text comes from the command line alone.
    """
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ConfigError("NETWORK", text, "this is not FILE.py:NAME", "Name a file and a class in it: my_net.py:Net")
    path = Path(file)
    if not path.is_file():
        raise ConfigError("NETWORK", text, f"there is no file {file}", "Give the path of the file")
    spec = importlib.util.spec_from_file_location(f"undiffuse_network_{path.stem}", path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module, folder = importlib.util.module_from_spec(spec), str(path.resolve().parent)
    sys.modules[spec.name] = module  # needed by dataclasses in the file
    sys.path.append(folder)  # for what the file imports beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        cause = f"running the file fails ({type(error).__name__}: {error})"
        raise ConfigError("NETWORK", text, cause[:300], "Correct the file") from error
    finally:
        sys.path.remove(folder)
    cls = getattr(module, name, None)
    if cls is None:
        raise ConfigError("NETWORK", text, f"the file has no {name!r}", "Name a class of the file")
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ConfigError("NETWORK", text, f"{name!r} is not a subclass of nn.Module", "Name a class that is")
    return cls


def _parameters(cls: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """The arguments of the constructor; none where the class has only that of ``nn.Module``."""
    return {} if cls.__init__ is nn.Module.__init__ else inspect.signature(cls).parameters


def is_built_in(network: nn.Module | type[nn.Module]) -> bool:
    """Whether ``network`` is, or is an instance of, a class of `BUILT_IN`; a subclass is not."""
    cls = network if isinstance(network, type) else type(network)
    return any(cls is built_in for _, built_in in BUILT_IN)


class _WithoutNormalDraws(TorchFunctionMode):
    """Leaves out normal_: for a tensor without storage torch imports its compiler there, which takes over a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in (torch.Tensor.normal_, nn.init.normal_):
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def _count_parameters(cls: type[nn.Module], settings: Mapping[str, Any]) -> int:
    """The numbers in the weights of ``cls(**settings)``, from a copy without storage; 0 where it cannot have one."""
    try:
        with torch.device("meta"), _WithoutNormalDraws():
            return sum(parameter.numel() for parameter in cls(**settings).parameters())
    except (ConfigError, MemoryError):
        raise
    except Exception:
        if is_built_in(cls):
            raise
        return 0
