"""Consistency training and distillation: a denoiser whose x̂ is the end of the probability flow from x_t.

f(x_t, t) = x̂ is learned from pairs of points of one trajectory, x_t and x_r at a cleaner level r: f(x_t, t) moves to
f(x_r, r), and at the cleanest level f is x_r/alpha_r itself [Song23b §4]. With sigma_r/alpha_r = (1 − gap) sigma_t/
alpha_t the gap is reduced during the run [Geng24 §3]. The point x_r comes from one step of a teacher, or from the
data: x_r = alpha_r x + sigma_r eps with the eps of x_t.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import Denoiser
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.schedule import Schedule, finite_ends
from undiffuse.process.statistics import item_mean
from undiffuse.runtime.device import to_device
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers.runge_kutta import noise_to_signal

MAX_RATIO = 80.0
"""The largest sigma/alpha that a consistency model starts from, that of [Karras22]; of data with a spread of about 1
nothing is left there."""
MIDDLE_RATIO, RATIO_SPREAD = 0.8, 1.2
"""Where the calls after the first are: median of sigma/alpha, and standard deviation of its logarithm."""
HUBER = 0.00054
"""c of the pseudo-Huber loss, per square root of the dimensions [Song24 §3.3]."""


def noisiest_level(schedule: Schedule) -> NoiseLevel:
    """The level that samples start from: the noisiest with finite log-SNR, at most sigma/alpha = `MAX_RATIO`."""
    noisiest = finite_ends(schedule)[0]
    limit = torch.tensor(-2 * math.log(MAX_RATIO), dtype=torch.float64)
    return noisiest if bool(noisiest.log_snr >= limit) else schedule(schedule.inverse(limit))


def level_after_gap(schedule: Schedule, t: NoiseLevel, gap: float) -> NoiseLevel:
    """The levels r with sigma_r/alpha_r = (1 − gap) sigma_t/alpha_t, at least the cleanest one, of ``t``'s shape."""
    at = schedule.inverse(t.log_snr - 2 * math.log1p(-gap))
    return schedule(at.clamp(min=schedule.t_min))


def teacher_step(teacher: Denoiser, x_t: Tensor, t: NoiseLevel, r: NoiseLevel, cond: Condition | None = None) -> Tensor:
    """x_r = alpha_r (x_t/alpha_t + (u_r − u_t)(ε̂_t + ε̂_r)/2), u = sigma/alpha: Heun's step [Karras22 alg. 1].

    ε̂_r is the teacher's at the end of Euler's step; levels are (B,). Of order 2: on Gaussian data and with the gap 1/16
    samples in one call have a spread that is 0.05 % too large; with pairs from the data it is 1.6 % too small.
    """
    at, to, step = t.broadcast_like(x_t), r.broadcast_like(x_t), noise_to_signal(r) - noise_to_signal(t)
    y, h = x_t / at.alpha, broadcast_like(step, x_t)
    eps = teacher(x_t, t, cond).eps
    eps_end = teacher(to.alpha * (y + h * eps), r, cond).eps
    return to.alpha * (y + h * (eps + eps_end) / 2)


def consistency_loss(
    denoise: Denoiser, x_t: Tensor, t: NoiseLevel, x_r: Tensor, r: NoiseLevel, gap: float, cond: Condition | None = None
) -> Tensor:
    """(√(mean (f(x_t, t) − f(x_r, r))² + c²) − c)/(gap u_t), (B,), with u = sigma/alpha and no gradient to f(x_r, r).

    The pseudo-Huber loss [Song24 eq. 7] with the weight 1/(u_t − u_r) [Geng24 §3] for the r of `level_after_gap`.
    Where that is the cleanest level, u_t − u_r may be arbitrarily small. Dropout is the same in both calls. Levels
    are (B,), x_t and x_r (B, ...).
    """
    with torch.random.fork_rng(), torch.no_grad():
        at = r.broadcast_like(x_r)
        is_cleanest = to_device(r.t <= denoise.schedule.t_min, x_r.device)
        goal = denoise(x_r, r, cond).x
        goal = torch.where(is_cleanest.reshape(at.alpha.shape), x_r / at.alpha, goal)
    error = item_mean((denoise(x_t, t, cond).x - goal) ** 2)
    weight = 1 / (gap * noise_to_signal(t))
    return broadcast_like(weight, error) * pseudo_huber(error)


def pseudo_huber(error: Tensor) -> Tensor:
    """√(error + c²) − c, where ``error`` is a mean square: about its root far from 0, and a parabola of it near 0."""
    return torch.sqrt(error + HUBER**2) - HUBER


@torch.no_grad()
def few_call_sampler(schedule: Schedule, calls: int, solver: str = "consistency") -> Sampler:
    """The sampler of a consistency model with so many network calls, or that of a flow map, ``solver`` "flow_map".

    Each call is at a level of its own: the first at `noisiest_level`, the others where sigma/alpha is a quantile of a
    log-normal distribution with median `MIDDLE_RATIO`, which is that of the second of two calls [Geng24 app. D]. It is
    cut off at the first level and at the cleanest one where a quantile would lie beyond.
    """
    normal = NormalDist(math.log(MIDDLE_RATIO), RATIO_SPREAD)
    first = noisiest_level(schedule)
    cleanest, noisiest = (normal.cdf(-float(level.log_snr) / 2) for level in (schedule(schedule.t_min), first))
    low, high = 0.0, 1.0
    for _ in range(2):  # a cut at one end moves the quantiles toward the other
        high = noisiest if low + (high - low) * (1 - 1 / calls) >= noisiest else high
        low = cleanest if low + (high - low) / calls <= cleanest else low
    quantiles = [normal.inv_cdf(low + (high - low) * (1 - i / calls)) for i in range(1, calls)]
    inner = [float(schedule.inverse(-2 * quantile)) for quantile in quantiles]
    return Sampler(solver, calls, times=(float(first.t), *inner, 0.0))
