"""Solvers by name: one file and one row each."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable
from functools import partial
from inspect import Parameter

from undiffuse.errors import ConfigError
from undiffuse.solvers.adaptive import Adaptive
from undiffuse.solvers.ancestral import Ancestral
from undiffuse.solvers.ddim import DDIM
from undiffuse.solvers.dpm import SingleStep
from undiffuse.solvers.edm import EDM
from undiffuse.solvers.euler_maruyama import EulerMaruyama
from undiffuse.solvers.inversion import Inversion
from undiffuse.solvers.langevin import AnnealedLangevin
from undiffuse.solvers.multistep import Multistep
from undiffuse.solvers.predictor_corrector import Corrector, PredictorCorrector
from undiffuse.solvers.product import Product
from undiffuse.solvers.runge_kutta import RungeKutta
from undiffuse.solvers.solver import Solver, State
from undiffuse.solvers.unipc import UniPC

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ancestral": Ancestral,
    "ddim": DDIM,
    "annealed_langevin": AnnealedLangevin,
    "inversion": Inversion,
    "product": Product,
    "euler": partial(RungeKutta, "euler"),
    "heun": partial(RungeKutta, "heun", variable="angle"),
    "rk4": partial(RungeKutta, "rk4", variable="angle"),
    "adaptive": Adaptive,
    "edm": EDM,
    "euler_maruyama": EulerMaruyama,
    "predictor_corrector": PredictorCorrector,
    "dpm++2s": partial(SingleStep, 2),
    "dpm++3s": partial(SingleStep, 3),
    "dpm++2m": partial(Multistep, points=2, rule="bh2"),
    "dpm++3m": partial(Multistep, points=3),
    "dpm++2m_sde": partial(Multistep, points=2, rule="bh2", eta=1.0),
    "dpm++3m_sde": partial(Multistep, points=3, eta=1.0),
    "exponential": partial(Multistep, points=4),
    "unipc": UniPC,
}


def build(name: str, **settings: object) -> Solver:
    """The solver called ``name`` with its settings. Raises `ConfigError` for a name, kind or value that it has not."""
    if name not in SOLVERS:
        raise ConfigError("SOLVER", repr(name), "no such solver", f"Use one of {', '.join(SOLVERS)}")
    known = inspect.signature(SOLVERS[name], eval_str=True).parameters
    for key, value in settings.items():
        cause = _expected(known[key].annotation, value) if key in known else "there is no such setting"
        if cause is not None:
            has = f"Its settings are {', '.join(map(_shown, known.values()))}" if known else "It has no settings"
            raise ConfigError("SOLVER", f"{name}: {key} = {value!r}"[:100], cause, has)
    return SOLVERS[name](**settings)


def _expected(hint: object, value: object) -> str | None:
    """What a setting of this kind has to be, if ``value`` is not."""
    if hint in (int, float):
        number = type(value) is int or (hint is float and type(value) is float)
        finite = number and abs(value) <= sys.float_info.max  # type: ignore[operator]
        return None if finite else f"it has to be a {'whole' if hint is int else 'finite'} number"
    word = str in (hint, *typing.get_args(hint))
    if value is None or isinstance(value, bool | int | float | list | dict) or (isinstance(value, str) and not word):
        return "it has to be a word" if word else "it has to be an object, which only Python can give"
    return None


def _shown(setting: Parameter) -> str:
    plain = isinstance(setting.default, int | float | str)
    return f"{setting.name}={setting.default}" if plain else f"{setting.name} (in Python only)"


__all__ = [
    "DDIM",
    "EDM",
    "SOLVERS",
    "Adaptive",
    "Ancestral",
    "AnnealedLangevin",
    "Corrector",
    "EulerMaruyama",
    "Inversion",
    "Multistep",
    "PredictorCorrector",
    "Product",
    "RungeKutta",
    "SingleStep",
    "Solver",
    "State",
    "UniPC",
    "build",
]
