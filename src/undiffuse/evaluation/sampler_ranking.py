"""Rank samplers, stochastic and deterministic, by Fréchet distance to held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from undiffuse.data.dataset import Dataset
from undiffuse.data.transform import is_latent
from undiffuse.errors import ConfigError, DataError, NonFiniteError
from undiffuse.evaluation.distances import JACKKNIFE_GROUPS, frechet, jackknife_stderr, kernel
from undiffuse.evaluation.features import MAX_FIT_ITEMS, principal_components
from undiffuse.evaluation.plan import check_data, select_items, shared_condition
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.sampler_search import Reference, early_stop_times, fit_to_budget, fitted_times
from undiffuse.sampling.solvers import SOLVERS, build

EARLY_STOP_LOG_SNRS = (1.5, 3.0, 4.5, 6.0)
"""Log-SNRs from which a sampler with few calls may go to data in one step."""
LOW_ORDER_END_SOLVERS = ("dpm++2m_sde", "dpm++3m_sde")
"""Solvers whose last step can be of low order, as an early stop needs, and whose amount of noise, eta, can change."""
MORE_NOISE = 2.5
"""Eta of samplers with more noise than the reverse chain, whose eta is 1: it corrects more of the network's errors."""
NUM_FINALISTS = 4
"""Samplers compared by all samples, after a first round by a quarter of the samples."""
MIN_ITEMS, MAX_ITEMS = 20, 10_000
"""Fewest items that can be compared, and the most items of the data that samples are compared with."""


class SamplerScore(NamedTuple):
    """A sampler (None: other items of the data), and the distance of its samples' distribution from that of the data.

    ``distance`` is the Fréchet distance, in units of x²; ``jackknife`` (`JACKKNIFE_GROUPS`,) the same with each group
    of the samples omitted. ``kernel`` is the kernel distance and its standard error.
    """

    sampler: Sampler | None
    distance: float
    jackknife: Tensor
    kernel: tuple[float, float]

    @property
    def mean(self) -> tuple[float, float]:
        """The Fréchet distance and its jackknife standard error over the samples; the data are kept fixed."""
        return self.distance, jackknife_stderr(self.jackknife)

    def regret(self, best: SamplerScore) -> tuple[float, float]:
        """Paired difference from ``best``, whose samples have the same noise, and its standard error."""
        return self.distance - best.distance, jackknife_stderr(self.jackknife - best.jackknife)


class ComparedItems(NamedTuple):
    """Values of ``held_out`` items (N, ...) and of ``others`` (M, ...), training items; ``cond`` of samples to draw.

    Sample i has the condition of held-out item i mod N. ``conditions`` are the kinds, such as "labels", or "none".
    """

    held_out: Tensor
    others: Tensor
    cond: Condition | None = None
    conditions: str = "none"


def compared_items(model: Diffusion, data: Dataset, n: int, labels: Collection[int] = ()) -> ComparedItems:
    """Items of ``data`` in random order, at most `MAX_ITEMS` of each kind, to compare with ``n`` samples.

    They are the held-out items and the training items, or two halves of the items if the model was trained on data of
    another name. With ``labels`` only items with one of these labels are taken; if −1 is the only one, the samples have
    no condition. Raises `ConfigError` for −1 beside others, and `DataError` if the data do not fit the model or are too
    few.
    """
    check_data(model, data)
    shuffled, wanted = np.random.Generator(np.random.PCG64(0)).permutation, {*labels} - {-1}
    conditions = "none" if labels and not wanted else shared_condition(model, data)[0]
    if data.may_be_of(model.info):
        parts = [shuffled(select_items(model, data, part)[0]) for part in ("validation", "train")]
    else:
        parts = np.array_split(shuffled(len(data)), 2)
    if wanted:
        if -1 in labels:
            cause = "samples without a condition are compared with all items, those of a class with its own"
            raise ConfigError("USAGE", "--label none", cause, "Give it alone, or leave it out")
        if data.labels is None or conditions == "none":
            cause, fix = "its items have no labels of the model", "Leave --label out"
            raise DataError("LABEL", data.name, cause, fix)
        parts = [part[np.isin(data.labels[part], [*wanted])] for part in parts]
    held_out, train = (part[:MAX_ITEMS] for part in parts)
    if min(len(held_out), len(train)) < MIN_ITEMS:
        cause = f"it has {len(held_out)} items to compare with, and {len(train)} others"
        raise DataError("FEW", data.name, cause, f"Give at least {MIN_ITEMS} of each")
    cond = data.given_condition(held_out[np.arange(n) % len(held_out)], conditions != "none")
    return ComparedItems(data.tensor(held_out), data.tensor(train), cond, conditions)


def data_unit(model: Diffusion) -> tuple[float, str]:
    """(units of the data in one unit of x, their name); the geometric mean if the scales of channels differ."""
    if is_latent(model.transform):
        return 1.0, "standard deviations of latents"
    num_values = model.info.get("num_values")
    if num_values:
        return (num_values - 1) / 2, "levels"
    return math.exp(-model.transform.log_abs_det(model.item_shape) / model.dims), "units of the data"


def stochastic_samplers(model: Diffusion, reference: Reference, calls: int) -> list[Sampler]:
    """Samplers of at most ``calls`` network calls by the solvers that draw noise and have an order of convergence.

    Each with uniform and Karras spacing and with times fitted to the ``reference`` flow. Those of
    `LOW_ORDER_END_SOLVERS` also stop early at each of `EARLY_STOP_LOG_SNRS` within the schedule, and all of this also
    with `MORE_NOISE`.
    """
    schedule, samplers, fit = model.schedule, [], partial(fit_to_budget, max_steps=model.chain_length)
    clean, top = float(model.chain[-1].log_snr), float(model.chain[0].log_snr)
    for name, settings in [
        *((name, {}) for name in SOLVERS),
        *((n, {"eta": MORE_NOISE}) for n in LOW_ORDER_END_SOLVERS),
    ]:
        order = build(name).order
        if not build(name).noises_per_step or order is None:
            continue
        samplers += [fit(Sampler(name, 1, spacing, settings), schedule, calls) for spacing in ("uniform", "karras")]
        times = partial(fitted_times, reference, schedule, power=1 / (order + 1))
        samplers.append(fit(Sampler(name, 1, "fitted", settings), schedule, calls, times))
        for log_snr in EARLY_STOP_LOG_SNRS if name in LOW_ORDER_END_SOLVERS and calls > 1 else ():
            if top < log_snr < clean:
                template = Sampler(name, 1, f"to log-SNR {log_snr:g}", {**settings, "end": "low"})
                times = partial(early_stop_times, schedule, log_snr=log_snr)
                samplers.append(fit(template, schedule, calls, times))
    return [sampler for sampler in samplers if sampler is not None]


def score_features(sampler: Sampler | None, drawn: Tensor, real: Tensor) -> SamplerScore:
    """The distance of ``drawn`` features (n, D) from the ``real`` ones (N, D)."""
    group, blocks = torch.arange(len(drawn)) % JACKKNIFE_GROUPS, min(10, len(drawn) // 2, len(real) // 2)
    distances = [frechet(drawn[group != g], real) for g in range(JACKKNIFE_GROUPS)]
    jackknife = torch.tensor(distances, dtype=torch.float64)
    return SamplerScore(sampler, frechet(drawn, real), jackknife, kernel(drawn, real, blocks))


def floor_size(n: int, others: Tensor) -> int:
    """How many of the ``others`` are compared for the floor: ``n``, or half of them."""
    return min(n, len(others) // 2)


@torch.no_grad()
def score_samplers(
    model: Diffusion,
    samplers: Sequence[Sampler],
    items: ComparedItems,
    n: int = 500,
    seed: int = 0,
    batch: int = 64,
    progress: Callable[[int], None] = lambda steps: None,
) -> tuple[list[SamplerScore], SamplerScore]:
    """(scores of ``samplers`` against the held-out ``items``, nearest first; the floor), by ``n`` samples each.

    The floor is the score of the last ``n`` of the other items, in random order, or of half of those; from the rest the
    principal components are computed. Samplers with NaN or infinite samples are omitted. All draw with the first ``n``
    conditions of ``items`` and from the same ``seed``. ``progress`` is called with the number of item-steps done.
    """
    size = floor_size(n, items.others)
    rest, as_samples = items.others.split([len(items.others) - size, size])
    cond = items.cond and items.cond.take(slice(n))

    def in_units_of_x(values: Tensor) -> Iterator[Tensor]:  # in parts: an encoder, and float64, need much memory
        for part in values.split(batch):
            yield model.transform.to_model(part.to(model.device)).flatten(1).cpu().double()

    _, axes = principal_components(torch.cat([*in_units_of_x(rest[:MAX_FIT_ITEMS])]))

    def features(values: Tensor) -> Tensor:
        return torch.cat([part @ axes for part in in_units_of_x(values)])

    real, scores = features(items.held_out), []
    for sampler in samplers:
        with suppress(NonFiniteError):
            drawn = features(model.sample(n, seed, sampler, cond, batch=batch, progress=progress))
            scores.append(score_features(sampler, drawn, real))
    return sorted(scores, key=lambda score: score.distance), score_features(None, features(as_samples), real)


def rank_samplers(
    model: Diffusion,
    samplers: Sequence[Sampler],
    items: ComparedItems,
    n: int = 500,
    seed: int = 0,
    progress: Callable[[int], None] = lambda steps: None,
) -> tuple[list[SamplerScore], SamplerScore]:
    """`score_samplers` of the `NUM_FINALISTS` that are best by a quarter of the ``n`` samples, by all of them."""
    first_round, _ = score_samplers(model, samplers, items, max(MIN_ITEMS, n // 4), seed, progress=progress)
    finalists = [score.sampler for score in first_round[:NUM_FINALISTS] if score.sampler]
    return score_samplers(model, finalists, items, n, seed, progress=progress)
