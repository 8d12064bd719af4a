"""What each view of the page computes, by the library: each function reads a request and returns the work of a job."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from undiffuse.denoising.denoiser import ConditionedDenoiser
from undiffuse.errors import ConfigError
from undiffuse.evaluation.plan import describe_shape
from undiffuse.evaluation.summary import bits_by_log_snr, mean_bits, parts
from undiffuse.likelihood.nll import concatenate
from undiffuse.model import inversion
from undiffuse.model.arguments import check_predicts_mean
from undiffuse.model.consistency import few_call_sampler
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.restoration import (
    Degradation,
    check_image_model,
    num_steps_of,
    restore,
    rounding_std,
)
from undiffuse.model.sdedit import sdedit, variant_levels
from undiffuse.networks.condition import Condition
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.sampling.ddim_inversion import FLOW_SOLVER
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.sampling.tables import RESTORATION_METHODS, SPACINGS
from undiffuse.sampling.trajectory import Step, check_finite, forward_trajectory, frame_steps, rescale
from undiffuse.studio import commands
from undiffuse.studio.fields import MAX_SEED, Fields
from undiffuse.studio.jobs import Job, Work
from undiffuse.studio.pictures import Picture, decode_mask, encode, from_values
from undiffuse.studio.runs import Images, StudioRun, kind_of

MAX_PANELS, MAX_ITEMS, MAX_POINTS = 4, 16, 1000
MAX_FRAMES, FRAME_BYTES = 48, 24 << 20
"""Frames of a panel at most, and bytes of all frames of a job."""
FORWARD_STEPS = 24
DRAWS_AT_ONCE = 4
OWN = ""
"""In place of a solver's name: the solver that a distilled model samples with by default."""


@dataclass(frozen=True)
class Panel:
    """One of the columns that `sample` shows side by side."""

    sampler: Sampler
    cond: Condition | None
    command: str


def sample(run: StudioRun, images: Images, fields: Fields) -> Work:
    """Samples of one seed by several samplers; frames of x_t and x̂ while they are drawn."""
    model, kind = run.model, kind_of(run.model)
    if kind == "other":
        if "image" in model.condition_sizes:
            check_image_model(model, run.path)  # raises: a stage of a cascade needs smaller images
        shape = describe_shape(model.item_shape)
        fix = f"Use the command: {commands.command('sample', run.path)}"
        raise ConfigError(
            "KIND", run.path, f"the page shows images and points of two numbers, not items of {shape}", fix
        )
    seed, n = (
        fields.integer("seed", 0, MAX_SEED, 0),
        fields.integer("n", 1, MAX_POINTS if kind == "points" else MAX_ITEMS, 1),
    )
    panels = [_panel(run, each, seed, n) for each in fields.objects("panels", MAX_PANELS)]
    fields.done()
    frame_bytes = 2 * n * model.dims * len(panels)

    def work(job: Job) -> Mapping[str, Any]:
        totals = [model.num_steps(panel.sampler) for panel in panels]
        done = count()
        for i, (panel, total) in enumerate(zip(panels, totals, strict=True)):
            job.emit("panel", panel=i, steps=total, command=panel.command)
            shown = frame_steps(total, min(MAX_FRAMES, FRAME_BYTES // frame_bytes))
            with torch.no_grad(), checked_calls(model, job):
                for state in model.trajectory(range(n), seed, panel.sampler, panel.cond):
                    job.progress(next(done), sum(totals) + len(totals))
                    if state.done in shown:
                        job.emit("frame", panel=i, **_frame(model, panel, state, n, state.done == total))
        return {}

    return work


def _panel(run: StudioRun, fields: Fields, seed: int, n: int) -> Panel:
    model = run.model
    cond, options = run.condition(fields, n)
    solver = fields.choice("solver", [OWN, *SOLVERS])
    steps = fields.integer("steps", 1, model.chain_length)
    spacing = fields.choice("spacing", SPACINGS, "uniform")
    guidance = fields.number("guidance", -100, 100, 1.0)
    fields.done()
    length: dict[str, Any]
    if solver == OWN:
        if not model.config.calls:
            raise ConfigError("SOLVER", "solver", "only a distilled model has a solver of its own", "Choose a solver")
        sampler, length = few_call_sampler(model.schedule, steps, model.config.few_call_solver), {"--calls": steps}
    else:
        sampler, length = Sampler(solver, steps, spacing), {"--solver": solver, "--steps": steps}
        length |= {} if spacing == "uniform" else {"--spacing": spacing}
    if guidance != 1:
        if cond is None:
            raise ConfigError("GUIDANCE", "guidance", "it needs a label or a prompt", "Give one, or guidance 1")
        sampler = replace(sampler, guidance=guidance)
        options |= {"--guidance": f"{guidance:g}"}
    model.build_solver(sampler)
    line = commands.command("sample", run.path, options={"--n": n, "--seed": seed, **length, **options})
    return Panel(sampler, cond, line)


def _frame(model: Diffusion, panel: Panel, state: Step, n: int, last: bool) -> dict[str, Any]:
    """A state of the trajectory, and what the model predicts there: of the last state it is the sample itself."""
    if last:
        x = prediction = check_finite(rescale(state.x, state.level))
    else:
        cond = panel.cond and model.prepare_condition(panel.cond, n)
        denoise = ConditionedDenoiser(model.sampling_denoiser(panel.sampler), cond)
        x, prediction = state.x, denoise(state.x, state.level).x
    return {"step": state.done, **_level(state), "x": _shown(model, x), "prediction": _shown(model, prediction)}


def _level(state: Step) -> dict[str, Any]:
    log_snr = float(state.level.log_snr)
    return {"t": float(state.level.t), "log_snr": log_snr if math.isfinite(log_snr) else None}


def _shown(model: Diffusion, x: Tensor) -> dict[str, Any]:
    """x for the page: images, or points in the units of the data."""
    values = model.transform.to_data(x).cpu()
    if kind_of(model) == "points":
        return {"points": [[round(v, 4) for v in point] for point in values.double().tolist()]}
    return encode(from_values(values, check_image_model(model, "this run").num_values))


def picture(run: StudioRun, images: Images, fields: Fields) -> Work:
    """The image itself, as the other views would use it."""
    _image_model(run)
    source = fields.object("source")
    fields.done()

    def work(job: Job) -> Mapping[str, Any]:
        _emit_picture(job, run, source, images)
        return {}

    return work


def forward(run: StudioRun, images: Images, fields: Fields) -> Work:
    """The forward process of an image, and what the model predicts of the image at each level."""
    model, seed = _mean_model(run), fields.integer("seed", 0, MAX_SEED, 0)
    source, (cond, _) = fields.object("source"), run.condition(fields, 1)
    fields.done()
    steps = min(FORWARD_STEPS, model.chain_length)
    sampler = Sampler(num_steps=steps)

    def work(job: Job) -> Mapping[str, Any]:
        shown = _emit_picture(job, run, source, images)
        x = model.transform.to_model(_values(model, shown), model.dtype).to(model.device)
        noise = ItemNoise(seed, [0], model.x_shape, "forward", model.device)
        panel = Panel(sampler, cond, "")
        with torch.no_grad(), checked_calls(model, job):
            for state in forward_trajectory(x, model.noise_levels(sampler), noise):
                job.progress(state.done, steps)
                job.emit("frame", panel=0, **_frame(model, panel, state, 1, state.done == 0))
        return {"command": commands.forward(run.path, model.item_shape[0], seed, steps)}

    return work


def variants(run: StudioRun, images: Images, fields: Fields) -> Work:
    """Variants of an image: noise, and back."""
    model, seed = _image_model(run), fields.integer("seed", 0, MAX_SEED, 0)
    n, strength = fields.integer("n", 1, MAX_ITEMS, 4), fields.number("strength", 0.01, 1.0, 0.6)
    steps = fields.integer("steps", 1, model.chain_length, min(100, model.chain_length))
    source, (cond, options) = fields.object("source"), run.condition(fields, n)
    fields.done()
    total = len(variant_levels(model, strength, steps)) - 1
    own_steps = {} if model.config.calls else {"--steps": steps}  # a distilled model takes its own times
    line = {"--method": "sdedit", "--strength": f"{strength:g}", "--n": n, "--seed": seed, **own_steps, **options}

    def work(job: Job) -> Mapping[str, Any]:
        shown, done = _emit_picture(job, run, source, images), count(1)
        with checked_calls(model, job):
            values = sdedit(
                model, shown.x, n, strength, seed, steps, n, lambda _: job.progress(next(done), total), cond
            )
        return {
            "images": _shown_values(model, values),
            "command": commands.command("restore", run.path, ("image.png",), line),
        }

    return work


def likelihood(run: StudioRun, images: Images, fields: Fields) -> Work:
    """The continuous bound of an image, with its error and where in log-SNR it is paid."""
    model, seed = _mean_model(run), fields.integer("seed", 0, MAX_SEED, 0)
    draws, points = fields.integer("draws", 2, 256, 16), fields.integer("points", 4, 256, 32)
    source, label, prompt = fields.object("source"), None, ""
    cond, options = run.condition(fields, draws)
    fields.done()
    if cond is not None:
        label, prompt = None if cond.label is None else int(cond.label[0]), options.get("--prompt", "")

    def work(job: Job) -> Mapping[str, Any]:
        shown = _emit_picture(job, run, source, images)
        values, found = _values(model, shown), []
        with checked_calls(model, job):
            for start in range(0, draws, DRAWS_AT_ONCE):
                size = min(DRAWS_AT_ONCE, draws - start)
                part = None if cond is None else cond.take(slice(start, start + size))
                batch = values.expand(size, *values.shape[1:])
                found.append(model.nll(batch, seed, points, first=start, estimate="continuous", cond=part))
                nll = concatenate(found)
                edges, bits = bits_by_log_snr(model, {"continuous": nll})["continuous"]
                mean, stderr = mean_bits(model, nll.total)
                shares = {name: mean_bits(model, nats)[0] for name, nats in parts(nll).items()}
                curve = {"edges": edges.tolist(), "bits": bits.tolist(), "parts": shares}
                job.emit("bound", bits_per_dim=mean, stderr=stderr if math.isfinite(stderr) else None, **curve)
                job.progress(start + size, draws)
        text = commands.likelihood(run.path, model.item_shape[0], draws, seed, points, label, prompt)
        return {"command": text}

    return work


def inpaint(run: StudioRun, images: Images, fields: Fields) -> Work:
    """Restorations of the part of an image that a mask hides."""
    model, seed = _mean_model(run), fields.integer("seed", 0, MAX_SEED, 0)
    n, method = fields.integer("n", 1, MAX_ITEMS, 4), fields.choice("method", RESTORATION_METHODS, "mmps")
    steps = fields.integer("steps", 1, model.chain_length, min(100, model.chain_length))
    source, (cond, options) = fields.object("source"), run.condition(fields, n)
    hidden = decode_mask(fields.text("mask", 1 << 20), model.item_shape[1:])
    fields.done()
    if not hidden.any():
        raise ConfigError("MASK", "mask", "it hides nothing", "Paint the part that is to be filled in")
    degradation = Degradation(model.item_shape, known=torch.tensor(~hidden)[None])
    total = n * num_steps_of(model, method, steps)
    line = {"--mask": "mask.png", "--method": method, "--n": n, "--seed": seed, "--steps": steps, **options}

    def work(job: Job) -> Mapping[str, Any]:
        shown, done = _emit_picture(job, run, source, images), 0

        def advance(items: int) -> None:
            nonlocal done
            job.progress(done := done + items, total)

        with checked_calls(model, job):
            values = restore(model, degradation, shown.x, n, method, seed, steps, n, rounding_std(256), advance, cond)
        command = commands.command("restore", run.path, ("image.png",), line)
        return {"images": _shown_values(model, values), "command": command}

    return work


def interpolate(run: StudioRun, images: Images, fields: Fields) -> Work:
    """Images between two images: the noises to which the model's flow maps them, interpolated on an arc."""
    model, n = _mean_model(run), fields.integer("n", 2, MAX_ITEMS, 9)
    steps = fields.integer("steps", 1, model.chain_length, min(50, model.chain_length))
    sources = fields.object("source"), fields.object("other")
    cond, options = run.condition(fields, n)
    fields.done()
    calls = 2 * FLOW_SOLVER.calls * steps

    def work(job: Job) -> Mapping[str, Any]:
        one, other = (_emit_picture(job, run, source, images) for source in sources)
        ends = torch.cat([_values(model, one), _values(model, other)])
        with checked_calls(model, job, calls):
            values = inversion.interpolate(model, ends, n, steps, cond)
        line = {"--n": n, "--steps": steps, **options}
        command = commands.command("interpolate", run.path, ("image.png", "other.png"), line)
        return {"images": _shown_values(model, values.cpu()), "command": command}

    return work


VIEWS: dict[str, Callable[[StudioRun, Images, Fields], Work]] = {
    "sample": sample,
    "picture": picture,
    "forward": forward,
    "variants": variants,
    "likelihood": likelihood,
    "inpaint": inpaint,
    "interpolate": interpolate,
}


@contextmanager
def checked_calls(model: Diffusion, job: Job, expected: int = 0) -> Iterator[None]:
    """A block in which a cancelled job stops at the next network call; of ``expected`` calls progress is emitted."""
    calls = count()

    def before(*_: object) -> None:
        job.check()
        if expected:
            job.progress(next(calls), expected)

    hook = model.network.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


def _image_model(run: StudioRun) -> Diffusion:
    """The model of the run. Raises `ConfigError` if it is no model of images."""
    check_image_model(run.model, run.path)
    return run.model


def _mean_model(run: StudioRun) -> Diffusion:
    """`_image_model` of a view that needs means. Raises `ConfigError` for a consistency model too."""
    check_predicts_mean(_image_model(run).config, run.path)
    return run.model


def _emit_picture(job: Job, run: StudioRun, source: Fields, images: Images) -> Picture:
    picture = run.picture(source, images)
    job.emit("picture", **picture.to_json())
    return picture


def _values(model: Diffusion, picture: Picture) -> Tensor:
    """The picture as values of the data, (1, *item_shape)."""
    return check_image_model(model, "this run").to_data(picture.x[None])


def _shown_values(model: Diffusion, values: Tensor) -> dict[str, Any]:
    return encode(from_values(values, check_image_model(model, "this run").num_values))
