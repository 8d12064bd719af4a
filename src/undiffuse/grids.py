"""Grids: which noise levels a sampler walks, from noise to data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.likelihood.continuous import finite_ends
from undiffuse.process.level import NoiseLevel
from undiffuse.process.schedule import Schedule, chain

F64 = torch.float64


def grid(
    schedule: Schedule,
    steps: int | None = None,
    spacing: str = "uniform",
    *,
    times: Sequence[float] | Tensor | None = None,
    rho: float = 7.0,
    rounded: bool = False,
) -> list[NoiseLevel]:
    """The levels of a chain of ``steps`` steps, spaced by a row of `SPACINGS`, or at explicit falling ``times``.

    ``steps`` is T by default (1000 on functions of time). All spacings end at t = 0, and all but ``"leading"`` begin
    at t = 1. On a table their times are k/T, rounded and kept distinct, so that the network meets only levels that
    it knows, and ``steps`` is at most T. Those of ``"log_snr"`` and ``"karras"`` lie between, for networks that are
    told log_snr, unless ``rounded``; ``rho`` is that of ``"karras"``. Raises `ConfigError`.
    """
    if times is not None:
        return _chain(schedule, torch.as_tensor(times, dtype=F64), f"times = {[float(t) for t in times][:8]}")
    if spacing not in SPACINGS:
        fix = f"Use one of {', '.join(SPACINGS)}, or give the times"
        raise ConfigError("GRID", f"spacing {spacing!r}", "no such spacing of levels", fix)
    steps = (schedule.steps or 1000) if steps is None else steps
    T = schedule.steps if rounded or spacing not in BETWEEN else None
    if steps < 1 or (T is not None and steps > T):
        raise ConfigError("GRID", f"steps = {steps}", f"the number must be from 1 to {T or 'any'}", "Choose such")
    t = SPACINGS[spacing](schedule, steps, rho)
    return _chain(schedule, (t if T is None else _on_table(t, T)).flip(0), f"{steps} steps, spacing {spacing!r}")


def _chain(schedule: Schedule, times: Tensor, where: str) -> list[NoiseLevel]:
    try:
        return chain(schedule, times)
    except ValueError as error:
        raise ConfigError("GRID", where, str(error), "Choose other times, or fewer steps") from None


def _on_table(t: Tensor, T: int) -> Tensor:
    """Rising ``t`` from 0 at whole k/T: to the nearest k that leaves all of them distinct and at most T."""
    n = torch.arange(len(t))
    room = torch.cummax((t * T).round().long() - n, 0).values.clamp(0, T - len(t) + 1)
    return (room + n) / torch.tensor(T, dtype=F64)


def uniform(schedule: Schedule, steps: int, rho: float) -> Tensor:
    """t_i = i/steps. Rounded on a table it is the spacing that is elsewhere called trailing [Lin23 table 2]."""
    return torch.arange(steps + 1, dtype=F64) / steps


def quadratic(schedule: Schedule, steps: int, rho: float) -> Tensor:
    """t_i = (i/steps)², denser near data [DDIM app. D.2, who stop at t = 0.8]."""
    return uniform(schedule, steps, rho) ** 2


def leading(schedule: Schedule, steps: int, rho: float) -> Tensor:
    """t_i = (1 + (i − 1) ⌊T/steps⌋)/T and 0, which leaves t = 1 out [Lin23 table 2]: for what was tuned with it."""
    T = schedule.steps
    if T is None:
        fix = "Use 'uniform' or 'trailing'"
        raise ConfigError("GRID", "spacing 'leading'", "the schedule is a function of time, not a table", fix)
    k = 1 + torch.arange(steps, dtype=F64) * (T // steps)
    return torch.cat([torch.zeros(1, dtype=F64), k / T])


def log_snr(schedule: Schedule, steps: int, rho: float) -> Tensor:
    """log_snr_i on a straight line between its finite ends [Lu22 §4.1]; see `_between`."""
    return _between(schedule, steps, lambda value: value, lambda line: line)


def karras(schedule: Schedule, steps: int, rho: float) -> Tensor:
    """(sigma/alpha)_i^(1/rho) on a straight line between its finite ends [Karras22 eq. 5]; see `_between`."""
    if not rho > 0:
        raise ConfigError("GRID", f"rho = {rho:g}", "the levels do not fall", "Give a rho above 0, such as 7")
    return _between(
        schedule,
        steps,
        lambda value: torch.exp(-0.5 * value / rho),
        lambda line: -2 * rho * torch.log(line),
    )


def _between(
    schedule: Schedule, steps: int, forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]
) -> Tensor:
    """The times whose ``forth`` of log_snr lies on a straight line between those of the `finite_ends`.

    Where log_snr is +∞ at t = 0 the line ends at t_min, and one more step goes to data. Where it is −∞ at t = 1
    the line's noisy end is moved there, which spares a step between two levels of noise alone.
    """
    top, clean = finite_ends(schedule)
    last = [0.0] if float(clean.t) > 0 else []
    low, high = forth(clean.log_snr.detach()), forth(top.log_snr.detach())
    share = torch.linspace(0, 1, steps + 1 - len(last), dtype=F64)
    t = schedule.inverse(back(torch.lerp(low, high, share)))
    t[0], t[-1] = clean.t, 1.0
    return torch.cat([torch.tensor(last, dtype=F64), t])


SPACINGS: dict[str, Callable[[Schedule, int, float], Tensor]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "trailing": uniform,
    "leading": leading,
    "log_snr": log_snr,
    "karras": karras,
}
"""Rising times (steps + 1,) from 0, of a schedule, a number of steps, and rho."""
BETWEEN = ("log_snr", "karras")
"""Those whose times need not be a table's own."""
