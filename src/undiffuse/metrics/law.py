"""Whose samples have the law of the data: walks that draw noise and walks that do not, judged alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse import solvers
from undiffuse.advise import Choice, Reference, fitted, leaping, most
from undiffuse.diffusion import Diffusion
from undiffuse.errors import NonFiniteError
from undiffuse.metrics.distance import frechet, kernel

COMPONENTS = 64
"""Principal components of the data in which laws are compared, at most."""
GROUPS = 10
"""Parts of the samples of which one is left out at a time, for the standard error."""

LEAPS = (1.5, 3.0, 4.5, 6.0)
"""Log-SNRs from which a walk of few calls may go to data at once."""
ENDED = ("dpm++2m_sde", "dpm++3m_sde")
"""Solvers whose last step can be of low order, as a leap asks for."""
FINAL = 4
"""So many walks are compared by all samples, after all were by a quarter of them."""
FEWEST = 20
"""So many items are the least that can be compared."""


class Judged(NamedTuple):
    """A choice (None: other items of the data), and how far its samples' law is from that of the data.

    ``distance`` is the Fréchet distance, in units of x²; ``without`` (`GROUPS`,) the same with a part of the
    samples left out. ``kernel`` is the kernel distance of as many items of the data and its standard error.
    """

    choice: Choice | None
    distance: float
    without: Tensor
    kernel: tuple[float, float]

    @property
    def mean(self) -> tuple[float, float]:
        """The Fréchet distance and its standard error over the samples, by the jackknife; the data stay."""
        return self.distance, _jackknife(self.without)

    def behind(self, best: Judged) -> tuple[float, float]:
        """How much farther it is than ``best``, from the same starts: the difference and its standard error."""
        return self.distance - best.distance, _jackknife(self.without - best.without)


def noisy(model: Diffusion, known: Reference, calls: int) -> list[Choice]:
    """Walks of at most ``calls`` by the solvers that draw noise: even in t, Karras's, and fitted to the flow ``known``.

    Those that end low also leap to data from each of `LEAPS` inside the schedule. A solver without an order of
    convergence has none to be fitted by, and is left out.
    """
    schedule, found = model.schedule, []
    clean, top = float(model.levels[-1].log_snr), float(model.levels[0].log_snr)
    for name in solvers.SOLVERS:
        order = solvers.build(name).order
        if not solvers.build(name).draws or order is None:
            continue
        found += [most(Choice(name, 1, spacing), schedule, calls) for spacing in ("uniform", "karras")]
        even = partial(fitted, known, schedule, power=1 / (order + 1))
        found.append(most(Choice(name, 1, "fitted"), schedule, calls, even))
        for log_snr in LEAPS if name in ENDED and calls > 1 else ():
            bare = Choice(name, 1, f"to log-SNR {log_snr:g}", {"end": "low"})
            if top < log_snr < clean:
                found.append(most(bare, schedule, calls, partial(leaping, schedule, log_snr=log_snr)))
    return [choice for choice in found if choice is not None]


def compared(choice: Choice | None, drawn: Tensor, real: Tensor) -> Judged:
    """How far ``drawn`` features (n, D) are from the ``real`` ones (N, D)."""
    group, blocks = torch.arange(len(drawn)) % GROUPS, min(10, len(drawn) // 2, len(real) // 2)
    without = torch.tensor([frechet(drawn[group != g], real) for g in range(GROUPS)], dtype=torch.float64)
    return Judged(choice, frechet(drawn, real), without, kernel(drawn, real, blocks))


@torch.no_grad()
def judge(
    model: Diffusion,
    choices: Sequence[Choice],
    data: Tensor,
    others: Tensor,
    n: int = 500,
    seed: int = 0,
    batch: int = 64,
    tick: Callable[[int], None] = lambda steps: None,
) -> tuple[list[Judged], Judged]:
    """``choices`` by how far ``n`` samples of each are from the ``data`` values (N, ...), the nearest first; the floor.

    The floor is the same of ``n`` of the ``others`` (M, ...), items of the data too: the principal components are
    theirs. Walks whose samples are no numbers are left out. All samples are told nothing and have the same ``seed``.
    ``tick`` is called with the item-steps done.
    """
    first = others[torch.linspace(0, len(others) - 1, min(len(others), 2000)).long()]
    rows = model.codec.encode(first).flatten(1).double()
    axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:COMPONENTS]

    def features(values: Tensor) -> Tensor:
        return model.codec.encode(values).flatten(1).double() @ axes.T

    real = features(data)

    found = []
    for choice in choices:
        solver, spacing = model.solver(choice.solver, **choice.settings), choice.spacing
        walk = {"spacing": "uniform" if choice.times else spacing, "times": choice.times}
        with suppress(NonFiniteError):
            found.append(
                compared(choice, features(model.sample(n, seed, solver, choice.steps, batch, tick, **walk)), real)
            )
    return sorted(found, key=lambda one: one.distance), compared(None, features(others[-n:]), real)


def nearest(
    model: Diffusion,
    choices: Sequence[Choice],
    data: Tensor,
    others: Tensor,
    n: int = 500,
    seed: int = 0,
    tick: Callable[[int], None] = lambda steps: None,
) -> tuple[list[Judged], Judged]:
    """The `FINAL` best of ``choices`` as `judge` has it, first by a quarter of the ``n`` samples, then by all."""
    rough, _ = judge(model, choices, data, others, max(FEWEST, n // 4), seed, tick=tick)
    return judge(model, [one.choice for one in rough[:FINAL] if one.choice], data, others, n, seed, tick=tick)


def _jackknife(without: Tensor) -> float:
    return float(((len(without) - 1) * without.var(correction=0)).sqrt())
