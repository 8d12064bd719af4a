"""Which solver and which levels suit a model best for a given number of network calls, measured on the model itself.

Deterministic solvers approximate one thing, the end of the probability flow from a given start. All are given
the same starts, and what is measured is how far their ends are from those of a fine reference. Stochastic ones
draw from a law instead, which a common start does not compare: `metrics.law` judges them beside the best of these.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse import solvers
from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser, Prediction, Told
from undiffuse.errors import ConfigError
from undiffuse.grids import grid
from undiffuse.likelihood.continuous import finite_ends
from undiffuse.process.level import NoiseLevel
from undiffuse.process.schedule import Schedule
from undiffuse.sample import to_data, trajectory

F64 = torch.float64
SPACINGS = ("uniform", "log_snr", "karras", "quadratic")
"""The grids that every solver is tried on, beside one fitted to the model."""
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dpm++3m", {"start": "low"}),
    ("unipc", {"points": 3, "start": "low"}),
)
"""Tried beside every solver as it is: where calls are few, those of a start-up are many."""
SAME = {"euler": "ddim"}
"""Solvers that take the steps of another, as they are."""
BEST = 3
"""So many solvers are given a grid of their own."""
KNOTS = 4
"""A grid is refined by moving it at so many places."""


@dataclass(frozen=True)
class Choice:
    """A solver with its settings, and the levels that it walks: ``steps`` of a ``spacing``, or those at ``times``."""

    solver: str
    steps: int
    spacing: str = "uniform"
    settings: Mapping[str, Any] = field(default_factory=dict)
    times: tuple[float, ...] | None = None

    def levels(self, schedule: Schedule) -> list[NoiseLevel]:
        return grid(schedule, self.steps, self.spacing, times=self.times)

    def walk(self, denoise: Denoiser, start: Tensor) -> Tensor:
        """Where it ends from ``start`` (n, ...), in units of x, with noise 0."""
        solver, levels = solvers.build(self.solver, **self.settings), self.levels(denoise.schedule)
        nothing = torch.zeros_like(start)
        (last,) = deque(
            trajectory(denoise, solver, levels, start, lambda draws: nothing.expand(draws, *start.shape)), maxlen=1
        )
        return to_data(last.x, last.level)

    def calls(self, schedule: Schedule) -> int:
        """How many network calls a sample takes, start-up and last step included."""
        blind = _Blind(schedule)
        self.walk(blind, torch.ones(1, 1, dtype=F64))
        return blind.calls

    def __str__(self) -> str:
        return " ".join([self.solver, *(f"{name}={value}" for name, value in self.settings.items())])


class Measured(NamedTuple):
    """A choice, its network ``calls``, and the ``error`` of each item's end, (n,): RMSE over its numbers, of x."""

    choice: Choice
    calls: int
    error: Tensor

    @property
    def mean(self) -> tuple[float, float]:
        """Mean error of the items and its standard error."""
        return _mean(self.error)

    def behind(self, best: Measured) -> tuple[float, float]:
        """How much greater the error is than ``best``'s, item by item: mean and standard error."""
        return _mean(self.error - best.error)


class Reference(NamedTuple):
    """The flow: its ``end`` (n, ...), and ``coarse``, the RMSE (n,) between that and the end of half as many steps.

    ``change`` (len(levels) − 2,) is the root mean square by which x̂ changes from each of ``levels`` to the next.
    """

    end: Tensor
    coarse: Tensor
    levels: list[NoiseLevel]
    change: Tensor


class Advice(NamedTuple):
    """What was measured, the best first; the reference; and the solvers left out, each with the reason."""

    ranking: list[Measured]
    known: Reference
    left_out: dict[str, str]


def advise(
    denoise: Denoiser,
    start: Tensor,
    calls: int,
    tick: Callable[[int], None] = lambda calls: None,
    names: Sequence[str] | None = None,
    fine: int = 200,
    cond: Condition | None = None,
) -> Advice:
    """Solvers and grids of at most ``calls`` network calls, ranked by their error from ``start`` (n, ...) at t = 1.

    ``denoise`` is told ``cond``, one of each item of ``start``.

    The solvers are those (of ``names``) that draw no noise and have an order, on every one of `SPACINGS`. The best are
    also given a grid of their own: their best one or the `fitted` one, as `refine` makes it. The first half of the
    items serves for that, and the other to rank. ``tick`` is told of calls as they are made. Raises `ConfigError`.
    """
    if calls < 1 or fine < 4:
        where = f"calls = {calls}, fine = {fine}"
        raise ConfigError("ADVISE", where, "nothing can be measured", "Give at least 1 call, and 4 fine steps")
    schedule, left_out, tried, half = denoise.schedule, {}, [], len(start) // 2
    first = slice(half or None)
    told, half_told = (Told(denoise, cond and cond.take(items)) for items in (slice(None), first))
    known = reference(told, start, fine, tick)

    def measure(found: Choice) -> Measured:
        error = rmse(found.walk(told, start), known.end)
        tick(calls)
        return Measured(found, found.calls(schedule), error[half:])

    names = list(solvers.SOLVERS if names is None else names)
    for name, settings in [*((name, {}) for name in names), *(row for row in VARIANTS if row[0] in names)]:
        solver = solvers.build(name, **settings)
        if reason := _left_out(name, solver):
            left_out[name] = reason
            continue
        walks: dict[tuple[float, ...], Choice] = {}
        for spacing in SPACINGS:
            if found := most(Choice(name, 1, spacing, settings), schedule, calls):
                walks.setdefault(tuple(round(float(level.t), 9) for level in found.levels(schedule)), found)
        if walks:
            tried.append((solver.order, sorted(map(measure, walks.values()), key=_size)))
    ranking = [one for _, own in tried for one in own]
    for order, (best, *_) in sorted(tried, key=lambda own: _size(own[1][0]))[:BEST]:
        bare = replace(best.choice, spacing="fitted")
        own = most(bare, schedule, calls, lambda n, p=order: fitted(known, schedule, n, 1 / (p + 1)))
        better = refine([best.choice, *([own] if own else [])], half_told, start[first], known.end[first], tick)
        ranking += [] if better == best.choice else [measure(better)]
    return Advice(sorted(ranking, key=_size), known, left_out)


def refine(
    choices: Sequence[Choice],
    denoise: Denoiser,
    start: Tensor,
    end: Tensor,
    tick: Callable[[int], None] = lambda calls: None,
) -> Choice:
    """The one of ``choices`` whose walk from ``start`` is nearest to ``end``, with its levels moved where that helps.

    Around each of `KNOTS` places in turn the log-SNRs are raised or lowered, most at the place and not at all at the
    next one, by a whole, half and quarter of their mean distance. A move is kept if the mean error over the items falls
    by more than its standard error, item by item. The ends stay.
    """

    def error(of: Choice) -> Tensor:
        tick(of.steps)
        return rmse(of.walk(denoise, start), end)

    errors = [error(choice) for choice in choices]
    least, choice = min(zip(errors, choices, strict=True), key=lambda pair: float(pair[0].mean()))
    schedule, levels = denoise.schedule, choice.levels(denoise.schedule)
    t, lam = torch.stack([level.t for level in levels]), torch.stack([level.log_snr for level in levels])
    free = torch.isfinite(lam) & (t > 0) & (t < 1)
    inner = lam[free]
    if len(inner) < 2:
        return choice
    knots = torch.linspace(0, len(inner) - 1, min(KNOTS, len(inner)), dtype=F64)
    hats = (1 - (torch.arange(len(inner), dtype=F64) - knots[:, None]).abs() / knots[1]).clamp(min=0)

    def moved(to: Tensor) -> Choice | None:
        times = t.masked_scatter(free, _own(schedule.inverse(to), schedule))
        falls = bool((times.diff() < -1e-9).all())
        return replace(choice, spacing="fitted", times=tuple(times.tolist())) if falls else None

    for share in (1.0, 0.5, 0.25):
        for hat in share * float(inner.diff().mean()) * hats:
            for step in (hat, -hat):
                other = moved(inner + step)
                if other is None:
                    continue
                found = error(other)
                gain, stderr = _mean(least - found)
                if gain > stderr:
                    choice, inner, least = other, inner + step, found
                    break
    return choice


def reference(
    denoise: Denoiser, start: Tensor, steps: int = 200, tick: Callable[[int], None] = lambda calls: None
) -> Reference:
    """The flow from ``start`` (n, ...) at t = 1: ``steps`` steps of UniPC, equal in log-SNR, of third order."""
    ends, change, levels, before = [], [], [], None
    for fine in (steps // 2, steps):
        levels, solver, state, x = grid(denoise.schedule, fine, "log_snr"), solvers.build("unipc"), (), start
        change.clear()
        for i, (t, s) in enumerate(itertools.pairwise(levels)):
            watch = _Watch(denoise)
            x, state = solver.step(watch, x, t, s, state, start[:0])
            first = watch.seen[0]
            if before is not None and i > 0:
                change.append(float((first - before).square().mean().sqrt()))
            before = first
            tick(1)
        ends.append(to_data(x, levels[-1]))
    return Reference(ends[1], rmse(ends[0], ends[1]), levels, torch.tensor(change, dtype=F64))


def fitted(known: Reference, schedule: Schedule, steps: int, power: float) -> tuple[float, ...]:
    """Times from 1 to 0 that share ∫ (c |dx̂/dlambda|)^power dlambda out equally, lambda = ½ log_snr.

    A step of length h of a method of order p errs by about h^(p+1) times a derivative of x̂ over lambda, in units of
    x/alpha; c = √sigmoid(log_snr) is what data of unit variance keep of such an error to the end. The sum is least for
    steps as long as (that factor)^(−1/(p+1)), so ``power`` is 1/(p + 1). The first derivative stands for all of them.
    On a table the times are its own, and fewer where two fall on one.
    """
    from_noise, to_data = (int(math.isinf(known.levels[end].log_snr)) for end in (0, -1))
    lam = 0.5 * torch.stack([level.log_snr for level in known.levels[from_noise : len(known.levels) - to_data]])
    change = known.change[from_noise:]
    change = torch.cat([change, change[-1:]])[: len(lam) - 1]  # no x̂ is known at an end that is not data
    error = torch.sqrt(torch.sigmoid(lam[:-1] + lam[1:])) * change
    share = (error + 1e-6 * error.max() + 1e-300) ** power * lam.diff() ** (1 - power)
    total = torch.cat([torch.zeros(1, dtype=F64), share.cumsum(0)])
    goal = torch.arange(1, steps, dtype=F64) / steps * total[-1]
    i = torch.searchsorted(total, goal).clamp(1, len(share))
    t = schedule.inverse(2 * torch.lerp(lam[i - 1], lam[i], (goal - total[i - 1]) / share[i - 1]))
    return (1.0, *_own(t, schedule).unique().flip(0).tolist(), 0.0)


def leaping(schedule: Schedule, steps: int, log_snr: float) -> tuple[float, ...]:
    """Times from 1 to 0: ``steps`` − 1 steps of equal log_snr to the one given, and from there a leap to data.

    What lies beyond is noise that x̂ is rid of at once: with few calls it is not worth any. On a table as `fitted`.
    """
    line = torch.linspace(float(finite_ends(schedule)[0].log_snr.detach()), log_snr, steps, dtype=F64)[1:]
    return (1.0, *_own(schedule.inverse(line), schedule).unique().flip(0).tolist(), 0.0)


def most(
    bare: Choice,
    schedule: Schedule,
    calls: int,
    times: Callable[[int], tuple[float, ...] | None] = lambda steps: None,
) -> Choice | None:
    """``bare`` with as many steps (and the ``times`` of so many) as ``calls`` network calls allow; None if not one."""
    steps = calls // solvers.build(bare.solver, **bare.settings).calls + 2  # the first and the last may be DDIM's
    walks = (replace(bare, steps=n, times=times(n)) for n in range(min(steps, schedule.steps or steps), 0, -1))
    return next((walk for walk in walks if walk.calls(schedule) <= calls), None)


def _own(t: Tensor, schedule: Schedule) -> Tensor:
    """``t`` inside (0, 1), on a table its nearest own."""
    T = schedule.steps
    return t if T is None else (t * T).round().clamp(1, T - 1) / T


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """√mean((a − b)²) of each item, (n,) float64 on the CPU."""
    return (a.double() - b.double()).flatten(1).square().mean(1).sqrt().cpu()


def _size(one: Measured) -> float:
    return one.mean[0]


def _mean(error: Tensor) -> tuple[float, float]:
    return float(error.mean()), float(error.std()) / math.sqrt(len(error)) if len(error) > 1 else math.inf


def _left_out(name: str, solver: solvers.Solver) -> str | None:
    if name in SAME:
        return f"takes the steps of {SAME[name]}"
    if solver.order is None:
        return "has no order of convergence"
    return "draws noise" if solver.draws else None


@dataclass
class _Watch:
    """A denoiser that remembers the x̂ that it said."""

    denoise: Denoiser
    seen: list[Tensor] = field(default_factory=list)

    @property
    def schedule(self) -> Schedule:
        return self.denoise.schedule

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        prediction = self.denoise(x_t, level, cond, to)
        self.seen.append(prediction.x)
        return prediction


@dataclass
class _Blind:
    """A denoiser that says nothing and counts its calls."""

    schedule: Schedule
    calls: int = 0

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, to: NoiseLevel | None = None
    ) -> Prediction:
        self.calls += 1
        return Prediction(torch.zeros_like(x_t), torch.zeros_like(x_t))
