"""Time grids: the noise levels of a sampler's steps, from noise to data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.schedule import Schedule, chain, finite_ends
from undiffuse.sampling.tables import SPACINGS

F64 = torch.float64
RHO = 7.0
"""The exponent of the spacing "karras" [Karras22 table 1]."""


def time_grid(
    schedule: Schedule,
    num_steps: int | None = None,
    spacing: str = "uniform",
    *,
    times: Sequence[float] | Tensor | None = None,
) -> list[NoiseLevel]:
    """The ``num_steps`` + 1 levels of a chain, with a ``spacing`` of `SPACINGS` or at explicit falling ``times``.

    ``num_steps`` is T by default (1000 on functions of time). All spacings end at t = 0, and all but ``"leading"``
    begin at t = 1. On a table their times are k/T, rounded and kept distinct, so that the network gets only levels it
    was trained on, and ``num_steps`` is at most T. Those of ``"log_snr"`` and ``"karras"`` lie between the table's
    times, for networks whose time input is log_snr. Raises `ConfigError`.
    """
    if times is not None:
        return _chain(schedule, torch.as_tensor(times, dtype=F64), f"times = {[float(t) for t in times][:8]}")
    if spacing not in SPACINGS:
        fix = f"Use one of {', '.join(SPACINGS)}, or give the times"
        raise ConfigError("GRID", f"spacing {spacing!r}", "no such spacing of noise levels", fix)
    num_steps = (schedule.chain_length or 1000) if num_steps is None else num_steps
    times_of = SPACINGS[spacing]
    T = None if times_of in INTERPOLATED else schedule.chain_length
    if num_steps < 1 or (T is not None and num_steps > T):
        limits = "at least 1" if T is None else f"from 1 to {T}"
        raise ConfigError("GRID", f"num_steps = {num_steps}", f"the number must be {limits}", "Choose such a number")
    t = times_of(schedule, num_steps)
    t = t if T is None else _round_to_table(t, T)
    return _chain(schedule, t.flip(0), f"{num_steps} steps, spacing {spacing!r}")


def _chain(schedule: Schedule, times: Tensor, where: str) -> list[NoiseLevel]:
    try:
        return chain(schedule, times)
    except ValueError as error:
        raise ConfigError("GRID", where, str(error), "Choose other times, or fewer steps") from None


def _round_to_table(t: Tensor, T: int) -> Tensor:
    """Rising ``t`` from 0 rounded to k/T: to the nearest k for which all are distinct and at most T."""
    n = torch.arange(len(t))
    offset = torch.cummax((t * T).round().long() - n, 0).values.clamp(0, T - len(t) + 1)
    return (offset + n) / torch.tensor(T, dtype=F64)


def uniform(schedule: Schedule, num_steps: int) -> Tensor:
    """t_i = i/num_steps. Rounded on a table it is the spacing that others call trailing [Lin23 table 2]."""
    return torch.arange(num_steps + 1, dtype=F64) / num_steps


def quadratic(schedule: Schedule, num_steps: int) -> Tensor:
    """t_i = (i/num_steps)², denser near data [DDIM app. D.2, who stop at t = 0.8]."""
    return uniform(schedule, num_steps) ** 2


def leading(schedule: Schedule, num_steps: int) -> Tensor:
    """t_i = (1 + (i − 1) ⌊T/num_steps⌋)/T and 0, without t = 1 [Lin23 table 2]: for models that were tuned with it."""
    T = schedule.chain_length
    if T is None:
        fix = "Use 'uniform' or 'trailing'"
        raise ConfigError("GRID", "spacing 'leading'", "the schedule is a function of time, not a table", fix)
    k = 1 + torch.arange(num_steps, dtype=F64) * (T // num_steps)
    return torch.cat([torch.zeros(1, dtype=F64), k / T])


def log_snr(schedule: Schedule, num_steps: int) -> Tensor:
    """Times whose log_snr is linear in i between its finite ends [Lu22 §4.1]; see `_interpolate`."""
    return _interpolate(schedule, num_steps, lambda value: value, lambda line: line)


def karras(schedule: Schedule, num_steps: int) -> Tensor:
    """Times whose (sigma/alpha)^(1/RHO) is linear in i between its finite ends [Karras22 eq. 5]; see `_interpolate`."""
    return _interpolate(
        schedule, num_steps, lambda value: torch.exp(-0.5 * value / RHO), lambda line: -2 * RHO * torch.log(line)
    )


INTERPOLATED = (log_snr, karras)
"""Spacings whose times are not rounded to those of a table."""


def _interpolate(
    schedule: Schedule, num_steps: int, forward: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]
) -> Tensor:
    """The times at which ``forward`` of log_snr is linear in i, between those of the `finite_ends`.

    Where log_snr is +∞ at t = 0 the line ends at t_min, and one more step goes to data. Where it is below −20 at t = 1
    the noisy end of the line is moved there, which saves a step between two levels of almost pure noise.
    """
    top, clean = finite_ends(schedule)
    data = [0.0] if float(clean.t) > 0 else []
    low, high = forward(clean.log_snr.detach()), forward(top.log_snr.detach())
    weight = torch.linspace(0, 1, num_steps + 1 - len(data), dtype=F64)
    t = schedule.inverse(inverse(torch.lerp(low, high, weight)))
    t[0], t[-1] = clean.t, 1.0
    return torch.cat([torch.tensor(data, dtype=F64), t])
