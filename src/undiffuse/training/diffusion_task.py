"""Training a diffusion model: the bound of held-out items and samples on fixed noise during the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse.data.dataset import Dataset, Split
from undiffuse.data.transform import transform_for
from undiffuse.errors import DataError
from undiffuse.evaluation.memorization_test import generalization_gap, matched_items
from undiffuse.model import checkpoint
from undiffuse.model.config import Config, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.presets import adapt_to_data
from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import init_statistics
from undiffuse.networks.registry import network_settings
from undiffuse.report.figures import image_grid
from undiffuse.sampling.sampler import Sampler
from undiffuse.training.batches import Batch, TrainingStatistics
from undiffuse.training.fit import fit
from undiffuse.training.run_folder import Run, describe
from undiffuse.training.task import Evaluation, Task

HELD_OUT_ITEMS = 64
"""Held-out items, and as many training items, of which the bound is measured during a run."""
MC_SAMPLES, FINAL_MC_SAMPLES = 8, 32
"""Noise levels per item for that bound: at every evaluation, and once more at the end."""
PREVIEW_ITEMS, PREVIEW_STEPS = 36, 12
FINAL_ITEMS, FINAL_STEPS = 64, 100
"""Samples in a picture and their sampler steps: at every evaluation, and at the end."""


def fit_diffusion(
    config: Config,
    data: Dataset,
    out: str | Path,
    device: str | torch.device = "auto",
    init: str | Path | None = None,
    quiet: bool = False,
    force: bool = False,
    network: nn.Module | type[nn.Module] | None = None,
) -> Path:
    """Train a diffusion model on ``data`` into the run folder ``out``, which is returned; `undiffuse.fit`.

    An unfinished run in ``out`` is resumed. ``network`` is a network of your own, or its class, in place of the one
    that ``config`` describes (`undiffuse.networks.protocol`). The rest as in `undiffuse.training.fit.fit`.
    """
    return fit(DiffusionTask(config, network), data, Run(out), device, init, quiet, force)


@dataclass
class DiffusionTask(Task):
    """Train the recipe ``config``, with ``network`` in place of the one that it describes if given."""

    config: Config
    network: nn.Module | type[nn.Module] | None = None

    def adapt(self, data: Dataset, settings: TrainConfig) -> DiffusionTask:
        if settings.conditional and not data.condition_sizes:
            cause = "these data have no labels, vectors or tokens for each item"
            raise DataError("NO_CONDITIONS", data.name, cause, "Omit --conditional, or sort images into sub-folders")
        config = replace(self.config, train=settings)
        if self.network is not None:
            described = network_settings(self.network, config.model.network)
            config = replace(config, model=replace(config.model, network=described))
        return replace(self, config=adapt_to_data(config, data.num_values, data.condition_sizes))

    def build_model(self, data: Dataset, split: Split) -> Diffusion:
        settings = self.config.train
        transform = transform_for(data, None if data.num_values is not None else data.moments(split.train))
        info = describe(data) | {"held_out": settings.held_out}
        model = Diffusion(self.config.model, data.item_shape, transform, info, self.network)
        init_statistics(model.network, TrainingStatistics(data, split.train, settings.conditional))
        model.autocast = torch.bfloat16 if settings.precision == "bfloat16" else None
        return model

    def parameter_groups(self, model: Diffusion) -> list[dict[str, Any]]:
        return model.parameter_groups(self.config.train.weight_decay)

    def loss(self, model: Diffusion, batch: Batch, network: nn.Module) -> Tensor:
        return model.loss(*batch, network=network)

    def after_step(self, model: Diffusion, batch: Batch, losses: Tensor) -> None:
        model.update_time_sampler(batch.u, losses)

    def extra_state(self, model: Diffusion) -> dict[str, Tensor]:
        return model.time_sampler_state

    def evaluate(self, model: Diffusion, data: Dataset, split: Split, final: bool) -> Evaluation:
        """The bound of held-out items, bits per dimension, and its gap to that of training items on the same noise.

        ``final`` adds a second estimate from more noise levels, which is not part of the curve.
        """
        held_out, training = matched_items(split, HELD_OUT_ITEMS)
        if len(held_out) == 0:
            return Evaluation({}, "no held-out items")
        bits, stderr = self._bound(model, data, held_out, MC_SAMPLES)
        training_bits, _ = self._bound(model, data, training, MC_SAMPLES)
        gap = generalization_gap(bits, training_bits, num_tests=self.config.train.previews + 1)
        numbers = {"bits_per_dim": float(bits.mean()), "stderr": stderr}
        numbers |= {"gap": gap.mean, "gap_stderr": gap.stderr, "overfit": gap.significant}
        details = []
        if final:
            bits, stderr = self._bound(model, data, held_out, FINAL_MC_SAMPLES)
            numbers |= {"final_bits_per_dim": float(bits.mean()), "final_stderr": stderr}
            details.append(f"final, with {FINAL_MC_SAMPLES} noise levels per item: {_format_bound(numbers, 'final_')}")
        if gap.significant:
            details.append(
                "overfitting: training items have a bound lower than that of held-out items by "
                f"{gap.mean:.3f} ± {gap.stderr:.3f} bits/dim, on the same noise and times"
            )
        numbers = {name: x for name, x in numbers.items() if not (name.endswith("stderr") and math.isnan(x))}
        return Evaluation(numbers, f"held out {_format_bound(numbers)}", details)

    def draw(self, model: Diffusion, data: Dataset, split: Split, folder: Path, step: int | None) -> None:
        """A grid of samples on fixed noise, ``samples-STEP.png``, and ``samples.png`` at the end."""
        final = step is None
        n, num_steps = (FINAL_ITEMS, FINAL_STEPS) if final else (PREVIEW_ITEMS, PREVIEW_STEPS)
        samples = model.sample(
            n, seed=0, cond=self._preview_condition(data, split, n), sampler=Sampler(num_steps=num_steps)
        )
        picture = image_grid(samples.numpy(), data.num_values, names=data.columns)
        picture.save(folder / ("samples.png" if final else f"samples-{step:08d}.png"))

    def save(self, model: Diffusion, path: Path) -> None:
        checkpoint.save(model, path)

    def load(self, path: Path) -> Diffusion:
        return checkpoint.load(path, network=self.network)

    def _bound(self, model: Diffusion, data: Dataset, items: np.ndarray, mc_samples: int) -> tuple[Tensor, float]:
        """The bound of each item, bits per dimension, and the standard error of its mean."""
        values, cond = torch.from_numpy(data.values[items]), self._condition(data, items)
        nll = model.nll(values, seed=0, mc_samples=mc_samples, batch=HELD_OUT_ITEMS, cond=cond)
        return nll.bits_per_dim(model.dims), float(nll.stderr) / (model.dims * math.log(2))

    def _condition(self, data: Dataset, items: np.ndarray) -> Condition | None:
        return data.condition(items) if self.config.train.conditional else None

    def _preview_condition(self, data: Dataset, split: Split, n: int) -> Condition | None:
        """Each label in turn if there are only labels, else the conditions of held-out (or training) items, or None."""
        if self.config.train.conditional and data.cond is None:
            return Condition(label=torch.arange(n) % len(data.classes))
        return self._condition(data, np.resize(split.validation if len(split.validation) else split.train, n))


def _format_bound(numbers: dict[str, Any], prefix: str = "") -> str:
    stderr = f" ± {numbers[prefix + 'stderr']:.3f}" if not math.isnan(numbers.get(prefix + "stderr", math.nan)) else ""
    return f"≤ {numbers[prefix + 'bits_per_dim']:.3f}{stderr} bits/dim"
