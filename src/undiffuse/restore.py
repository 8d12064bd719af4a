"""Restoring: items of a model's own kind, from what blur, shrinking, a mask and noise have left of one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from undiffuse.codec import Pixels
from undiffuse.conditioning import Condition
from undiffuse.denoiser import Denoiser, Told
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.inverse import DPS, MMPS, Linear, Observation, PiGDM, Repaint, blur, identity, jumps, mask, mean_pool
from undiffuse.randomness import ItemNoise
from undiffuse.sample import Step, numbers, prior_sample, to_data, trajectory

ITERATIONS, DATA_STD, STEP, LENGTH, REPEATS = 1, 0.5, 1.0, 10, 4
"""Settings of MMPS, PiGDM, DPS and RePaint's walk (`jumps`), as measured in docs/inverse.md."""
METHODS: dict[str, Callable[[Observation, Denoiser], Denoiser]] = {
    "mmps": lambda observed, denoise: MMPS(denoise, observed, ITERATIONS),
    "pigdm": lambda observed, denoise: PiGDM(denoise, observed, DATA_STD),
    "dps": lambda observed, denoise: DPS(denoise, observed, STEP),
}
"""By their names, around a model's own; ``repaint`` is a solver and not among them."""
NAMES = (*METHODS, "repaint")


@dataclass(frozen=True)
class Damage:
    """y = M S B x + noise_std n of items of ``shape``, (C, ...): B blurs, S takes means of blocks, M what is ``known``.

    ``blur`` is the Gaussian's standard deviation in pixels (0: none), ``shrink`` the side of a block, ``noise_std`` in
    the units of x (2 from black to white), ``known`` a mask that broadcasts to the shrunken item, True where it is
    seen. Raises `ConfigError` where they do not fit together.
    """

    shape: tuple[int, ...]
    blur: float = 0.0
    shrink: int = 1
    noise_std: float = 0.0
    known: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.noise_std < math.inf:
            raise ConfigError("NOISE", f"noise_std = {self.noise_std:g}", "it must not be below 0", "Give 0 or more")
        if self.known is not None and not bool(self.known.any()):
            raise ConfigError("MASK", "mask", "it hides everything, so there is nothing to go by", "Use 'sample'")
        _ = self.whole  # whose checks are its operators'

    @property
    def whole(self) -> Linear:
        """S B, from x to the image before anything of it is hidden."""
        operator = blur(self.blur, self.shape) if self.blur else identity(self.shape)
        return mean_pool(self.shrink, self.shape) @ operator if self.shrink != 1 else operator

    def seen(self, image: Tensor) -> Tensor:
        """y of an ``image`` (B, *S B shape) of which nothing is hidden yet."""
        return image if self.known is None else mask(self.known, tuple(image.shape[1:]))(image)

    @property
    def operator(self) -> Linear:
        """M S B."""
        whole = self.whole
        return whole if self.known is None else mask(self.known, whole.seen) @ whole

    @property
    def only_mask(self) -> bool:
        """Whether what is known of x is known as it is."""
        return self.known is not None and not self.blur and self.shrink == 1 and not self.noise_std


def rounding(levels: int) -> float:
    """2/((levels − 1)√12): the standard deviation in x of rounding to one of ``levels``, uniform over a bin."""
    return 2 / (levels - 1) / math.sqrt(12)


def degraded(damage: Damage, x: Tensor, seed: int, levels: int) -> Tensor:
    """S B x + noise_std n of one item, rounded to ``levels`` as a file would be; nothing is hidden of it."""
    image = damage.whole(x[None])
    noise = ItemNoise(seed, [0], image.shape[1:], "degraded")(1)[0]
    file = Pixels(levels)
    return file.encode(file.decode(image + damage.noise_std * noise))[0]


@torch.no_grad()
def restored(
    model: Diffusion,
    damage: Damage,
    image: Tensor,
    n: int,
    method: str = "mmps",
    seed: int = 0,
    steps: int = 100,
    batch: int = 16,
    floor: float = 0.0,
    progress: Callable[[int], None] | None = None,
    cond: Condition | None = None,
) -> Tensor:
    """n draws of x given y, as data values (n, *item_shape); item i's noise is a function of (seed, i) alone.

    ``image`` (*S B shape) in the units of x; what the mask hides of it is not read. ``method`` is one of `NAMES`;
    ``floor`` is added to the noise (squared), as rounding to levels is. Where nothing but a mask and rounding is
    between, known values are the image's own. ``progress`` is called with the number of finished item-steps.
    ``cond`` tells the model of each of the n items. Raises `ConfigError` and `NonFiniteError`.
    """
    if method not in NAMES:
        raise ConfigError("METHOD", repr(method), "no such method", f"Use one of {', '.join(NAMES)}")
    if method == "repaint" and not damage.only_mask:
        cause = "it fills in what a mask hides, and knows of no blur, shrinking or noise"
        raise ConfigError("METHOD", "'repaint'", cause, "Use 'mmps'")
    model.eval()
    image, parts, told = image[None].to(model.device), [], cond and model.heard(cond, n)
    for start in range(0, n, batch):
        items = range(start, min(start + batch, n))
        x = image
        for state in _walk(model, damage, image, items, method, seed, steps, floor, told):
            x = to_data(state.x, state.level)
            if progress:
                progress(len(items))
        parts.append(x)
    x = torch.cat(parts)
    if damage.only_mask and damage.known is not None:
        x = torch.where(damage.known.to(x.device), image, x)
    return model.codec.decode(numbers(x)).cpu()


def misfit(model: Diffusion, damage: Damage, image: Tensor, values: Tensor) -> Tensor:
    """√mean (y − M S B x)² of each of ``values`` (n, *item_shape), (n,): noise and rounding alone, if they fit."""
    x = model.codec.encode(values)
    return (damage.operator(x) - damage.seen(image[None])).flatten(1).square().mean(1).sqrt()


def best(damage: Damage) -> str:
    """The method that came nearest where it was measured: docs/inverse.md."""
    return "pigdm" if damage.blur else "mmps"


def walked(model: Diffusion, method: str, steps: int) -> int:
    """Steps that `restored` takes for an item."""
    levels = model.walk(steps)
    return len(jumps(levels, LENGTH, REPEATS) if method == "repaint" else levels) - 1


def _walk(
    model: Diffusion,
    damage: Damage,
    image: Tensor,
    items: range,
    method: str,
    seed: int,
    steps: int,
    floor: float,
    cond: Condition | None,
) -> Iterator[Step]:
    """The states of ``items`` after each step."""
    solver, levels, given_y = model.solver("ancestral"), model.walk(steps), None
    if method == "repaint":
        assert damage.known is not None
        solver = Repaint(image, damage.known.to(image.device), solver)
        levels = jumps(levels, LENGTH, REPEATS)
    else:
        observed = Observation(damage.operator, damage.seen(image), math.hypot(damage.noise_std, floor))
        given_y = partial(METHODS[method], observed)
    noise = ItemNoise(seed, items, model.item_shape, device=model.device)
    start = prior_sample(levels[0], noise(1)[0])

    def guide(denoise: Denoiser) -> Denoiser:
        denoise = denoise if cond is None else Told(denoise, cond.take(slice(items.start, items.stop)))
        return denoise if given_y is None else given_y(denoise)

    states = trajectory(model.sampler(guide=guide), solver, levels, start, noise)
    next(states)
    return states
