"""Find the solver and the noise levels that suit a model best for a given number of network calls.

Deterministic solvers all approximate the same quantity, the endpoint of the probability flow from a given start. Each
gets the same starts, and its error is the distance of its endpoints to those of a fine reference. Stochastic solvers
draw from a distribution instead, which a common start cannot compare: `evaluation.sampler_ranking` compares them with
the best deterministic one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import ConditionedDenoiser, Denoiser, DenoiserWrapper, Prediction
from undiffuse.errors import ConfigError, NonFiniteError
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.schedule import Schedule, finite_ends
from undiffuse.process.statistics import mean_with_stderr
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers import SOLVERS, build
from undiffuse.sampling.solvers.solver import Solver
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import check_finite, last_step, rescale, trajectory

F64 = torch.float64
SEARCH_SPACINGS = ("uniform", "log_snr", "karras", "quadratic")
"""The spacings that every solver is measured with, beside times fitted to the model."""
SEARCH_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dpm++3m", {"start": "low"}),
    ("unipc", {"points": 3, "start": "low"}),
)
"""Measured beside the default settings: with few calls, the calls of a high-order start are too many."""
ALIASES = {"euler": "ddim"}
"""Solvers that with default settings take the steps of another."""
NUM_REFINED = 3
"""Number of solvers whose times are refined."""
NUM_KNOTS = 4
"""Number of knots at which refinement moves the times."""


class MeasuredSampler(NamedTuple):
    """A sampler, its network ``calls``, and the ``error`` of each item's endpoint, (n,): the RMSE in units of x."""

    sampler: Sampler
    calls: int
    error: Tensor

    @property
    def mean_error(self) -> tuple[float, float]:
        """Mean error of the items and its standard error."""
        return mean_with_stderr(self.error)

    def regret(self, best: MeasuredSampler) -> tuple[float, float]:
        """Mean and standard error of the paired difference: this error minus that of ``best``."""
        return mean_with_stderr(self.error - best.error)


class Reference(NamedTuple):
    """The flow: its ``endpoint`` (n, ...), and ``coarse_error`` (n,), its RMSE to the endpoint of half as many steps.

    ``x_change`` (len(noise_levels) − 2,) is the root mean square change of x̂ from each of ``noise_levels`` to the next.
    """

    endpoint: Tensor
    coarse_error: Tensor
    noise_levels: list[NoiseLevel]
    x_change: Tensor


class SearchResult(NamedTuple):
    """The samplers measured, best first; the reference; and the solvers not measured, each with the reason."""

    ranking: list[MeasuredSampler]
    reference: Reference
    excluded: dict[str, str]


def search_sampler(
    denoise: Denoiser,
    start: Tensor,
    calls: int,
    progress: Callable[[int], None] = lambda calls: None,
    names: Sequence[str] | None = None,
    fine: int = 200,
    cond: Condition | None = None,
    max_steps: int | None = None,
) -> SearchResult:
    """Samplers of at most ``calls`` network calls, ranked by their error from ``start`` (n, ...) at t = 1.

    Measured are the solvers of ``names`` that draw no noise and have an order, with each of `SEARCH_SPACINGS`, in at
    most ``max_steps`` steps; by default all but "flow_map", which takes the steps of "ddim" without a flow map. For the
    best few, the times are also refined, from their best spacing or from `fitted_times`. The first half of the items
    serves for refinement, the other half for the ranking. ``fine`` is the number of steps of the reference, ``cond``
    the condition of each item of ``start``. ``progress`` is called with the number of network calls made. A
    sampler whose ends are NaN or infinite is excluded. Raises `ConfigError`, and `NonFiniteError` if the reference or
    all samplers are.
    """
    if calls < 1 or fine < 4:
        where = f"calls = {calls}, fine = {fine}"
        raise ConfigError("ADVISE", where, "nothing can be measured", "Give at least 1 call, and 4 fine steps")
    schedule, half = denoise.schedule, len(start) // 2
    first = slice(half or None)
    conditioned = ConditionedDenoiser(denoise, cond)
    half_conditioned = ConditionedDenoiser(denoise, cond and cond.take(first))
    reference = reference_flow(conditioned, start, fine, progress)

    def measure(sampler: Sampler) -> MeasuredSampler:
        error = rmse(endpoint(sampler, conditioned, start), reference.endpoint)
        progress(calls)
        return MeasuredSampler(sampler, count_calls(sampler, schedule), error[half:])

    candidates, excluded = _candidates([n for n in SOLVERS if n != "flow_map"] if names is None else list(names))
    measured: list[tuple[int, list[MeasuredSampler]]] = []
    for name, settings, order in candidates:
        distinct: dict[tuple[float, ...], Sampler] = {}
        for spacing in SEARCH_SPACINGS:
            if sampler := fit_to_budget(Sampler(name, 1, spacing, settings), schedule, calls, max_steps=max_steps):
                times = tuple(round(float(level.t), 9) for level in sampler.noise_levels(schedule))
                distinct.setdefault(times, sampler)
        if distinct:
            measured.append((order, sorted(map(measure, distinct.values()), key=_sort_key)))
    ranking = [one for _, of_solver in measured for one in of_solver]
    for order, (best, *_) in sorted(measured, key=lambda row: _sort_key(row[1][0]))[:NUM_REFINED]:
        template = replace(best.sampler, spacing="fitted")
        times = partial(fitted_times, reference, schedule, power=1 / (order + 1))
        fitted = fit_to_budget(template, schedule, calls, times, max_steps)
        starts = [best.sampler, *([fitted] if fitted else [])]
        refined = refine_times(starts, half_conditioned, start[first], reference.endpoint[first], progress)
        ranking += [] if refined == best.sampler else [measure(refined)]
    finite, bad = [], []
    for one in sorted(ranking, key=_sort_key):
        (finite if math.isfinite(_sort_key(one)) else bad).append(one)
    if bad and not finite:
        raise NonFiniteError("NON_FINITE", "flow", "all samplers became NaN or infinite", "Take more calls")
    excluded |= {f"{one.sampler}, {one.sampler.spacing} levels": "became NaN or infinite" for one in bad}
    return SearchResult(finite, reference, excluded)


def _candidates(names: Sequence[str]) -> tuple[list[tuple[str, dict[str, Any], int]], dict[str, str]]:
    """([(solver, settings, order)] to measure, {solver: reason} of those that cannot be)."""
    candidates, excluded = [], {}
    for name, settings in [*((name, {}) for name in names), *(row for row in SEARCH_VARIANTS if row[0] in names)]:
        solver = build(name, **settings)
        reason = _exclusion_reason(name, solver)
        if reason is None and solver.order is not None:
            candidates.append((name, settings, solver.order))
        else:
            excluded[name] = reason
    return candidates, excluded


def _exclusion_reason(name: str, solver: Solver) -> str | None:
    if name in ALIASES:
        return f"takes the steps of {ALIASES[name]}"
    if solver.order is None:
        return "has no order of convergence"
    return "draws noise" if solver.noises_per_step else None


def refine_times(
    samplers: Sequence[Sampler],
    denoise: Denoiser,
    start: Tensor,
    end: Tensor,
    progress: Callable[[int], None] = lambda calls: None,
) -> Sampler:
    """The one of ``samplers`` whose endpoint from ``start`` is nearest to ``end``, with its times moved to improve it.

    Around each of `NUM_KNOTS` knots in turn the log-SNRs are raised or lowered, most at the knot and not at all at the
    next one, by a whole, half and quarter of their mean distance. A move is kept if the mean error over the items falls
    by more than the standard error of the paired difference. The ends stay.
    """

    def error(sampler: Sampler) -> Tensor:
        progress(sampler.num_steps or 0)
        return rmse(endpoint(sampler, denoise, start), end)

    errors = [error(sampler) for sampler in samplers]
    least, best = min(zip(errors, samplers, strict=True), key=lambda pair: float(pair[0].mean()))
    schedule, levels = denoise.schedule, best.noise_levels(denoise.schedule)
    t, lam = torch.stack([level.t for level in levels]), torch.stack([level.log_snr for level in levels])
    free = torch.isfinite(lam) & (t > 0) & (t < 1)
    inner = lam[free]
    if len(inner) < 2:
        return best
    knots = torch.linspace(0, len(inner) - 1, min(NUM_KNOTS, len(inner)), dtype=F64)
    hats = (1 - (torch.arange(len(inner), dtype=F64) - knots[:, None]).abs() / knots[1]).clamp(min=0)

    def moved_to(log_snrs: Tensor) -> Sampler | None:
        times = t.masked_scatter(free, _snap_to_table(schedule.inverse(log_snrs), schedule))
        falls = bool((times.diff() < -1e-9).all())
        return replace(best, spacing="fitted", times=tuple(times.tolist())) if falls else None

    for size in (1.0, 0.5, 0.25):
        for hat in size * float(inner.diff().mean()) * hats:
            for move in (hat, -hat):
                moved = moved_to(inner + move)
                if moved is None:
                    continue
                moved_error = error(moved)
                gain, stderr = mean_with_stderr(least - moved_error)
                if gain > stderr:
                    best, inner, least = moved, inner + move, moved_error
                    break
    return best


def reference_flow(
    denoise: Denoiser, start: Tensor, num_steps: int = 200, progress: Callable[[int], None] = lambda calls: None
) -> Reference:
    """The flow from ``start`` (n, ...) at t = 1: ``num_steps`` steps of UniPC, equal in log-SNR, of third order."""
    ends, change, levels, before = [], [], [], None
    for fine in (num_steps // 2, num_steps):
        levels, solver, state, x = time_grid(denoise.schedule, fine, "log_snr"), build("unipc"), (), start
        change.clear()
        for i, (t, s) in enumerate(itertools.pairwise(levels)):
            recorder = RecordingDenoiser(denoise)
            x, state = solver.step(recorder, x, t, s, state, start[:0])
            first = recorder.recorded[0]
            if before is not None and i > 0:
                change.append(float((first - before).square().mean().sqrt()))
            before = first
            progress(1)
        ends.append(rescale(x, levels[-1]))
    return Reference(check_finite(ends[1]), rmse(ends[0], ends[1]), levels, torch.tensor(change, dtype=F64))


def fitted_times(reference: Reference, schedule: Schedule, num_steps: int, power: float) -> tuple[float, ...]:
    """Times from 1 to 0 with equal parts of ∫ (c |dx̂/dlambda|)^power dlambda between them, lambda = ½ log_snr.

    A step of length h of a method of order p has an error of about h^(p+1) times a derivative of x̂ over lambda, in
    units of x/alpha; c = √sigmoid(log_snr) is the part of that error that remains at the end for data of unit variance.
    The sum is least for steps as long as (that factor)^(−1/(p+1)), so ``power`` is 1/(p + 1). The first derivative
    stands in for the higher ones. On a table the times are rounded to the table's, and fewer where two coincide.
    """
    from_noise, to_data = (int(math.isinf(reference.noise_levels[end].log_snr)) for end in (0, -1))
    levels = reference.noise_levels[from_noise : len(reference.noise_levels) - to_data]
    lam = 0.5 * torch.stack([level.log_snr for level in levels])
    change = reference.x_change[from_noise:]
    change = torch.cat([change, change[-1:]])[: len(lam) - 1]  # there is no x̂ at an end that is not data
    error = torch.sqrt(torch.sigmoid(lam[:-1] + lam[1:])) * change
    part = (error + 1e-6 * error.max() + 1e-300) ** power * lam.diff() ** (1 - power)
    total = torch.cat([torch.zeros(1, dtype=F64), part.cumsum(0)])
    goal = torch.arange(1, num_steps, dtype=F64) / num_steps * total[-1]
    i = torch.searchsorted(total, goal).clamp(1, len(part))
    t = schedule.inverse(2 * torch.lerp(lam[i - 1], lam[i], (goal - total[i - 1]) / part[i - 1]))
    return (1.0, *_snap_to_table(t, schedule).unique().flip(0).tolist(), 0.0)


def early_stop_times(schedule: Schedule, num_steps: int, log_snr: float) -> tuple[float, ...]:
    """Times from 1 to 0: ``num_steps`` − 1 steps of equal log_snr down to the one given, then one step to data.

    The noise that is left at ``log_snr`` is removed by the single step to x̂: with few calls more steps there do not
    pay. On a table the times are rounded as in `fitted_times`.
    """
    line = torch.linspace(float(finite_ends(schedule)[0].log_snr.detach()), log_snr, num_steps, dtype=F64)[1:]
    return (1.0, *_snap_to_table(schedule.inverse(line), schedule).unique().flip(0).tolist(), 0.0)


def fit_to_budget(
    template: Sampler,
    schedule: Schedule,
    calls: int,
    times: Callable[[int], tuple[float, ...] | None] = lambda num_steps: None,
    max_steps: int | None = None,
) -> Sampler | None:
    """``template`` with the most steps (and ``times`` of so many) that ``calls`` network calls allow; None if none.

    At most ``max_steps``, and on a table its length.
    """
    most = calls // template.build_solver().calls + 2  # the first and the last step may be DDIM's
    for n in range(min(most, schedule.chain_length or most, max_steps or most), 0, -1):
        sampler = replace(template, num_steps=n, times=times(n))
        if count_calls(sampler, schedule) <= calls:
            return sampler
    return None


def _snap_to_table(t: Tensor, schedule: Schedule) -> Tensor:
    """``t`` inside (0, 1), rounded to the nearest time of a table."""
    T = schedule.chain_length
    return t if T is None else (t * T).round().clamp(1, T - 1) / T


def endpoint(sampler: Sampler, denoise: Denoiser, start: Tensor) -> Tensor:
    """The endpoint from ``start`` (n, ...), in units of x, with all noise set to 0."""
    solver, levels, zeros = sampler.build_solver(), sampler.noise_levels(denoise.schedule), torch.zeros_like(start)
    last = last_step(trajectory(denoise, solver, levels, start, lambda n: zeros.expand(n, *start.shape)))
    return rescale(last.x, last.level)


def count_calls(sampler: Sampler, schedule: Schedule) -> int:
    """The most network calls of a sample without guidance, those of the solver's start and last step included.

    Fewer if the denoiser does not `predicts_at_data`, and the solver's last step is DDIM's.
    """
    counter = CallCounter(schedule)
    endpoint(sampler, counter, torch.ones(1, 1, dtype=torch.float64))
    return counter.calls


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """√mean((a − b)²) of each item, (n,) float64 on the CPU; ∞ in place of NaN."""
    return (a.double() - b.double()).flatten(1).square().mean(1).sqrt().nan_to_num(math.inf, math.inf).cpu()


def _sort_key(one: MeasuredSampler) -> float:
    return one.mean_error[0]


@dataclass
class CallCounter:
    """A denoiser that predicts 0, at data too, and counts its calls."""

    schedule: Schedule
    calls: int = 0
    predicts_at_data: bool = True

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        self.calls += 1
        return Prediction(torch.zeros_like(x_t), torch.zeros_like(x_t))


@dataclass(frozen=True)
class RecordingDenoiser(DenoiserWrapper):
    """A denoiser that appends each x̂ to ``recorded``."""

    recorded: list[Tensor] = field(default_factory=list)

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, cond: Condition | None = None, next_level: NoiseLevel | None = None
    ) -> Prediction:
        prediction = self.denoise(x_t, level, cond, next_level)
        self.recorded.append(prediction.x)
        return prediction
