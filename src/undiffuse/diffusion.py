"""A model: network, schedule, target and codec together. It is what a checkpoint holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse import codec as codecs
from undiffuse import estimate as estimates
from undiffuse import loss as losses
from undiffuse import networks, solvers
from undiffuse.codec import Codec
from undiffuse.conditioning import Condition
from undiffuse.config import ModelConfig, build_part
from undiffuse.denoiser import Clipped, Denoiser, NetworkDenoiser, Preconditioning, Told
from undiffuse.errors import ConfigError
from undiffuse.grids import grid
from undiffuse.inverse import codes
from undiffuse.lattice import FEATURES, MANY, Lattice
from undiffuse.likelihood import NLL, concatenate
from undiffuse.process import schedule as schedules
from undiffuse.process import target as targets
from undiffuse.process import times, weighting
from undiffuse.process.gaussian import diffuse
from undiffuse.process.learned import Learned
from undiffuse.process.level import NoiseLevel
from undiffuse.randomness import ItemNoise
from undiffuse.sample import Step, numbers, prior_sample, to_data, trajectory

LONGEST = 10_000
"""Steps that a chain may have."""


class Diffusion(nn.Module):
    """A diffusion model over items of ``item_shape``, (C, ...) or (D,), in the units of ``codec``.

    Built from a `ModelConfig`; raises `ConfigError` where its parts do not fit together. ``info`` is what
    else the checkpoint says: the data's name and fingerprint, the steps trained.
    """

    def __init__(
        self, config: ModelConfig, item_shape: tuple[int, ...], codec: Codec, info: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.config, self.codec, self.info = config, codec, dict(info or {})
        self.item_shape: tuple[int, ...] = tuple(item_shape)
        self.schedule = build_part("schedule", schedules.build, config.schedule)
        self.target = build_part("target", targets.build, config.target)
        self.weight = build_part("weight", weighting.build, config.weight)
        self.steps = config.steps
        if self.schedule.steps not in (None, self.steps):
            fix = "Give the same number to both"
            raise ConfigError("CONFIG", "model.steps", f"{self.steps}, but the schedule has {self.schedule.steps}", fix)
        if not 1 <= self.steps <= LONGEST:
            raise ConfigError("CONFIG", "model.steps", f"{self.steps} steps", f"Give a number from 1 to {LONGEST:,}")
        self.times = build_part("times", times.build, config.times, schedule=self.schedule, T=self.steps)
        self._levels = None if isinstance(self.schedule, Learned) else grid(self.schedule, self.steps)
        self.learned_variance = config.variance == "learned"
        self.autocast: torch.dtype | None = None
        self._check()
        channels, dims = self.item_shape[0], len(self.item_shape) - 1
        kind = config.network.get("kind")
        if (kind, dims > 0) in (("mlp", True), ("unet", False)):
            cause = f"a network of kind {kind!r} does not take items of shape {self.item_shape}"
            fix = "Use 'mlp' for vectors and 'unet' for sequences, images and volumes"
            raise ConfigError("CONFIG", "model.network", cause, fix)
        each = (FEATURES if config.output == "levels" else 1) + self.learned_variance
        given = {"channels": channels, "out_channels": channels * each}
        self.network = build_part(
            "network", networks.build, config.network, **given, **({"dims": dims} if dims else {})
        )
        if isinstance(codec, codecs.Pixels) and config.output == "levels":
            self.network = Lattice(self.network, channels, codec.levels)
        self.denoiser()

    def _check(self) -> None:
        config = self.config
        if config.loss not in ("matching", "hybrid", "bound", "full_bound", "continuous"):
            fix = "Use 'matching', 'hybrid', 'bound', 'full_bound' or 'continuous'"
            raise ConfigError("CONFIG", f"model.loss = {config.loss!r}", "unknown", fix)
        if config.variance not in ("small", "large", "learned"):
            fix = "Use 'small', 'large' or 'learned'"
            raise ConfigError("CONFIG", f"model.variance = {config.variance!r}", "unknown", fix)
        if config.output not in ("values", "levels"):
            raise ConfigError("CONFIG", f"model.output = {config.output!r}", "unknown", "Use 'values' or 'levels'")
        if config.output == "levels" and not (isinstance(self.codec, codecs.Pixels) and self.codec.levels <= MANY):
            cause = f"the data are not whole numbers of at most {MANY} levels"
            raise ConfigError("CONFIG", "model.output = 'levels'", cause, "Use 'values'")
        if (config.loss == "hybrid") != (config.variance == "learned") and "bound" not in config.loss:
            cause = f"loss {config.loss!r} does not train variance {config.variance!r}"
            raise ConfigError("CONFIG", "model.loss", cause, "Use 'hybrid' or 'bound' with 'learned', else 'matching'")
        if config.loss == "continuous" and isinstance(self.times, times.Steps | times.LossAware):
            cause = f"the times {config.times['name']!r} are steps of a chain, and this loss is of continuous time"
            raise ConfigError("CONFIG", "model.times", cause, "Use the times 'uniform'")
        if isinstance(self.schedule, Learned) and (config.loss, self.times) != ("continuous", times.Uniform()):
            cause = "nothing else than the continuous loss at uniform times, {'name': 'uniform', 'low': 0.0}, trains it"
            raise ConfigError("CONFIG", "model.schedule 'learned'", cause, "Use them, or 'linear_log_snr'")
        try:
            t = self.schedule(self.times.sample(torch.tensor([0.0, 0.5, 1 - 1e-7], dtype=torch.float64)))
            s = self._cleaner(t)
            continuous = config.loss == "continuous"
            w = -self.schedule.log_snr_rate(t.t) if continuous else self.weight(t, s)
            if not torch.isfinite(self.target.weight(w, t, s)).all():
                weight = "the weight of the continuous loss" if continuous else f"weight {self.weight.name!r}"
                cause = f"{weight} is not finite at every time of {config.times['name']!r}"
                raise ConfigError("CONFIG", "model.weight", cause, "Use the times 'uniform', or the weight 'simple'")
            for t, s in itertools.pairwise(self.levels):
                self.target.check(t, s if self.target.pair else None)
        except (TypeError, ValueError) as error:
            fix = "Check the settings of times, weight and target"
            raise ConfigError("CONFIG", "model", f"its parts do not work together ({error})", fix) from None

    @property
    def levels(self) -> list[NoiseLevel]:
        """The chain's, from noise to data; of a learned schedule as it is now."""
        if self._levels is not None:
            return self._levels
        with torch.no_grad():
            return grid(self.schedule, self.steps)

    @property
    def dims(self) -> int:
        """Numbers an item has."""
        return math.prod(self.item_shape)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def heard(self, cond: Condition, items: int) -> Condition:
        """``cond`` on the model's device, if it tells so many ``items`` what the network hears; else `ConfigError`."""
        return cond.heard_by(self.config.network, items).to(self.device)

    def preconditioning(self) -> Preconditioning:
        return build_part("preconditioning", Preconditioning, {"steps": self.steps, **self.config.preconditioning})

    def denoiser(self, network: nn.Module | None = None) -> NetworkDenoiser:
        """The network (or another in its place) as a denoiser."""
        return NetworkDenoiser(
            self.network if network is None else network,
            self.schedule,
            self.target,
            self.preconditioning(),
            self.learned_variance,
            self.autocast,
            self.config.output == "levels",
        )

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

        ``values`` (B, *item_shape) as the data hold them; ``u`` (B,) uniform numbers for the times, ``eps``
        noise of their shape, ``z`` more of it for the target ``previous``. Times that follow the loss are weighed
        by 1/(T p(t)), which leaves the mean what it is for uniform steps. The full bound reads no ``u``. The
        continuous loss has the mean of the bound's integral; where a schedule learns its ends, what they pay is added.
        """
        x, denoise = self.codec.encode(values).to(self.device), self.denoiser(network)
        if self.config.loss == "full_bound":  # one eps for all steps: each term's mean asks for no more
            edges = self.codec.edges(x)
            return losses.full_bound(denoise, x, self.levels, lambda _: eps[None], self.config.variance, edges, cond)
        at = self.times.sample(u)
        if self.config.loss == "continuous":
            return losses.continuous_bound(denoise, x, at, self.times.log_prob(at), eps, self.codec.edges(x), cond)
        each = self._loss_at(denoise, x, self.schedule(at), eps, z, cond)
        return each * self.times.importance(at).to(each) if isinstance(self.times, times.LossAware) else each

    def _loss_at(
        self, denoise: NetworkDenoiser, x: Tensor, t: NoiseLevel, eps: Tensor, z: Tensor | None, cond: Condition | None
    ) -> Tensor:
        s = self._cleaner(t)
        x_t = diffuse(x, t, eps)
        if self.config.loss == "matching":
            y, _ = denoise.outputs(x_t, t, cond)
            w = self.weight(t, s) if not self.weight.pair else self.weight(t, s) * self.steps
            return losses.matching(y, self.target, x, eps, w, t, s, z)
        prediction, edges = denoise(x_t, t, cond, s), self.codec.edges(x)
        if self.config.loss == "hybrid":
            return losses.hybrid(prediction, eps, x, x_t, t, s, self.steps, edges=edges)
        return self.steps * losses.bound_term(prediction, x, x_t, t, s, self.config.variance, edges)

    def observe(self, u: Tensor, loss: Tensor) -> None:
        """Tells times that follow the loss what `loss` was for ``u``, (n,) each, in the order of the global batch."""
        if isinstance(self.times, times.LossAware):
            at = self.times.sample(u)
            self.times = self.times.observe(at, loss.detach().cpu() / self.times.importance(at))

    @property
    def memory(self) -> dict[str, Tensor]:
        """What training remembers apart from the weights: the losses that times follow."""
        return {"times": self.times.history} if isinstance(self.times, times.LossAware) else {}

    def _cleaner(self, t: NoiseLevel) -> NoiseLevel:
        """The level one step of the chain below ``t``: the next of a table, 1/T less in continuous time."""
        return self.schedule((t.t - 1 / self.steps).clamp(min=0))._replace(floor=self._floor(t))

    def _floor(self, t: NoiseLevel) -> Tensor | None:
        floor = None if self._levels is None else self._levels[-1].floor
        return None if floor is None else floor.expand(t.t.shape)

    @torch.no_grad()
    def trajectory(
        self,
        items: range,
        seed: int = 0,
        solver: str | solvers.Solver = "ddim",
        steps: int | None = 50,
        clip: bool | None = None,
        cond: Condition | None = None,
        spacing: str = "uniform",
        times: Sequence[float] | None = None,
        guide: Callable[[Denoiser], Denoiser] | None = None,
    ) -> Iterator[Step]:
        """The states of ``items`` from noise to data; item i's noise is a function of (seed, i) alone.

        x is in the codec's units. The levels are ``steps`` of a ``spacing``, or those at ``times``; see `grids.grid`.
        ``clip`` keeps x̂ in [−1, 1], by default where the data end there; ``guide`` is around the network before that.
        ``cond`` is what the network is told of each item, nothing if not given. Raises `ConfigError` if it does not
        hear that; with ``guide`` that is the guide's to judge, for a classifier may hear what the network does not.
        """
        solver = self.solver(solver) if isinstance(solver, str) else solver
        levels = self.walk(steps, spacing, times)
        noise = ItemNoise(seed, items, self.item_shape, device=self.device)
        denoise = self.sampler(clip, guide)
        if cond is not None:
            denoise = Told(denoise, self.heard(cond, len(items)) if guide is None else cond.to(self.device))
        return trajectory(denoise, solver, levels, prior_sample(levels[0], noise(1)[0]), noise)

    def solver(self, name: str, **settings: object) -> solvers.Solver:
        """The solver called ``name``, whose variance is the model's where it has one. Raises `ConfigError`."""
        return solvers.build(name, **({"variance": self.config.variance} if name == "ancestral" else {}) | settings)

    def walk(
        self, steps: int | None = None, spacing: str = "uniform", times: Sequence[float] | None = None
    ) -> list[NoiseLevel]:
        """The levels of at most the chain's own number of ``steps``, or those at ``times``."""
        return grid(self.schedule, min(steps or self.steps, self.steps), spacing, times=times)

    def sampler(self, clip: bool | None = None, guide: Callable[[Denoiser], Denoiser] | None = None) -> Denoiser:
        """The denoiser that samples come from: ``guide``'s around the network, `Clipped` for levels and ranges."""
        denoise: Denoiser = self.denoiser() if guide is None else guide(self.denoiser())
        return Clipped(denoise) if (isinstance(self.codec, codecs.BOUNDED) if clip is None else clip) else denoise

    @torch.no_grad()
    def sample(
        self,
        n: int,
        seed: int = 0,
        solver: str | solvers.Solver = "ddim",
        steps: int | None = 50,
        batch: int = 64,
        progress: Callable[[int], None] | None = None,
        first: int = 0,
        cond: Condition | None = None,
        spacing: str = "uniform",
        times: Sequence[float] | None = None,
        guide: Callable[[Denoiser], Denoiser] | None = None,
    ) -> Tensor:
        """n samples as data values (n, *item_shape), items ``first`` and on; the same for any ``batch``.

        ``progress`` is called with the number of finished item-steps. ``cond`` tells of each of the n items; the
        rest as in `trajectory`. Raises `NonFiniteError` where an item grows beyond all numbers.
        """
        cond = self.heard(cond, n) if cond and guide is None else cond
        self.eval()
        parts = []
        for start in range(first, first + n, batch):
            items = range(start, min(start + batch, first + n))
            state = None
            told = cond and cond.take(slice(start - first, start - first + len(items)))
            for state in self.trajectory(items, seed, solver, steps, None, told, spacing, times, guide):
                if progress and state.done:
                    progress(len(items))
            assert state is not None
            parts.append(self.codec.decode(numbers(to_data(state.x, state.level), items.start)).cpu())
        return torch.cat(parts) if parts else torch.empty(0, *self.item_shape)

    def encode(self, values: Tensor, steps: int = 50, cond: Condition | None = None) -> Tensor:
        """The codes (n, *item_shape) that the flow carries ``values`` to: N(0, I) as far as the model is right."""
        x, levels = self.codec.encode(values).to(self.device), codes.inner(self.schedule, self.walk(steps))
        return numbers(codes.to_codes(self._told(cond, len(x)), x, levels))

    def decode(self, code: Tensor, steps: int = 50, cond: Condition | None = None) -> Tensor:
        """The values of codes: the inverse of `encode`, but for the solver's error and the values' rounding."""
        levels = codes.inner(self.schedule, self.walk(steps))
        return self.codec.decode(numbers(codes.from_codes(self._told(cond, len(code)), code, levels)))

    def _told(self, cond: Condition | None, items: int) -> Denoiser:
        return self.denoiser() if cond is None else Told(self.denoiser(), self.heard(cond, items))

    @torch.no_grad()
    def nll(
        self,
        values: Tensor,
        seed: int = 0,
        draws: int | None = None,
        batch: int = 256,
        progress: Callable[[int], None] | None = None,
        first: int = 0,
        estimate: str = "discrete",
        cond: Condition | None = None,
    ) -> NLL:
        """−log p of each item or a bound on it, nats, with its parts.

        ``values`` (n, *item_shape) as the data hold them. ``estimate`` is a row of `undiffuse.estimate`:
        ``"discrete"`` is the bound of the chain, of every step or of one in each of ``draws`` equal strata;
        ``"continuous"`` that of infinitely many steps, from ``draws`` points; ``"ode"`` the likelihood of the
        probability flow; ``"openai"`` the chain's bound as the common script has it. Item i's noise is a function
        of (seed, first + i). Discrete data get the probability of their bin, continuous data a density. With
        ``cond``, which tells of each item, it is −log p(item given what is told).
        """
        if draws is not None and draws < 1:
            raise ConfigError("DRAWS", f"draws = {draws}", "nothing would be measured", "Give 1 or more")
        self.eval()
        cond = cond and self.heard(cond, len(values))
        measure, parts = estimates.get(estimate), []
        for start in range(0, len(values), batch):
            chunk = values[start : start + batch]
            items = range(first + start, first + start + len(chunk))
            x = self.codec.encode(chunk).to(self.device)
            part = measure(self, x, items, seed, draws, cond and cond.take(slice(start, start + batch)))
            decoder = part.decoder - self.codec.log_abs_det(self.item_shape)
            parts.append(part._replace(decoder=decoder).cpu())
            if progress:
                progress(len(chunk))
        return concatenate(parts)


def describe(diffusion: Diffusion) -> dict[str, Any]:
    """All that is needed to build it again, but for the weights, as plain data."""
    return {
        "config": asdict(diffusion.config),
        "item_shape": list(diffusion.item_shape),
        "codec": codecs.to_dict(diffusion.codec),
        "info": diffusion.info,
    }
