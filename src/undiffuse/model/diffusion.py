"""A model: network, schedule, target and data transform together. It is what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.data.transform import BOUNDED, DataTransform, IntegerLevels, x_shape
from undiffuse.denoising.categorical_head import LOGIT_FEATURES, CategoricalHead
from undiffuse.denoising.denoiser import (
    Clipped,
    ConditionedDenoiser,
    Denoiser,
    NetworkDenoiser,
    Preconditioning,
    in_float32,
)
from undiffuse.denoising.guidance import Guide
from undiffuse.errors import ConfigError
from undiffuse.likelihood.reverse_chain import ReverseChain
from undiffuse.model import arguments, inversion
from undiffuse.model.build import build_network, build_part, check_chain_length, check_choices, check_process
from undiffuse.model.config import ModelConfig
from undiffuse.model.consistency import few_call_sampler
from undiffuse.model.measurement import measure
from undiffuse.model.pretrained import Pretrained
from undiffuse.model.text_conditions import text_condition
from undiffuse.model.training_loss import training_loss
from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import condition_sizes, in_evaluation_mode, weight_dtype
from undiffuse.networks.registry import network_settings
from undiffuse.process import schedule as schedules
from undiffuse.process import target as targets
from undiffuse.process import time_sampling as times
from undiffuse.process import weighting
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.process.prior import prior_sample
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.runtime.device import to_device
from undiffuse.sampling.sampler import DEFAULT_SAMPLER, Sampler
from undiffuse.sampling.solvers.solver import Solver
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import Step, check_finite, last_step, rescale
from undiffuse.sampling.trajectory import trajectory as solver_trajectory


class Diffusion(Pretrained, nn.Module):
    """A diffusion model over items of ``item_shape``, (C, ...) or (D,), in the units of ``transform``.

    ``x_shape`` is the shape of x and of noise: that of an item, or of the latents of an autoencoder.

    Built from a `ModelConfig`; raises `ConfigError` where its parts do not fit together. ``info`` is what else a
    checkpoint records: the name and fingerprint of the data, the steps trained. ``network`` is a network, or a class,
    of your own in place of that of ``config``: see `undiffuse.networks.protocol`.

    A model can be cast (``double()``, ``bfloat16()``), copied and pickled. The network computes in the type of its
    weights, all else in that type or float32; noise is drawn in float32, so a cast changes no random number.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        config: ModelConfig,
        item_shape: tuple[int, ...],
        transform: DataTransform,
        info: dict[str, Any] | None = None,
        network: nn.Module | type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if network is not None:
            config = replace(config, network=network_settings(network, config.network))
        self.config, self.transform, self.info = config, transform, dict(info or {})
        self.item_shape: tuple[int, ...] = tuple(item_shape)
        self.x_shape = x_shape(transform, self.item_shape)
        self.chain_length = config.chain_length
        self.schedule = build_part("schedule", schedules.build, config.schedule)
        self.target = build_part("target", targets.build, config.target)
        self.weight = build_part("weight", weighting.build, config.weight)
        check_chain_length(self.chain_length, self.schedule)
        self.times = build_part("times", times.build, config.times, schedule=self.schedule, T=self.chain_length)
        is_learned = isinstance(self.schedule, nn.Module)
        self._chain = None if is_learned else time_grid(self.schedule, self.chain_length)
        self.learned_variance = config.variance == "learned"
        self.autocast: torch.dtype | None = None
        check_choices(config, transform, self.schedule, self.times)
        check_process(config, self.schedule, self.times, self.weight, self.target, self.chain, self.next_level)
        channels, categorical = self.x_shape[0], config.output == "categorical"
        further = self.learned_variance + config.divergence
        out_channels = channels * ((LOGIT_FEATURES if categorical else 1) + further)
        self.network = build_network(config.network, self.x_shape, out_channels, network)
        if isinstance(transform, IntegerLevels) and categorical:
            self.network = CategoricalHead(self.network, channels, transform.num_values)
        self.denoiser()
        self.initial_tensors = {name: tensor.to("meta") for name, tensor in self.state_dict().items()}

    @property
    def chain(self) -> list[NoiseLevel]:
        """The levels of the chain, from noise to data; of a learned schedule as it is now."""
        with torch.no_grad():
            return self._chain or time_grid(self.schedule, self.chain_length)

    @property
    def default_sampler(self) -> Sampler:
        """`DEFAULT_SAMPLER`, as of the command; for a distilled model its own solver with its network calls."""
        if solver := self.config.few_call_solver:
            return few_call_sampler(self.schedule, self.config.calls, solver)
        steps = DEFAULT_SAMPLER.given_steps or self.chain_length
        return replace(DEFAULT_SAMPLER, num_steps=min(steps, self.chain_length))

    @property
    def dims(self) -> int:
        """The number of dimensions of an item, the product of its shape."""
        return math.prod(self.item_shape)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of x in samples and measurements: that of the weights, at least float32."""
        return torch.promote_types(weight_dtype(self.network, torch.float32), torch.float32)

    @property
    def precision(self) -> str:
        """The precision of the network's matrix products."""
        return str(self.autocast or self.dtype).removeprefix("torch.")

    @property
    def condition_sizes(self) -> dict[str, int]:
        """The sizes of the conditions that the network accepts: classes, vector, tokens, image, text; empty if none."""
        return condition_sizes(self.config.network)

    @property
    def trained_condition_sizes(self) -> dict[str, int]:
        """`condition_sizes` without the image; empty for a model that was trained without what its network accepts."""
        sizes = self.condition_sizes if self.info.get("conditional", True) else {}
        return {name: size for name, size in sizes.items() if name != "image"}

    text_condition = text_condition

    def prepare_condition(self, cond: Condition, items: int, guide: Guide | None = None) -> Condition:
        """Validates ``cond`` for a batch of ``items`` and moves it to the model's device. Raises `ConfigError`.

        With a classifier in ``guide`` it may hold a field that only the classifier uses, such as a label.
        """
        by_classifier = guide is not None and guide.log_prob is not None
        cond = arguments.check_condition(cond).validate_for(self.condition_sizes, items, by_classifier)
        arguments.check_classifier_labels(guide, cond)
        return cond.to(self.device).map(arguments.outside_inference_mode)

    def denoiser(self, network: nn.Module | None = None) -> NetworkDenoiser:
        """The network, or ``network`` in its place, as a denoiser."""
        settings = {"chain_length": self.chain_length, **self.config.preconditioning}
        return NetworkDenoiser(
            self.network if network is None else network,
            self.schedule,
            self.target,
            build_part("preconditioning", Preconditioning, settings),
            self.learned_variance,
            self.autocast,
            self.config.output == "categorical",
            self.config.divergence,
        )

    def reverse_chain(self, denoise: Denoiser, cond: Condition | None = None) -> ReverseChain:
        """The reverse process of ``denoise`` over the model's chain, with the model's variance."""
        return ReverseChain(denoise, self.chain, self.config.variance, cond)

    def loss(
        self,
        values: Tensor,
        u: Tensor,
        eps: Tensor,
        z: Tensor | None = None,
        cond: Condition | None = None,
        network: nn.Module | None = None,
    ) -> Tensor:
        """The training loss of each item, (B,), per dimension.

        ``values`` (B, *item_shape) are in the units of the data; ``u`` (B,) are uniform numbers for the times, ``eps``
        noise of the values' shape, and ``z`` more noise for the target ``previous``. With loss-aware times each loss
        is weighted by 1/(T p(t)), so that the mean is that of uniform steps. The full bound ignores ``u``. The mean of
        the continuous loss is the bound's integral, with the bound's terms at the ends if the schedule learns them.
        Raises `ConfigError` for shapes that do not fit; whether values are among those of the data is not checked in
        each step. Of a latent model the values are encoded as the means of q; `loss_of_x` takes draws of z.
        """
        arguments.check_items("values", values, self.item_shape)
        return self.loss_of_x(self.transform.to_model(values, self.dtype), u, eps, z, cond, network)

    def loss_of_x(
        self,
        x: Tensor,
        u: Tensor,
        eps: Tensor,
        z: Tensor | None = None,
        cond: Condition | None = None,
        network: nn.Module | None = None,
    ) -> Tensor:
        """`loss` of ``x`` (B, *x_shape) in the units of the model."""
        arguments.check_batch(x, u, eps, z, self.x_shape)
        return training_loss(self, to_device(x, self.device, self.dtype), u, eps, z, cond, network)

    def update_time_sampler(self, u: Tensor, loss: Tensor) -> None:
        """Updates loss-aware times with the ``loss`` at ``u``, (n,) both, in the order of the global batch."""
        if isinstance(self.times, times.LossAwareSteps):
            at = self.times.sample(u)
            self.times = self.times.update(at, loss.detach().cpu() / self.times.importance_weight(at))

    @property
    def time_sampler_state(self) -> dict[str, Tensor]:
        """The loss history of loss-aware times, which training saves beside the weights; else empty."""
        return {"times": self.times.history} if isinstance(self.times, times.LossAwareSteps) else {}

    def next_level(self, t: NoiseLevel) -> NoiseLevel:
        """The level at t − 1/T, one step of the chain cleaner than ``t``: on a table its next level."""
        level = self.schedule((t.t - 1 / self.chain_length).clamp(min=0))
        final = level.final_log_var if self._chain is None else self._chain[-1].final_log_var
        return level._replace(final_log_var=None if final is None else final.expand(t.t.shape))

    @torch.inference_mode(False)
    @torch.no_grad()
    def trajectory(
        self,
        items: range,
        seed: int = 0,
        sampler: Sampler | str | None = None,
        cond: Condition | None = None,
        guide: Guide | None = None,
    ) -> Iterator[Step]:
        """The states of the samples numbered ``items``, from noise to data, x in the units of the transform.

        `rescale` and ``transform.to_data`` turn the last one into data. The noise of item i depends on (seed, i) alone.
        The ``sampler`` is `default_sampler` if not given; one given by name has default settings and 50 steps, or those
        of a shorter chain. ``cond`` holds the condition of each item. Each step is computed in evaluation mode, and the
        modes of the networks are the same afterwards. Raises `ConfigError`.
        """
        sampler = arguments.check_sampler(sampler or self.default_sampler, self.chain_length)
        solver, levels = self.build_solver(sampler), self.noise_levels(sampler)
        noise = ItemNoise(seed, items, self.x_shape, device=self.device)
        arguments.check_small_image(cond, self.condition_sizes)
        arguments.check_guide(guide, self.condition_sizes)
        denoise = self.sampling_denoiser(sampler, guide)
        if guide is not None and guide.log_prob is not None:
            arguments.check_trainable(self, "a classifier's guidance")
        if cond is not None:
            cond = self.prepare_condition(cond, len(items), guide)
            denoise, solver = ConditionedDenoiser(denoise, cond), sampler.guide_solver(solver, guide, cond)
        start = prior_sample(levels[0], noise(1)[0].to(self.dtype))
        steps = solver_trajectory(denoise, solver, levels, start, noise)
        return in_evaluation_mode(steps, self, *(guide.networks if guide else ()))

    def build_solver(self, sampler: Sampler) -> Solver:
        """The solver of ``sampler``; ancestral sampling has the model's variance by default. Raises `ConfigError`."""
        if sampler.solver == "ancestral":
            sampler = replace(sampler, settings={"variance": self.config.variance, **sampler.settings})
        return sampler.build_solver()

    def noise_levels(self, sampler: Sampler) -> list[NoiseLevel]:
        """The noise levels of ``sampler``. Raises `ConfigError`, also for more steps than the chain has."""
        num_steps = self.chain_length if sampler.num_steps is None else sampler.num_steps
        arguments.check_counts(num_steps=(num_steps, 1))
        if sampler.times is None and num_steps > self.chain_length:
            cause = f"the model's chain has {self.chain_length:,} steps"
            raise ConfigError("GRID", f"num_steps = {num_steps}", cause, "Give at most as many, or None for all")
        return replace(sampler, num_steps=num_steps).noise_levels(self.schedule)

    def num_steps(self, sampler: Sampler) -> int:
        """The steps of ``sampler`` from noise to data. Raises `ConfigError` as `noise_levels`."""
        return len(self.noise_levels(sampler)) - 1

    def sampling_denoiser(self, sampler: Sampler = DEFAULT_SAMPLER, guide: Guide | None = None) -> Denoiser:
        """The denoiser that samples are drawn with: the network with the guidance of ``sampler``, clipped.

        The networks compute in float32 for a solver that needs it.
        """
        denoise = self.denoiser()
        if sampler.build_solver().needs_float32:
            denoise = in_float32(denoise)
            if guide is not None and guide.weak is not None:
                guide = guide._replace(weak=in_float32(guide.weak))
        return self.clip(sampler.guide(denoise, guide), sampler.clip)

    def clip(self, denoise: Denoiser, clip: bool | None = None) -> Denoiser:
        """``denoise`` with x̂ clamped to [−1, 1]; by default (None) only if the data are bounded."""
        return Clipped(denoise) if (isinstance(self.transform, BOUNDED) if clip is None else clip) else denoise

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int = 0,
        sampler: Sampler | str | None = None,
        cond: Condition | None = None,
        *,
        guide: Guide | None = None,
        batch: int = 64,
        first: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """n samples as data values (n, *item_shape), the items from ``first`` on; ``batch`` changes rounding only.

        ``cond`` holds the condition of each of the n items; ``sampler`` and ``guide`` as in `trajectory`. ``progress``
        is called after each step with the number of items in its batch. Raises `ConfigError`, or `NonFiniteError` for
        a NaN or infinity.
        """
        arguments.check_counts(n=(n, 1), seed=(seed, 0), batch=(batch, 1), first=(first, 0))
        arguments.check_guide(guide, self.condition_sizes)
        if cond is not None:  # all n, before it is sliced
            cond = self.prepare_condition(cond, n, guide)
        values = []
        for start in range(0, n, batch):
            stop = min(start + batch, n)
            items = range(first + start, first + stop)
            steps = self.trajectory(items, seed, sampler, cond and cond.take(slice(start, stop)), guide)
            last = last_step(steps, partial(progress, len(items)) if progress else None)
            x = check_finite(rescale(last.x, last.level), items.start)
            values.append(self.transform.to_data(x).cpu())
        return torch.cat(values)

    def to_noise(self, values: Tensor, num_steps: int | None = None, cond: Condition | None = None) -> Tensor:
        """The noise (n, *x_shape) to which the flow maps ``values`` (n, *item_shape); N(0, I) for a perfect model.

        On the CPU, in ``num_steps`` steps, by default 50, or those of a shorter chain. Raises `ConfigError` and
        `DataError`.
        """
        return inversion.to_noise(self, values, num_steps, cond)

    def from_noise(self, noise: Tensor, num_steps: int | None = None, cond: Condition | None = None) -> Tensor:
        """The values of ``noise``: the inverse of `to_noise`, to the solver's error and the values' rounding."""
        return inversion.from_noise(self, noise, num_steps, cond)

    nll = measure
