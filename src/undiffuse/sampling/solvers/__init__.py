"""Solvers by name: a new one is one file and one row here, or a plugin. Listing the names imports no torch."""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import TYPE_CHECKING

from undiffuse.errors import ConfigError, unknown_name
from undiffuse.runtime.lazy_table import LazyTable, row
from undiffuse.runtime.plugins import WithPlugins

if TYPE_CHECKING:
    from undiffuse.sampling.solvers.solver import Solver

BUILT_IN_SOLVERS: Mapping[str, Callable[..., Solver]] = LazyTable(
    {
        "ancestral": row("sampling.solvers.ancestral", "Ancestral"),
        "ddim": row("sampling.solvers.ddim", "DDIM"),
        "annealed_langevin": row("sampling.solvers.langevin", "AnnealedLangevin"),
        "euler": row("sampling.solvers.runge_kutta", "RungeKutta", "euler"),
        "heun": row("sampling.solvers.runge_kutta", "RungeKutta", "heun", variable="angle"),
        "rk4": row("sampling.solvers.runge_kutta", "RungeKutta", "rk4", variable="angle"),
        "adaptive": row("sampling.solvers.adaptive", "Adaptive"),
        "edm": row("sampling.solvers.edm", "EDM"),
        "euler_maruyama": row("sampling.solvers.euler_maruyama", "EulerMaruyama"),
        "predictor_corrector": row("sampling.solvers.predictor_corrector", "PredictorCorrector"),
        "dpm++2s": row("sampling.solvers.dpm_singlestep", "SingleStep", 2),
        "dpm++3s": row("sampling.solvers.dpm_singlestep", "SingleStep", 3),
        "dpm++2m": row("sampling.solvers.dpm_multistep", "Multistep", points=2, rule="bh2"),
        "dpm++3m": row("sampling.solvers.dpm_multistep", "Multistep", points=3),
        "dpm++2m_sde": row("sampling.solvers.dpm_multistep", "Multistep", points=2, rule="bh2", eta=1.0),
        "dpm++3m_sde": row("sampling.solvers.dpm_multistep", "Multistep", points=3, eta=1.0),
        "exponential": row("sampling.solvers.dpm_multistep", "Multistep", points=4),
        "unipc": row("sampling.solvers.unipc", "UniPC"),
        "consistency": row("sampling.solvers.consistency", "ConsistencySampling"),
        "flow_map": row("sampling.solvers.flow_map", "FlowMapSampling"),
    }
)
SOLVERS = WithPlugins(BUILT_IN_SOLVERS, "undiffuse.solvers")


def build(name: str, **settings: object) -> Solver:
    """The solver called ``name`` with its settings. Raises `ConfigError` for an unknown name or a wrong setting."""
    if name not in SOLVERS:
        raise unknown_name("SOLVER", name, "solver", SOLVERS)
    solver = SOLVERS[name]
    parameters = inspect.signature(solver, eval_str=True).parameters
    for key, value in settings.items():
        cause = "there is no such setting"
        if key in parameters:
            cause = _type_error(parameters[key].annotation, value)
        if cause is not None:
            fix = (
                f"Its settings are {', '.join(map(_describe, parameters.values()))}"
                if parameters
                else "It has no settings"
            )
            raise ConfigError("SOLVER", f"{name}: {key} = {value!r}"[:100], cause, fix)
    return solver(**settings)


def _type_error(annotation: object, value: object) -> str | None:
    """Why ``value`` is not of the annotated type; None if it is."""
    if annotation in (int, float):
        is_number = type(value) is int or (annotation is float and type(value) is float)
        is_finite = is_number and abs(value) <= sys.float_info.max  # type: ignore[operator]
        return None if is_finite else f"it has to be a {'whole' if annotation is int else 'finite'} number"
    if annotation is bool:
        return None if isinstance(value, bool) else "it has to be true or false"
    takes_word = str in (annotation, *typing.get_args(annotation))
    is_plain = value is None or isinstance(value, bool | int | float | list | dict)
    if is_plain or (isinstance(value, str) and not takes_word):
        return "it has to be a word" if takes_word else "it has to be an object, which only Python can give"
    return None


def _describe(setting: Parameter) -> str:
    is_plain = isinstance(setting.default, int | float | str)
    default = str(setting.default).lower() if isinstance(setting.default, bool) else setting.default
    return f"{setting.name}={default}" if is_plain else f"{setting.name} (in Python only)"
