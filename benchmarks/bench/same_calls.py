"""Samples by as many calls of one network: our solvers, the schedulers of diffusers, the samplers of k-diffusion.

The network is ours, trained on digits for `MINUTES` of processor time; all begin with the same noise. Fréchet and
kernel distances to the held-out images in principal components, beside the floor, that of as many training images.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_packages import hide_operators, import_k_diffusion
from torch import Tensor

from bench import diffusers_schedulers
from bench.record import Result, Table
from undiffuse import load, load_data, preset
from undiffuse.data.dataset import Dataset
from undiffuse.evaluation.sampler_ranking import score_features
from undiffuse.model.config import replace_train
from undiffuse.model.diffusion import Diffusion
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.prior import prior_sample
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.sampler_search import fit_to_budget
from undiffuse.training.diffusion_task import DiffusionTask
from undiffuse.training.fit import fit
from undiffuse.training.run_folder import Run

CALLS, N, MINUTES, BATCH, AXES = 10, 1000, 2.5, 100, 32
OURS = ("ddim", "dpm++2m", "dpm++2m_sde", "unipc", "heun")
DIFFUSERS = ("DDIM", "DPM-Solver++ 2M", "DPM-Solver++ 2M SDE", "UniPC", "Heun")
"""With `SPACING`, the one that ends at pure noise, as a model of ours needs."""
SPACING = "trailing"
K_DIFFUSION = {"sample_dpmpp_2m": 1, "sample_heun": 2, "sample_euler_ancestral": 1}
"""Functions with the network calls of a step, at the noise levels of `Sampler`."""
More = Callable[[int, int], Tensor]
AZULA = "azula is left out: it wraps a network in a denoiser of its own, whose levels are not those of a model of ours."


def by_ours(model: Diffusion, solver: str) -> More:
    sampler = fit_to_budget(Sampler(solver, CALLS), model.schedule, CALLS)
    assert sampler is not None
    return lambda first, n: model.sample(n, 0, sampler, batch=n, first=first)


def by_k_diffusion(model: Diffusion, function: Callable[..., Tensor], calls: int) -> More:
    """x/alpha is their state, sigma/alpha their noise level; the last one is 0."""
    denoise, levels = model.sampling_denoiser(), model.noise_levels(Sampler("ddim", CALLS // calls))
    ratios = torch.stack([level.sigma / level.alpha for level in levels[:-1]] + [torch.zeros((), dtype=torch.float64)])

    def at(ratio: Tensor) -> NoiseLevel:
        return model.schedule(model.schedule.inverse(-2 * ratio.double().log()))

    def predict(y: Tensor, ratio: Tensor) -> Tensor:
        level = at(ratio)
        return denoise(level.alpha.to(y).view(-1, *[1] * (y.ndim - 1)) * y, level).x

    def more(first: int, n: int) -> Tensor:
        x = prior_sample(levels[0], ItemNoise(0, range(first, first + n), model.item_shape)(1)[0])
        torch.manual_seed(first)
        with torch.no_grad():
            end = function(predict, x / float(levels[0].alpha), ratios.float(), disable=True)
        return model.transform.to_data(end)

    return more


def rows_of(model: Diffusion) -> tuple[dict[tuple[str, str], More], list[str]]:
    """The samples by (package, name), and notes about packages that are not installed."""
    rows, notes = {("undiffuse", name): by_ours(model, name) for name in OURS}, [AZULA]
    try:
        hide_operators()
        found = diffusers_schedulers.schedulers(model, [SPACING])
        for name in DIFFUSERS:
            calls = (CALLS + 1) // 2 if name == "Heun" else CALLS
            rows["diffusers", name] = diffusers_schedulers.samples(model, 0, found[f"{name}, {SPACING}"], calls)
    except ImportError as error:
        notes.append(f"diffusers was not measured: {error}.")
    try:
        theirs: Any = import_k_diffusion()
        for name, calls in K_DIFFUSION.items():
            rows["k-diffusion", name] = by_k_diffusion(model, getattr(theirs, name), calls)
    except ImportError as error:
        notes.append(f"k-diffusion was not measured: {error}. It is installed by pip with --no-deps.")
    return rows, notes


def trained_model(data: Dataset) -> Diffusion:
    """That of the preset `digits`, trained on ``data`` for `MINUTES`."""
    config = replace_train(preset("digits"), max_steps=None, minutes=MINUTES)
    with tempfile.TemporaryDirectory() as place:
        return load(
            fit(DiffusionTask(config), data, Run(Path(place) / "run"), "cpu", quiet=True, clock=time.process_time)
        )


def measure(
    rows: Mapping[tuple[str, str], More], to_x: Callable[[Tensor], Tensor], train: Tensor, held_out: Tensor, n: int = N
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Distances of ``n`` samples of each of ``rows`` to ``held_out`` (M, D); the first row is the floor.

    The floor is that of ``n`` rows of ``train`` (more than n, D). The axes are those of the other rows of ``train``:
    images are nearer to axes that were computed from them than samples can be. ``to_x`` gives such rows of samples.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    real, others = train[order[:n]], train[order[n:]]
    center, axes = others.mean(0), torch.linalg.svd(others - others.mean(0), full_matrices=False).Vh[:AXES]
    reference = (held_out - center) @ axes.T
    table, raw = [], {}

    def add(package: str, sampler: str, x: Tensor, seconds: float | None) -> None:
        score = score_features(None, (x - center) @ axes.T, reference)
        raw[f"{package}, {sampler}"] = {"frechet": score.mean, "kernel": score.kernel, "seconds": seconds, "n": len(x)}
        table.append(
            {
                "package": package,
                "sampler": sampler,
                "Fréchet": "{:.3f} ± {:.3f}".format(*score.mean),
                "kernel": "{:.4f} ± {:.4f}".format(*score.kernel),
                "seconds": "" if seconds is None else f"{seconds:.1f}",
            }
        )
        print(f"  {package}, {sampler}", file=sys.stderr, flush=True)

    add("real images", "the floor", real, None)
    for (package, name), more in rows.items():
        began = time.process_time()
        drawn = torch.cat([more(first, min(BATCH, n - first)) for first in range(0, n, BATCH)])
        seconds = time.process_time() - began
        add(package, name, to_x(drawn), seconds)
    return table, raw


def run(options: argparse.Namespace) -> Result:
    torch.set_num_threads(options.threads or 1)
    data = load_data("digits")
    model = trained_model(data)
    split = data.split(model.info["held_out"])

    def to_x(values: Tensor) -> Tensor:
        return model.transform.to_model(values).flatten(1).double()

    unseen = np.concatenate([split.validation, split.test])
    train, held_out = (to_x(torch.from_numpy(data.values[part])) for part in (split.train, unseen))
    rows, notes = rows_of(model)
    table, raw = measure(rows, to_x, train, held_out)
    floor = (
        f"The floor is the distance of {N:,} training images, as many as the samples: the {len(held_out)} images that "
        f"the network did not see are too few for it. Axes are those of the other {len(train) - N} training images."
    )
    title = (
        f"{CALLS} network calls, {N:,} samples of digits, one network, {MINUTES:g} minutes of training; distances to "
        f"{len(held_out)} held-out images"
    )
    return Result("Samples by the same network and calls", [Table(title, table)], raw, notes=[floor, *notes])
