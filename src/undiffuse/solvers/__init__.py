"""Solvers by name: one file and one row each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
    "dpm++2s": partial(SingleStep, order=2),
    "dpm++3s": partial(SingleStep, order=3),
    "dpm++2m": partial(Multistep, points=2, rule="bh2"),
    "dpm++3m": partial(Multistep, points=3),
    "dpm++2m_sde": partial(Multistep, points=2, rule="bh2", eta=1.0),
    "dpm++3m_sde": partial(Multistep, points=3, eta=1.0),
    "exponential": partial(Multistep, points=4),
    "unipc": UniPC,
}


def build(name: str, **settings: object) -> Solver:
    """The solver called ``name`` with its settings. Raises `ConfigError`."""
    if name not in SOLVERS:
        raise ConfigError("SOLVER", repr(name), "no such solver", f"Use one of {', '.join(SOLVERS)}")
    try:
        return SOLVERS[name](**settings)
    except TypeError:
        raise ConfigError(
            "SOLVER", f"solver {name!r}", f"no such setting among {', '.join(settings)}", "See its documentation"
        ) from None


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
