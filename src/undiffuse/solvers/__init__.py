"""Solvers by name: one file and one row each."""

from __future__ import annotations

from collections.abc import Callable

from undiffuse.errors import ConfigError
from undiffuse.solvers.ancestral import Ancestral
from undiffuse.solvers.ddim import DDIM
from undiffuse.solvers.inversion import Inversion
from undiffuse.solvers.langevin import AnnealedLangevin
from undiffuse.solvers.product import Product
from undiffuse.solvers.solver import Solver, State

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ancestral": Ancestral,
    "ddim": DDIM,
    "annealed_langevin": AnnealedLangevin,
    "inversion": Inversion,
    "product": Product,
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


__all__ = ["DDIM", "SOLVERS", "Ancestral", "AnnealedLangevin", "Inversion", "Product", "Solver", "State", "build"]
