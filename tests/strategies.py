"""Hypothesis strategies for schedules, chains and Gaussian data."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from oracles import GaussianData

from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S

betas = st.lists(st.floats(1e-5, 0.999), min_size=1, max_size=12)


@st.composite
def tables(draw) -> DS.Tabulated:
    """A table of arbitrary beta, the last possibly 1."""
    beta = draw(betas)
    return DS.Tabulated([*beta[:-1], 1.0] if draw(st.booleans()) and len(beta) > 1 else beta)


@st.composite
def functions(draw) -> S.Schedule:
    """A schedule that is a function of time."""
    high, low = draw(st.floats(2, 12)), draw(st.floats(-8, 1))
    family = draw(st.sampled_from(["linear_log_snr", "sigmoid", "variance_exploding", "flow"]))
    settings = {
        "linear_log_snr": {"high": high, "low": low},
        "variance_exploding": {"sigma_min": 2.0**-high, "sigma_max": 2.0**-low},
        "sigmoid": {"start": -high / 3, "end": -low},
    }
    if family == "sigmoid" and -low <= -high / 3:
        family = "flow"
    return S.build(family, **settings.get(family, {}))


schedules = st.one_of(tables(), functions())


@st.composite
def chains(draw, schedule: st.SearchStrategy = schedules) -> list:
    """A chain of 1 to 12 steps of some schedule, from t = 1 to its cleanest level."""
    chosen = draw(schedule)
    if chosen.chain_length is not None:
        inner = draw(st.sets(st.integers(1, max(chosen.chain_length - 1, 1)), max_size=8)) - {chosen.chain_length}
        times = [k / chosen.chain_length for k in sorted(inner, reverse=True)]
    else:
        inner = draw(st.sets(st.integers(1, 63), max_size=11))
        times = [k / 64 for k in sorted(inner, reverse=True)]
    return S.chain(chosen, [1.0, *times, 0.0])


@st.composite
def gaussians(draw, dims: int = 3) -> GaussianData:
    """Independent dimensions with variances from 0.01 to 4."""
    means = draw(st.lists(st.floats(-2, 2), min_size=dims, max_size=dims))
    stds = draw(st.lists(st.floats(0.1, 2), min_size=dims, max_size=dims))
    return GaussianData(torch.tensor(means, dtype=torch.float64), torch.tensor(stds, dtype=torch.float64) ** 2)
