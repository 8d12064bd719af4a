"""Log densities of a whole trajectory that was kept, under the forward and the reverse process."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.process.gaussian import forward
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.prior import Prior, prior_log_prob
from undiffuse.process.statistics import item_sum
from undiffuse.sampling.trajectory import Step


def forward_log_prob(steps: Sequence[Step]) -> Tensor:
    """log q(x_1..x_T given x_0) = Σ log q(x_t given x_s), (B,) nats in float64 [Ho20 eq. 2].

    ``steps`` are all states of a trajectory, x (B, ...), in either direction: those of `forward_trajectory`, or of
    `trajectory`. x_0 is the state of the cleanest level. Raises `ConfigError` unless the levels rise or fall.
    """
    return torch.stack([item_sum(forward(x_s, s, t).log_prob(x_t)) for x_t, t, x_s, s in _transitions(steps)]).sum(0)


def reverse_log_prob(chain: ReverseChain, steps: Sequence[Step], prior: Prior | None = None) -> Tensor:
    """log p(x_0..x_T) = log p(x_T) + Σ log p(x_s given x_t), (B,) nats in float64 [Ho20 eq. 1].

    ``steps`` as in `forward_log_prob`, between whose levels ``chain`` steps; its own ``noise_levels`` are not read.
    ``prior`` is by default that of the noisiest level. The last step is the density p(x_0 given x_1), also where a
    sampler returns its mean. The denoiser gets the dtype of the states. Raises `ConfigError` as `forward_log_prob`.
    """
    transitions = _transitions(steps)
    dtype, (top, level, *_) = steps[0].x.dtype, transitions[0]
    terms = [item_sum(chain.step(x_t, t, s, dtype).log_prob(x_s)) for x_t, t, x_s, s in transitions]
    return prior_log_prob(top, level, prior) + torch.stack(terms).sum(0)


def _transitions(steps: Sequence[Step]) -> list[tuple[Tensor, NoiseLevel, Tensor, NoiseLevel]]:
    """(x_t, t, x_s, s) of each step, from noise to data, in float64."""
    times = [float(step.level.t) for step in steps]
    if len(times) < 2 or not (times == sorted(set(times)) or times == sorted(set(times), reverse=True)):
        cause = "it is not a trajectory: its levels neither rise nor fall"
        raise ConfigError("TRAJECTORY", f"times {times[:8]}", cause, "Keep every state of one trajectory, at least two")
    falling = steps if times[0] > times[-1] else steps[::-1]
    return [(a.x.double(), a.level, b.x.double(), b.level) for a, b in pairwise(falling)]
