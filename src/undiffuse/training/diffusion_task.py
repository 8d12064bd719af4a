"""Training a diffusion model: the bound of held-out items and samples on fixed noise during the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse.data.dataset import Dataset, Split
from undiffuse.data.stage_data import StageData
from undiffuse.data.transform import DataTransform
from undiffuse.errors import ConfigError, DataError, counted
from undiffuse.evaluation.baselines import shared_values
from undiffuse.evaluation.memorization_test import generalization_gap, matched_items
from undiffuse.evaluation.time_limit import TimeLimit
from undiffuse.model import checkpoint
from undiffuse.model.autoencoder import Autoencoder
from undiffuse.model.build import build_part
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform
from undiffuse.model.presets import adapt_to_data
from undiffuse.networks.protocol import init_statistics
from undiffuse.networks.registry import network_settings
from undiffuse.process import schedule as schedules
from undiffuse.process.discrete_schedule import Tabulated
from undiffuse.process.statistics import mean_with_stderr
from undiffuse.report.figures import image_grid
from undiffuse.runtime.own_output import save_described
from undiffuse.runtime.precision import autocast_dtype
from undiffuse.sampling.sampler import Sampler
from undiffuse.training import initial_weights, latents
from undiffuse.training.batches import Batch, Reader, TrainingStatistics
from undiffuse.training.fit import fit
from undiffuse.training.latents import stored_autoencoder
from undiffuse.training.run_folder import Run
from undiffuse.training.task import Evaluation, Task
from undiffuse.training.task_parts import (
    data_facts,
    fitted_transform,
    optimizer_groups,
    picture_condition,
    picture_path,
)

HELD_OUT_ITEMS = 64
"""Held-out items, and as many training items, of which the bound is measured during a run."""
MC_SAMPLES, FINAL_MC_SAMPLES, MIN_MC_SAMPLES = 8, 32, 2
"""Noise levels per item for that bound: at every evaluation, once more at the end, and where the time is short."""
SCHEDULE_LR_FACTOR = 10.0
"""The learning rate of a learned schedule's parameters, relative to that of the network."""
PREVIEW_ITEMS, PREVIEW_STEPS = 36, 12
FINAL_ITEMS, FINAL_STEPS = 64, 100
"""Samples in a picture and their sampler steps: at every evaluation, and at the end."""
BASELINE_ITEMS = 256
"""Training items whose values are counted to tell whether a run by the clock has learned anything."""


def fit_diffusion(
    config: Config,
    data: Dataset,
    out: str | Path,
    device: str | torch.device = "auto",
    init: str | Path | None = None,
    quiet: bool = False,
    force: bool = False,
    network: nn.Module | type[nn.Module] | None = None,
    autoencoder: Autoencoder | None = None,
    loggers: Sequence[str] = (),
) -> Path:
    """Train a diffusion model on ``data`` into the run folder ``out``, which is returned; `undiffuse.fit`.

    An unfinished run in ``out`` is resumed. ``network`` is a network of your own, which is copied, or its class, in
    place of the one that ``config`` describes (`undiffuse.networks.protocol`). With an ``autoencoder`` the model is one
    of its latents; a resumed run finds the one that it began with. ``loggers`` are names of
    `undiffuse.training.loggers.LOGGERS`, which get the records too. ``device`` is a name of torch's or "auto";
    ``init`` a run or model file whose weights a new run starts from; ``quiet`` prints nothing; ``force`` resumes
    although recipe, data or torch have changed. Raises `ConfigError`, `DataError`, `CheckpointError`,
    `NonFiniteError`, `ResourceError`, and `Interrupted` after a signal, as `undiffuse.training.fit.fit` says.
    """
    if autoencoder is None and config.model.autoencoder:
        autoencoder = stored_autoencoder(Path(out))
    return fit(DiffusionTask(config, network, autoencoder), data, Run(out, loggers), device, init, quiet, force)


@dataclass
class DiffusionTask(Task):
    """Train the recipe ``config``, with a copy of ``network`` in place of the one that it describes if given.

    With an ``autoencoder`` the model is one of its latents. ``start`` is the model whose weights a run starts from
    (`undiffuse.training.initial_weights`), with its path.
    """

    config: Config
    network: nn.Module | type[nn.Module] | None = None
    autoencoder: Autoencoder | None = None
    start: tuple[Diffusion, Path] | None = None

    def start_from(self, start: Diffusion, path: Path) -> DiffusionTask:
        initial_weights.check_not_distilled(start, path)
        autoencoder = self.autoencoder
        if autoencoder is None and isinstance(start.transform, LatentTransform):
            autoencoder = start.transform.autoencoder
        return replace(self, start=(start, path), autoencoder=autoencoder)

    def load_initial_weights(self, model: Diffusion, start: Diffusion, path: Path) -> Sequence[str]:
        return initial_weights.load_initial_weights(model, start, path)

    def adapt(self, data: Dataset, settings: TrainConfig) -> DiffusionTask:
        if self.config.model.calls:
            cause = "a distilled model learns from another model"
            raise ConfigError("CONFIG", f"model.calls = {self.config.model.calls}", cause, "Use 'undiffuse distill'")
        if settings.conditional and not data.condition_sizes.keys() - {"image"}:
            cause = "these data have no labels, vectors, tokens or captions for each item"
            fix = "Omit --conditional, sort images into sub-folders, or give captions and --captions"
            raise DataError("NO_CONDITIONS", data.name, cause, fix)
        config = replace(self.config, train=settings)
        if self.autoencoder is not None:
            latents.check_data(self.autoencoder, data, settings)
            fingerprint = initial_weights.autoencoder_fingerprint(self.autoencoder, self.start and self.start[0])
            config = replace(config, model=replace(config.model, autoencoder=fingerprint))
        elif config.model.autoencoder:
            cause = f"the recipe is one of latents, of the autoencoder {config.model.autoencoder[:12]}"
            raise ConfigError("AUTOENCODER", "model.autoencoder", cause, "Give the autoencoder")
        if self.network is not None:
            described = network_settings(self.network, config.model.network)
            config = replace(config, model=replace(config.model, network=described))
        num_values = data.num_values if self.autoencoder is None else None
        if self.start is not None:
            config = initial_weights.without_sizes_of(config, self.start[0], data)
        config = adapt_to_data(config, num_values, data.condition_sizes)
        if self.start is not None:
            initial_weights.check_start(config, data, *self.start)
        return replace(self, config=config)

    def other_models(self) -> dict[str, Any]:
        return {} if self.autoencoder is None else {"the autoencoder": self.autoencoder}

    def notes(self) -> Sequence[str]:
        model = self.config.model
        schedule = build_part("schedule", schedules.build, model.schedule)
        notes = list(schedule.notes) if isinstance(schedule, Tabulated) else []
        chosen, own = model.weight.get("name"), "simple" if model.loss == "hybrid" else "bound"
        if model.loss != "weighted_mse" and chosen != own and model.weight != ModelConfig().weight:
            notes.append(f"the weight {chosen!r} has no effect: the loss {model.loss!r} has its own, {own!r}")
        return notes

    def build_model(self, data: Dataset, split: Split) -> Diffusion:
        settings = self.config.train
        if self.start is not None:
            transform: DataTransform = initial_weights.initial_transform(data, *self.start)
        elif self.autoencoder is not None:
            transform = LatentTransform(latents.fitted(self.autoencoder, data, split.train))
        else:
            transform = fitted_transform(data, split)
        facts = data_facts(data, settings)
        model = Diffusion(self.config.model, data.item_shape, transform, facts, self._copied_network())
        if model.condition_sizes.keys() - {"image"} and not settings.conditional:
            model.info["conditional"] = False  # a network that started from another model's may accept conditions
            if self.start is not None and "classes" in model.condition_sizes:
                model.info["classes"] = list(self.start[0].info.get("classes", []))  # of the network's rows
        init_statistics(model.network, TrainingStatistics(data, split.train, settings.conditional))
        model.autocast = autocast_dtype(settings.precision)
        return model

    def parameter_groups(self, model: Diffusion) -> list[dict[str, Any]]:
        """The network, then a learned schedule."""
        schedule = model.schedule.parameters() if isinstance(model.schedule, nn.Module) else ()
        return optimizer_groups(self.config.train, model.network, schedule, SCHEDULE_LR_FACTOR)

    def loss(self, model: Diffusion, batch: Batch, network: nn.Module) -> Tensor:
        z = batch.z if model.target.needs_next_level else None  # other targets have no fresh noise
        return model.loss_of_x(latents.batch_x(model, batch), batch.u, batch.eps, z, batch.cond, network)

    def reader(self, model: Diffusion, data: Dataset, split: Split, folder: Path | None) -> Reader:
        return latents.reader_of(model, self.autoencoder, data, split.train, self.config.train, folder)

    def after_step(self, model: Diffusion, batch: Batch, losses: Tensor) -> None:
        model.update_time_sampler(batch.u, losses)

    def extra_state(self, model: Diffusion) -> dict[str, Tensor]:
        return model.time_sampler_state

    def evaluate(self, model: Diffusion, data: Dataset, split: Split, final: bool, limit: TimeLimit) -> Evaluation:
        """The bound of held-out items, bits per dimension, and its gap to that of training items on the same noise.

        ``final`` adds a second estimate from more noise levels, which is not part of the curve. Where ``limit`` is
        short, both have fewer noise levels and items, the first ones of the same random order.
        """
        matched = matched_items(data, split, HELD_OUT_ITEMS)
        if len(matched[0]) == 0:
            return Evaluation({}, "no held-out items")
        if self.autoencoder is not None and self.autoencoder.is_deterministic:
            return Evaluation({}, "no bound, because the encoder is deterministic")
        curve = limit.share(0.4) if final else limit
        measured, mc_samples = self._bounds(model, data, matched, MC_SAMPLES, curve)
        if measured is None:
            return Evaluation({}, "no time for a measurement")
        bits, training_bits = measured
        gap = generalization_gap(bits, training_bits, num_tests=self.config.train.previews + 1)
        overfit = gap.significant and data.validation_from is None  # an official part may differ from training items
        numbers = _numbers(bits, mc_samples)
        numbers |= {"gap": gap.mean, "gap_stderr": gap.stderr, "overfit": overfit}
        details = []
        if final:
            more, mc_samples = self._bounds(model, data, matched[:1], FINAL_MC_SAMPLES, limit)
            if more is not None:
                numbers |= _numbers(more[0], mc_samples, "final_")
                of = "" if len(more[0]) == len(matched[0]) else f" for {counted(len(more[0]), 'item')}"
                bound = _format_bound(numbers, "final_")
                details.append(f"final, with {counted(mc_samples, 'noise level')} per item{of}: {bound}")
            details += self._worse_than_baseline(data, split, matched[0][: len(bits)], float(bits.mean()))
        if overfit:
            details.append(
                "overfitting: training items have a bound lower than that of held-out items by "
                f"{gap.mean:.3f} ± {gap.stderr:.3f} bits/dim, on the same noise and times"
            )
        numbers = {name: x for name, x in numbers.items() if not (name.endswith("stderr") and math.isnan(x))}
        summary = f"held out {_format_bound(numbers)}"
        if (numbers["items"], numbers["mc_samples"]) != (len(matched[0]), MC_SAMPLES):
            summary += f" ({counted(len(bits), 'item')}, {counted(numbers['mc_samples'], 'noise level')})"
        return Evaluation(numbers, summary, details)

    def draw(
        self, model: Diffusion, data: Dataset, split: Split, folder: Path, step: int | None, limit: TimeLimit
    ) -> None:
        """A grid of samples on fixed noise, ``samples-STEP.png``, and ``samples.png`` at the end.

        Where ``limit`` is short, there are fewer steps at the end, then fewer samples.
        """
        final = step is None
        n, num_steps = (FINAL_ITEMS, FINAL_STEPS) if final else (PREVIEW_ITEMS, PREVIEW_STEPS)
        num_steps = max(min(num_steps, PREVIEW_STEPS), int(min(num_steps, limit.calls_left / n)))
        num_steps = min(num_steps, model.chain_length)
        sampler = Sampler(num_steps=num_steps)
        cond = picture_condition(data, preview_items(split, n), self.config.train.conditional)

        def sample(here: slice) -> Tensor:
            items = here.stop - here.start
            return model.sample(items, seed=0, cond=cond and cond.take(here), sampler=sampler, first=here.start)

        if samples := limit.in_parts(sample, n, num_steps):
            values, num_values = torch.cat(samples).numpy(), data.num_values
            if isinstance(data, StageData):
                values, num_values = data.full_values(values, preview_items(split, n)[: len(values)])
            picture = image_grid(values, num_values, names=data.columns)
            words = f"{counted(len(values), 'sample')} by {sampler.describe()}, seed 0"
            save_described(picture, picture_path(folder, "samples", step), words)

    def save(self, model: Diffusion, path: Path) -> None:
        checkpoint.save(model, path)

    def load(self, path: Path) -> Diffusion:
        return checkpoint.load(path, network=self._copied_network())

    def _copied_network(self) -> nn.Module | type[nn.Module] | None:
        """A copy of a network of the user's own, which training leaves as it is. Raises `ConfigError`."""
        try:
            return deepcopy(self.network)
        except (RuntimeError, TypeError) as error:
            cause = f"it cannot be copied, and a copy is trained ({error})"
            fix = "Give its class, or a network that keeps no tensor of a forward pass"
            raise ConfigError("NETWORK", type(self.network).__name__, cause[:300], fix) from None

    def _bounds(
        self, model: Diffusion, data: Dataset, parts: Sequence[np.ndarray], mc_samples: int, limit: TimeLimit
    ) -> tuple[list[Tensor] | None, int]:
        """For each part the bound of each item, bits per dimension, and the noise levels of each item.

        None if there is not the time for two items, or for all if there is one.
        """
        items = len(parts[0])
        mc_samples = int(min(mc_samples, max(MIN_MC_SAMPLES, limit.calls_left / (len(parts) * items))))

        def measure(here: slice) -> list[Tensor]:
            bits = []
            for part in parts:
                values = data.tensor(part[here])
                cond = data.given_condition(part[here], self.config.train.conditional)
                settings = {"mc_samples": mc_samples, "batch": HELD_OUT_ITEMS, "first": here.start}
                nll = model.nll(values, seed=0, cond=cond, **settings)
                bits.append(nll.bits_per_dim(model.dims))
            return bits

        measured_parts = limit.in_parts(measure, items, len(parts) * mc_samples)
        measured = [torch.cat(bits) for bits in zip(*measured_parts, strict=True)]
        return (measured if measured and len(measured[0]) >= min(2, items) else None), mc_samples

    def _worse_than_baseline(self, data: Dataset, split: Split, items: np.ndarray, bits: float) -> list[str]:
        """A line if drawing each value independently of all others costs fewer bits."""
        if data.num_values is None:
            return []
        known = split.train[np.unique(np.linspace(0, len(split.train) - 1, BASELINE_ITEMS).astype(int))]
        baseline = shared_values(data.counts(known), data.counts(items))
        if bits < baseline:
            return []
        by_steps = self.config.train.max_steps is not None
        fix = self.train_longer.replace("minutes", "steps") if by_steps else self.train_longer
        return [f"hardly trained: values drawn independently cost only {baseline:.3f} bits/dim. {fix}"]


def preview_items(split: Split, n: int) -> np.ndarray:
    """Held-out items, or without any training items, (n,), whose conditions pictures are drawn with."""
    return np.resize(split.shown, n)


def _numbers(bits: Tensor, mc_samples: int, prefix: str = "") -> dict[str, Any]:
    """The mean of ``bits`` (n,) with its standard error, and of how many items and noise levels they are."""
    mean, stderr = mean_with_stderr(bits)
    numbers = {"bits_per_dim": float(mean), "stderr": float(stderr), "items": len(bits), "mc_samples": mc_samples}
    return {prefix + name: number for name, number in numbers.items()}


def _format_bound(numbers: dict[str, Any], prefix: str = "") -> str:
    stderr = f" ± {numbers[prefix + 'stderr']:.3f}" if not math.isnan(numbers.get(prefix + "stderr", math.nan)) else ""
    return f"≤ {numbers[prefix + 'bits_per_dim']:.3f}{stderr} bits/dim"
