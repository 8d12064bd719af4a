"""Distillation: from a diffusion model to one that draws samples with few network calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse.data.dataset import Dataset, Split
from undiffuse.data.transform import IntegerLevels, values_transform
from undiffuse.denoising.denoiser import Denoiser, Prediction
from undiffuse.errors import ConfigError, DataError, counted
from undiffuse.evaluation.plan import describe_items
from undiffuse.evaluation.time_limit import TimeLimit
from undiffuse.likelihood.probability_flow import rademacher
from undiffuse.model import checkpoint
from undiffuse.model.config import ModelConfig, TrainConfig
from undiffuse.model.consistency import (
    consistency_loss,
    few_call_sampler,
    level_after_gap,
    noisiest_level,
    teacher_step,
)
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.flow_map import (
    OBJECTIVES,
    flow_map_loss,
    lagrangian_with_slope,
    map_levels,
    slope_estimate,
)
from undiffuse.model.latent import LatentTransform
from undiffuse.networks import registry
from undiffuse.networks.condition import CONDITION_NAMES, Condition
from undiffuse.process.gaussian import diffuse
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.statistics import item_mean
from undiffuse.process.time_sampling import LogNormalSigma
from undiffuse.report.figures import image_grid
from undiffuse.runtime.device import to_device
from undiffuse.runtime.own_output import save_described
from undiffuse.runtime.precision import autocast_dtype
from undiffuse.sampling.sampler import Sampler
from undiffuse.training.batches import Batch, Reader
from undiffuse.training.fit import fit
from undiffuse.training.initial_weights import check_text_encoder
from undiffuse.training.latents import batch_x, reader_of
from undiffuse.training.run_folder import Run
from undiffuse.training.task import Evaluation, Task
from undiffuse.training.task_parts import data_facts, optimizer_groups, picture_condition, picture_path

METHODS = ("consistency", *OBJECTIVES)
"""Consistency training, and the objectives of a flow map."""
BOTH_WAYS_METHOD = "lagrangian"
"""A consistency model ends at data. MeanFlow's derivative is at the start of the map: where that is near data and the
end near noise, it is multiplied by up to 1,000, as (τ_t − τ_s)/h is."""
PAIRS = ("teacher", "data")
GAPS = (1 / 4, 1 / 8, 1 / 16)
"""1 − u_r/u_t in equal parts of the run, u = sigma/alpha."""
LOG_RATIO_MEAN, LOG_RATIO_STD = -1.1, 2.0
"""Mean and standard deviation of log(sigma_t/alpha_t) in training [Geng24 table 1]."""
OF_OTHER_WEIGHTS = ("imported", "init", "ema", "ema_error")
"""Facts of a teacher's file that are not true of the model that is trained from it."""
EVALUATED_ITEMS, TEACHER_STEPS = 64, 25
"""Samples that are compared with the teacher's, and the steps of Heun's method that those take."""


@dataclass(frozen=True)
class DistillationRecipe:
    """A recipe of a distillation: the distilled model, how it is trained, and what it is trained with.

    ``method`` is one of `METHODS`. ``pairs`` is one of `PAIRS`, where x_r comes from, or for a flow map the velocity.
    ``both_ways``: the method `BOTH_WAYS_METHOD` also learns to go from data to noise. ``guidance`` is the scale of
    classifier-free guidance of the teacher, which becomes part of the model. ``teacher`` is the fingerprint of the
    teacher's weights. Raises `ConfigError`.
    """

    model: ModelConfig
    train: TrainConfig
    pairs: str = "teacher"
    guidance: float = 1.0
    teacher: str = ""
    method: str = "consistency"
    both_ways: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError("CONFIG", f"method = {self.method!r}", "unknown", f"Use one of {', '.join(METHODS)}")
        if self.both_ways and self.method != BOTH_WAYS_METHOD:
            cause = f"{self.method} goes from noise to data only"
            raise ConfigError("CONFIG", "both_ways", cause, f"Use the method {BOTH_WAYS_METHOD}")
        if self.pairs not in PAIRS:
            raise ConfigError("CONFIG", f"pairs = {self.pairs!r}", "unknown", f"Use one of {', '.join(PAIRS)}")
        if self.pairs == "data" and self.guidance != 1:
            raise ConfigError("GUIDANCE", "pairs = 'data'", "only a teacher can be guided", "Use the pairs 'teacher'")


def fit_distillation(
    teacher: Diffusion,
    data: Dataset,
    out: str | Path,
    train: TrainConfig,
    calls: int = 1,
    pairs: str = "teacher",
    guidance: float = 1.0,
    device: str = "auto",
    quiet: bool = False,
    force: bool = False,
    method: str = "consistency",
    both_ways: bool = False,
) -> Path:
    """Distill ``teacher`` into a model that samples with so many ``calls``, in the run folder ``out``; returns ``out``.

    The model starts from the teacher's weights. An unfinished run in ``out`` is resumed. ``data`` are those of the
    teacher; the rest as in `distillation_task` and `undiffuse.training.fit.fit`.
    """
    task = distillation_task(teacher, train, calls, pairs, guidance, method, both_ways)
    return fit(task, data, Run(out), device, None, quiet, force)


def distillation_task(
    teacher: Diffusion,
    train: TrainConfig,
    calls: int = 1,
    pairs: str = "teacher",
    guidance: float = 1.0,
    method: str = "consistency",
    both_ways: bool = False,
) -> DistillationTask:
    """The task of distilling ``teacher``; ``pairs``, ``guidance``, ``method``, ``both_ways`` of `DistillationRecipe`.

    Raises `ConfigError` for settings that are out of range, for a teacher that is distilled itself, and for a flow map
    with a network that has no setting ``two_times``.
    """
    if teacher.config.calls:
        cause = "it is distilled already: its predictions are samples of the data, not means"
        if teacher.config.few_call_solver == "flow_map":
            cause = "it is distilled already: it is a flow map between two times, and a teacher has one time"
        raise ConfigError("DISTILLED", "the teacher", cause, "Give the model that it was distilled from")
    if "image" in teacher.condition_sizes:
        cause = "it is a super-resolution model, and only models without a conditioning image are distilled"
        raise ConfigError("DISTILLED", "the teacher", cause, "Distill the base of the cascade")
    model, weights = replace(teacher.config, calls=calls), checkpoint.fingerprint(teacher)
    if method in OBJECTIVES:
        kind = model.network["kind"]
        if not registry.accepted(registry.find(kind), ["two_times"]):
            cause = "a flow map gets a second time, and this network has no setting 'two_times'"
            raise ConfigError("NETWORK", kind, cause, "Use the method 'consistency', or a network that has it")
        model = replace(model, network={**model.network, "two_times": True}, divergence=both_ways)
    return DistillationTask(DistillationRecipe(model, train, pairs, guidance, weights, method, both_ways), teacher)


@dataclass
class DistillationTask(Task):
    """Train the recipe ``config`` with pairs of ``teacher``."""

    config: DistillationRecipe
    teacher: Diffusion
    train_longer: ClassVar = "Distill again with more --minutes, into another --out"

    def adapt(self, data: Dataset, settings: TrainConfig) -> DistillationTask:
        """A flow map computes in float32: its differences of two calls are below the precision of bfloat16.

        Raises `DataError` for data of another kind than the teacher's, or whose conditions mean something else.
        """
        fix = "Give the data that the teacher was trained on"
        transform = values_transform(self.teacher.transform)
        num_values = transform.num_values if isinstance(transform, IntegerLevels) else None
        if (data.item_shape, data.num_values) != (self.teacher.item_shape, num_values):
            theirs = describe_items(self.teacher.item_shape, num_values)
            cause = f"the items are {describe_items(data.item_shape, data.num_values)}, those of the teacher {theirs}"
            raise DataError("SHAPE", data.name, cause, fix)
        sizes = self.teacher.trained_condition_sizes
        if self.config.guidance != 1 and not sizes:
            cause = "the teacher has no conditions"
            raise ConfigError("GUIDANCE", f"guidance = {self.config.guidance:g}", cause, "Leave it out")
        if sizes and not sizes.keys() & data.condition_sizes.keys():
            theirs = " or ".join(CONDITION_NAMES[name] for name in sizes)
            cause = f"these data have no {theirs}, on which the teacher was trained"
            raise DataError("NO_CONDITIONS", data.name, cause, fix)
        if sizes:
            check_text_encoder(self.teacher, data, "the teacher")
        for name, size in sizes.items():
            own = data.condition_sizes.get(name, size)
            if own > size if name == "text" else own != size:
                cause = f"their {CONDITION_NAMES[name]} have the size {own}, those of the teacher {size}"
                raise DataError("CONDITION", data.name, cause, fix)
        classes = self.teacher.info.get("classes", ()) if "classes" in sizes else ()
        for label, (own, known) in enumerate(zip(data.classes, classes, strict=False)):
            if own != known:
                cause = f"their label {label} is {own!r}, that of the teacher {known!r}"
                raise DataError("CONDITION", data.name, cause, fix)
        precision = "float32" if self.config.method in OBJECTIVES else settings.precision
        settings = replace(settings, conditional=bool(sizes), precision=precision)
        return replace(self, config=replace(self.config, train=settings))

    def other_models(self) -> dict[str, Any]:
        transform = self.teacher.transform
        latent = {"the autoencoder": transform.autoencoder} if isinstance(transform, LatentTransform) else {}
        return latent | {"the teacher": self.teacher}

    def build_model(self, data: Dataset, split: Split) -> Diffusion:
        """The teacher's architecture with the teacher's weights; a second time has no effect at first.

        The outputs for the slope of a map both ways follow the teacher's, with weights 0.
        """
        teacher, config, given = self.teacher, self.config, ("teacher", "guidance", "pairs", "method", "both_ways")
        info = {name: fact for name, fact in teacher.info.items() if name not in OF_OTHER_WEIGHTS}
        info |= data_facts(data, config.train)
        info |= {name: teacher.info[name] for name in ("classes", "text_encoder") if teacher.info.get(name)}
        info |= {"distilled": {name: getattr(config, name) for name in given}}
        model = Diffusion(config.model, teacher.item_shape, teacher.transform, info)
        own = model.state_dict()
        model.load_state_dict(own | {name: _extended(w, own[name]) for name, w in teacher.state_dict().items()})
        model.autocast = autocast_dtype(config.train.precision)
        if isinstance(model.schedule, nn.Module):  # it is not trained
            model.schedule.requires_grad_(False)
        return model

    def parameter_groups(self, model: Diffusion) -> list[dict[str, Any]]:
        """The network alone: a learned schedule stays as the teacher has it."""
        return optimizer_groups(self.config.train, model.network)

    def loss(self, model: Diffusion, batch: Batch, network: nn.Module) -> Tensor:
        """The loss of the method: `flow_map_loss` of its row of `OBJECTIVES`, or `consistency_loss`.

        The gap of the latter is that of the part of the run that ``batch.fraction`` lies in.
        """
        if self.config.method in OBJECTIVES:
            return self._flow_map_loss(model, batch, network)
        schedule, device = model.schedule, batch.device
        x = batch_x(model, batch).to(device)
        times = LogNormalSigma(schedule, LOG_RATIO_MEAN, LOG_RATIO_STD)
        t = schedule(times.sample(batch.u))
        gap = GAPS[min(int(batch.fraction * len(GAPS)), len(GAPS) - 1)]
        r = level_after_gap(schedule, t, gap)
        x_t = diffuse(x, t, batch.eps)
        if self.config.pairs == "data":
            x_r = diffuse(x, r, batch.eps)
        else:
            with torch.no_grad():
                x_r = teacher_step(self._teacher_denoiser(device), x_t, t, r, batch.cond)
        return consistency_loss(model.denoiser(network), x_t, t, x_r, r, gap, batch.cond)

    def _flow_map_loss(self, model: Diffusion, batch: Batch, network: nn.Module) -> Tensor:
        """The velocity is the teacher's; with pairs from the data it is ε − x at x_t, and elsewhere the model's own.

        A map both ways learns its slope beside it, from x̂ of the same flow with one probe of random signs.
        """
        config, device = self.config, batch.device
        x, denoise = batch_x(model, batch).to(device), model.denoiser(network)
        t, s = map_levels(model.schedule, batch.u, batch.r, config.both_ways)
        x_t = diffuse(x, t, batch.eps)
        from_data = config.pairs == "data"
        flow = denoise if from_data else self._teacher_denoiser(device)

        def velocity_of(prediction: Prediction) -> Tensor:
            v = (prediction.eps - prediction.x).detach()
            is_at_x_t = to_device(t.t == s.t, device).reshape(-1, *[1] * (x.ndim - 1))
            return torch.where(is_at_x_t, batch.eps - x, v) if from_data else v

        def velocity(at: Tensor, level: NoiseLevel) -> Tensor:
            if from_data and config.method == "meanflow":
                return batch.eps - x
            return velocity_of(flow(at, level, batch.cond))

        def sloped_velocity(at: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                at = at.detach().requires_grad_()
                prediction = flow(at, level, batch.cond)
            return velocity_of(prediction), slope_estimate(prediction.x, at, level, rademacher(batch.z).to(at))

        if not config.both_ways:
            return flow_map_loss(OBJECTIVES[config.method](denoise, velocity, x_t, t, s, batch.cond))
        error, slope_error = lagrangian_with_slope(denoise, sloped_velocity, x_t, t, s, batch.cond)
        return flow_map_loss(error) + item_mean(slope_error**2)

    def _teacher_denoiser(self, device: torch.device) -> Denoiser:
        """That of the teacher in evaluation mode: its dropout would be noise in what the student learns."""
        return self.teacher.to(device).eval().sampling_denoiser(Sampler(guidance=self.config.guidance))

    def reader(self, model: Diffusion, data: Dataset, split: Split, folder: Path | None) -> Reader:
        return reader_of(model, None, data, split.train, self.config.train, folder)

    def evaluate(self, model: Diffusion, data: Dataset, split: Split, final: bool, limit: TimeLimit) -> Evaluation:
        """The distance of one-call samples to the teacher's samples from the same noise, root mean square in x.

        The teacher takes `TEACHER_STEPS` steps of Heun's method on its flow; of fewer items where ``limit`` is short.
        """
        one_call = few_call_sampler(model.schedule, 1, model.config.few_call_solver)
        cond = self._condition(data, split)

        def squared_distances(here: slice) -> Tensor:
            n, first, part = here.stop - here.start, here.start, cond and cond.take(here)
            samples = model.sample(n, sampler=one_call, cond=part, first=first)
            goal = self.teacher.sample(n, sampler=self._teacher_sampler, cond=part, first=first)
            x, x_goal = (model.transform.to_model(values) for values in (samples, goal))
            return item_mean((x - x_goal) ** 2)

        parts = limit.in_parts(squared_distances, EVALUATED_ITEMS, 2 * TEACHER_STEPS + 1)
        if not parts:
            return Evaluation({}, "no time for a comparison with the teacher")
        squares = torch.cat(parts)
        numbers = {"distance": float(squares.mean().sqrt()), "items": len(squares)}
        summary = f"one call to the teacher's flow: rms {numbers['distance']:.4f}"
        return Evaluation(numbers, summary if len(squares) == EVALUATED_ITEMS else f"{summary} ({len(squares)} items)")

    def draw(
        self, model: Diffusion, data: Dataset, split: Split, folder: Path, step: int | None, limit: TimeLimit
    ) -> None:
        """A grid of samples, ``samples-STEP.png``, and ``samples.png`` at the end."""
        cond = self._condition(data, split)

        def sample(here: slice) -> Tensor:
            return model.sample(here.stop - here.start, cond=cond and cond.take(here), first=here.start)

        if samples := limit.in_parts(sample, EVALUATED_ITEMS, self.config.model.calls):
            picture = image_grid(torch.cat(samples).numpy(), data.num_values, names=data.columns)
            n, calls = counted(sum(map(len, samples)), "sample"), counted(self.config.model.calls, "network call")
            words = f"{n} by {calls} each, seed 0"
            save_described(picture, picture_path(folder, "samples", step), words)

    def save(self, model: Diffusion, path: Path) -> None:
        checkpoint.save(model, path)

    def load(self, path: Path) -> Diffusion:
        return checkpoint.load(path)

    @cached_property
    def _teacher_sampler(self) -> Sampler:
        start = float(noisiest_level(self.teacher.schedule).t)
        times = [start * (1 - i / TEACHER_STEPS) for i in range(TEACHER_STEPS + 1)]
        return Sampler("heun", TEACHER_STEPS, times=tuple(times), guidance=self.config.guidance)

    def _condition(self, data: Dataset, split: Split) -> Condition | None:
        """The `picture_condition` of the first training items, as far as the teacher accepts it."""
        cond = picture_condition(data, np.resize(split.train, EVALUATED_ITEMS), self.config.train.conditional)
        return None if cond is None else cond.accepted_by(self.teacher.condition_sizes)


def _extended(weights: Tensor, own: Tensor) -> Tensor:
    """``weights`` with as many rows as ``own``, of which the new ones are 0."""
    missing = len(own) - len(weights) if own.ndim else 0
    return torch.cat([weights, own.new_zeros(missing, *own.shape[1:])]) if missing else weights
