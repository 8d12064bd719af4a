"""A cascade: a base model of small images and super-resolution models, each given the images of the one before.

−log p(x) ≤ bound(D x) + E[bound(rest of x given z)], where z is D x with noise, for the maps of
`undiffuse.data.resolution`: docs/maths.md, (134) to (139).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse.data.resolution import ResolutionSplit, split_from_dict
from undiffuse.data.stage_data import add_image, stage_facts
from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.denoiser import NetworkDenoiser
from undiffuse.denoising.guidance import Guide
from undiffuse.errors import ConfigError
from undiffuse.likelihood.nll import NLL, make_nll
from undiffuse.model import arguments, checkpoint
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.text_conditions import encoder_identity
from undiffuse.networks.condition import Condition
from undiffuse.process.schedule import Schedule
from undiffuse.process.seeded_noise import ItemNoise, generator
from undiffuse.runtime.atomic_file import json_digest
from undiffuse.sampling.sampler import Sampler, guidance_changes
from undiffuse.sampling.solvers.solver import Solver

DEFAULT_IMAGE_NOISE = 0.2
"""Standard deviation, in units of x, of the noise on the images that a stage is given in sampling (docs/cascade.md)."""

Progress = Callable[[int, int], None]
"""Called after each step of a sampler with the stage, from 0, and the number of items."""


class Cascade:
    """The models ``[base, sr, ...]`` as one model of the images of the last one, with the methods of a `Diffusion`.

    ``names`` are those of the models in errors. Raises `ConfigError` where a model is not of its kind or does not fit
    to the one before it: in sizes, channels, values, conditions, or data.
    """

    def __init__(self, models: Sequence[Diffusion], names: Sequence[str] = ()) -> None:
        self.models, self.names = list(models), list(names) or [f"models[{i}]" for i in range(len(models))]
        if len(self.models) < 2:
            raise ConfigError("CASCADE", "models", "a cascade has a base and at least one more", "Give two or more")
        if "image" in self.models[0].condition_sizes:
            cause = "it is a super-resolution model, and the first model of a cascade is its base"
            raise ConfigError("CASCADE", self.names[0], cause, "Name the base first, and this model after --then")
        self.splits = [self._split(i) for i in range(1, len(self.models))]
        for below in range(len(self.splits)):
            self._check_pair(below)
        self.item_shape, self.num_values = self.splits[-1].item_shape, self.splits[-1].num_values
        self.transform = IntegerLevels(self.num_values)
        last, shares = self.models[-1].info, [m.info["held_out"] for m in self.models if "held_out" in m.info]
        self.info: dict[str, Any] = {"name": last["name"]} if "name" in last else {}
        if len(shares) == len(self.models):
            self.info["held_out"] = min(shares)  # the part of a smaller share is within that of a larger one
        self.info |= {"num_values": self.num_values, "fingerprint": self._facts(-1).get("fingerprint")}
        conditioned = next((model for model in self.models if model.trained_condition_sizes), self.models[0])
        self.info["classes"] = conditioned.info.get("classes", [])
        if "text_encoder" in conditioned.info:
            self.info["text_encoder"] = conditioned.info["text_encoder"]

    @classmethod
    def load(
        cls, paths: Sequence[str | Path], device: torch.device | str = "cpu", precision: str = "float32"
    ) -> Cascade:
        """The cascade of the runs or model files ``paths``, the base first. Raises `CheckpointError`, `ConfigError`."""
        return cls([checkpoint.load(path, device, precision=precision) for path in paths], list(map(str, paths)))

    def _facts(self, stage: int) -> dict[str, Any]:
        facts = self.models[stage].info.get("stage")
        return facts if isinstance(facts, dict) else {}

    def _split(self, stage: int) -> ResolutionSplit:
        """The split that the model of a stage after the first learned. Raises `ConfigError`."""
        model, name = self.models[stage], self.names[stage]
        if "image" not in model.condition_sizes or not self._facts(stage):
            cause = "it is not a super-resolution model"
            raise ConfigError("CASCADE", name, cause, "Name a model that was trained with --from")
        split = split_from_dict(self._facts(stage))
        if (model.item_shape, model.transform) != (split.rest_shape, IntegerLevels(split.rest_num_values)):
            raise ConfigError("CASCADE", name, "its facts about the data are not those of its images", "Train it again")
        return split

    def _check_pair(self, below: int) -> None:
        """Raises `ConfigError` unless the images of stage ``below`` are those that the next one enlarges."""
        model, other, split = self.models[below], self.models[below + 1], self.splits[below]
        shape = self.splits[below - 1].item_shape if below else model.item_shape
        transform = IntegerLevels(self.splits[below - 1].num_values) if below else model.transform
        num_values = transform.num_values if isinstance(transform, IntegerLevels) else "continuous"
        cause, above = "", self.names[below + 1]
        if (shape, num_values) != (split.low_shape, split.num_values):
            theirs = f"{_by(split.low_shape)} with {split.num_values} values"
            cause = f"its images are {_by(shape)} with {num_values} values, and {above} enlarges {theirs}"
        elif model.info.get("name") != other.info.get("name"):
            cause = f"it was trained on {model.info.get('name')!r}, and {above} on {other.info.get('name')!r}"
        elif all(one.trained_condition_sizes for one in (model, other)) and _conditions(model) != _conditions(other):
            cause = f"its labels, vectors, tokens or text encoder are not those of {above}"
        if cause:
            raise ConfigError("CASCADE", self.names[below], cause, "Name models that fit together")

    @property
    def notes(self) -> list[str]:
        """A sentence for each stage that was trained on other images than the reduced ones of the stage after it."""
        lines = []
        for below, split in enumerate(self.splits):
            expected = json_digest(stage_facts(split, self._facts(below + 1).get("fingerprint", ""), True))
            trained = self._facts(below).get("fingerprint") if below else self.models[0].info.get("fingerprint")
            of_same_images = self._facts(below).get("fingerprint") == self._facts(-1).get("fingerprint")
            if trained != expected and not of_same_images:
                lines.append(
                    f"{self.names[below]} was not trained on the images that {self.names[below + 1]} reduces (by "
                    f"--reduce {min(split.low_shape[1:])} --map {split.map}): items that are held out here may be "
                    "among those that it was trained on"
                )
        return lines

    @property
    def shapes(self) -> list[str]:
        """The shape of the images of each stage, such as 1×8×8."""
        return [_by(self.models[0].item_shape), *(_by(split.item_shape) for split in self.splits)]

    @property
    def x_shape(self) -> tuple[int, ...]:
        """That of an image: no stage is one of latents."""
        return self.item_shape

    @property
    def dims(self) -> int:
        """The number of dimensions of an image, the product of its shape."""
        return math.prod(self.item_shape)

    @property
    def device(self) -> torch.device:
        return self.models[-1].device

    @property
    def precision(self) -> str:
        """The precision of the networks' matrix products."""
        return self.models[0].precision

    @property
    def chain_length(self) -> int:
        """The longest chain of a stage."""
        return max(model.chain_length for model in self.models)

    @property
    def condition_sizes(self) -> dict[str, int]:
        """The sizes of the conditions that any stage accepts, without images, which come from the stage before."""
        return {name: size for model in self.models for name, size in model.trained_condition_sizes.items()}

    trained_condition_sizes = condition_sizes

    @property
    def fingerprints(self) -> list[str]:
        """sha256 of each model, as `undiffuse.model.checkpoint.fingerprint`."""
        return [checkpoint.fingerprint(model) for model in self.models]

    @property
    def schedule(self) -> Schedule:
        """That of the base, from which the steps for a number of network calls follow."""
        return self.models[0].schedule

    def denoiser(self) -> NetworkDenoiser:
        """That of the base, on which the settings of a sampler are checked."""
        return self.models[0].denoiser()

    def build_solver(self, sampler: Sampler) -> Solver:
        """The solver of the last stage, after those of the others. Raises `ConfigError`."""
        return [model.build_solver(sampler) for model in self.models][-1]

    def stage_sampler(self, stage: int, sampler: Sampler | str | None) -> Sampler:
        """``sampler`` for a stage: at most the steps of its chain, without guidance if it has no condition for it.

        A distilled model has a sampler of its own, which gets the guidance of ``sampler``.
        """
        model = self.models[stage]
        if sampler is None:
            return model.default_sampler
        sampler = arguments.check_sampler(sampler, model.chain_length)
        if model.config.calls:
            sampler = replace(model.default_sampler, **guidance_changes(sampler))
        elif sampler.times is None:
            num_steps = min(sampler.num_steps or model.chain_length, model.chain_length)
            sampler = replace(sampler, num_steps=num_steps)
        return sampler if model.trained_condition_sizes else replace(sampler, guidance=1.0, guidance_interval=None)

    def num_steps(self, stage: int, sampler: Sampler | str | None) -> int:
        """The steps of a stage in sampling."""
        return self.models[stage].num_steps(self.stage_sampler(stage, sampler))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int = 0,
        sampler: Sampler | str | None = None,
        cond: Condition | None = None,
        *,
        negative: Condition | None = None,
        image_noise: float = DEFAULT_IMAGE_NOISE,
        batch: int = 64,
        first: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """n samples as data values (n, *item_shape), the items from ``first`` on; ``batch`` changes rounding only.

        ``image_noise``: standard deviation in [0, 1] of the noise on the image that a stage is given. ``cond``: the
        condition of each item, and ``negative`` the condition of one item that guidance leads away from; each stage
        gets what it accepts of them. Item i depends on (seed, i) alone; the base draws what it draws without the
        cascade. The rest as in `Diffusion.sample`. Raises `ConfigError`.
        """
        arguments.check_counts(n=(n, 1), seed=(seed, 0), batch=(batch, 1), first=(first, 0))
        _check_image_noise(image_noise)
        self._check_condition(cond, n)
        self._check_condition(negative, 1)
        parts = []
        for start in range(0, n, batch):
            here = slice(start, min(start + batch, n))
            items = range(first, first + n)[here]
            values: Tensor | None = None
            for stage, model in enumerate(self.models):
                given, avoided = self._accepted(stage, cond and cond.take(here)), self._accepted(stage, negative)
                if values is not None:
                    given = self._with_image(stage, given, values, items, seed, image_noise)
                options = {
                    "guide": None if avoided is None else Guide(negative=avoided),
                    "batch": len(items),
                    "first": items.start,
                    "progress": progress and partial(progress, stage),
                }
                own_sampler = self.stage_sampler(stage, sampler)
                drawn = model.sample(len(items), stage_seed(seed, stage), own_sampler, given, **options)
                if values is not None:
                    drawn = torch.from_numpy(self.splits[stage - 1].join(values.numpy(), drawn.numpy()))
                values = drawn
            assert values is not None
            parts.append(values)
        return torch.cat(parts)

    def nll(
        self,
        values: Tensor,
        seed: int = 0,
        mc_samples: int | None = None,
        batch: int = 256,
        progress: Callable[[int], None] | None = None,
        first: int = 0,
        estimate: str = "discrete",
        cond: Condition | None = None,
        image_noise: float = 0.0,
    ) -> NLL:
        """bound(D x) + bound(rest of x given D x) ≥ −log p(x) of each item in nats, over all stages, (134) to (139).

        ``values`` (n, *item_shape) are integers. Each part of the result is the sum over the stages, and ``per_step``
        (n, stages) the total of each. With ``image_noise`` > 0 stages are given an image with noise of this standard
        deviation, one draw for each item, and the bound holds in expectation. The rest as in `Diffusion.nll`. Raises
        `ConfigError` and `DataError`.
        """
        arguments.check_counts(seed=(seed, 0), mc_samples=(mc_samples, 1), batch=(batch, 1), first=(first, 0))
        _check_image_noise(image_noise)
        arguments.check_values(values, self.item_shape, self.transform)
        self._check_condition(cond, len(values))
        items, x, parts = range(first, first + len(values)), values.cpu().numpy(), []
        for stage in range(len(self.models) - 1, -1, -1):
            given, rest = self._accepted(stage, cond), x
            if stage:
                split = self.splits[stage - 1]
                low, rest = split.low(x), split.rest(x)
                given = self._with_image(stage, given, torch.from_numpy(low), items, seed, image_noise)
                x = low
            options = {"batch": batch, "first": first, "estimate": estimate, "cond": given}
            parts.append(self.models[stage].nll(torch.from_numpy(rest), stage_seed(seed, stage), mc_samples, **options))
        if progress:
            progress(len(values))
        parts.reverse()
        prior, diffusion, decoder = (torch.stack(terms).sum(0) for terms in zip(*(p[:3] for p in parts), strict=True))
        totals = torch.stack([part.total for part in parts], 1)
        return make_nll(prior, diffusion, decoder, sum(part.calls for part in parts), totals)

    def _accepted(self, stage: int, cond: Condition | None) -> Condition | None:
        """The fields of ``cond`` that a stage accepts, None if there are none."""
        return None if cond is None else cond.accepted_by(self.models[stage].trained_condition_sizes)

    def _with_image(
        self, stage: int, cond: Condition | None, low: Tensor, items: range, seed: int, image_noise: float
    ) -> Condition:
        """``cond`` with the image ``low`` for a stage, with noise that depends on (seed, item) alone."""
        cond = add_image(cond or Condition(), self.splits[stage - 1], low.cpu().numpy())
        if image_noise == 0:
            return cond
        noise = ItemNoise(stage_seed(seed, stage), items, self.splits[stage - 1].low_shape, "image noise")
        return cond.with_image_noise(torch.full((len(items),), image_noise), noise(1)[0])

    def _check_condition(self, cond: Condition | None, items: int) -> None:
        if cond is not None:
            arguments.check_condition(cond).validate_for(self.condition_sizes, items)


AnyModel = Diffusion | Cascade
"""What commands sample and measure."""


def weights_of(model: AnyModel) -> str | list[str]:
    """sha256 of a model, or of each model of a cascade."""
    return model.fingerprints if isinstance(model, Cascade) else checkpoint.fingerprint(model)


def stage_seed(seed: int, stage: int) -> int:
    """The seed of a stage: ``seed`` itself for the base, so that the base draws what it draws alone."""
    return seed if stage == 0 else generator(seed, "cascade", stage).initial_seed()


def _conditions(model: Diffusion) -> tuple[Any, ...]:
    return model.trained_condition_sizes, model.info.get("classes"), encoder_identity(model.info.get("text_encoder"))


def _by(shape: Sequence[int]) -> str:
    return "×".join(str(n) for n in shape)


def _check_image_noise(image_noise: float) -> None:
    if not 0 <= image_noise <= 1:
        cause, fix = "it is not a standard deviation in [0, 1]", "Give 0 for none, 1 for noise alone"
        raise ConfigError("ARGUMENT", f"image_noise = {image_noise:g}", cause, fix)
