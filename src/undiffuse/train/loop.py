"""Training: from data and a recipe to a run folder that holds everything."""

from __future__ import annotations

import time
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from undiffuse.checkpoint import fit_tensors, load
from undiffuse.codec import codec_for
from undiffuse.config import Config, TrainConfig
from undiffuse.data import Dataset
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError, DataError
from undiffuse.lattice import Lattice
from undiffuse.networks.norm import in_fast_layout
from undiffuse.presets import fitted
from undiffuse.randomness import generator
from undiffuse.train import augment, state
from undiffuse.train.batch import Batches, batch_items, batches, shares, standardise_vectors
from undiffuse.train.ema import Average
from undiffuse.train.nonfinite import leave_out, require_finite, whats_wrong
from undiffuse.train.parallel import agree, clip, cut, loudest, meet, prepare, recompute
from undiffuse.train.profiles import Profiles
from undiffuse.train.room import require_room
from undiffuse.train.run import Run, describe
from undiffuse.train.stop import Interrupted, stopping_signals
from undiffuse.train.watch import Watch

PACE = 10.0
"""How many times as fast as the network's weights a learned schedule's few numbers move."""


def fit(
    config: Config,
    data: Dataset,
    out: str | Path,
    device: str = "auto",
    init: str | Path | None = None,
    quiet: bool = False,
    force: bool = False,
) -> Path:
    """Trains on ``data`` into the run folder ``out`` and returns it; goes on where an unfinished run stopped.

    ``init`` is a run or checkpoint whose weights it starts from. A run that was begun with another recipe, other data
    or another torch is refused, unless ``force`` says to go on with these; the plan for its end is then made anew.

    Every random number is a function of (seed, purpose, step): nothing that looks (sampling, measuring,
    saving) changes what is trained. Raises `ConfigError`, `DataError`, `CheckpointError`, `NonFiniteError`
    (exit 5), `ResourceError` (a full disk, another process that trains into ``out``), and `Interrupted` after a
    signal, when all is saved.
    """
    settings, run = config.train, Run(out)
    if settings.minutes is None and settings.steps is None:
        raise ConfigError("LENGTH", "train.minutes, train.steps", "neither says when to stop", "Give one of them")
    augment.check(settings, data.item_shape)
    if run.finished:
        return run.folder

    # Where it runs, and what it is
    meet(device)
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else gradients are held twice
    accelerator = Accelerator(cpu=device == "cpu", gradient_accumulation_steps=1, kwargs_handlers=[views])
    share, few = data.share_held_out(settings.held_out)
    if few:
        data, settings = data.noted(few), replace(settings, held_out=share)
    split = data.split(settings.held_out)
    if settings.conditional and not data.hearing:
        cause = "these data say nothing of their items but their values: no labels, vectors or tokens"
        raise DataError("NO_CONDITIONS", data.name, cause, "Leave --conditional out, or sort images into sub-folders")
    config = fitted(config, data.levels, data.hearing)
    codec = codec_for(data, None if data.levels is not None else data.moments(split.train))
    torch.manual_seed(settings.seed)
    diffusion = Diffusion(config.model, data.item_shape, codec, describe(data) | {"held_out": settings.held_out}).to(
        accelerator.device
    )
    settings = replace(settings, precision=precision_of(settings.precision, accelerator.device))
    if isinstance(diffusion.network, Lattice):
        diffusion.network.start_from(torch.from_numpy(data.counts(split.train)))
    if settings.conditional:
        standardise_vectors(diffusion, data, split.train)
    diffusion.autocast = torch.bfloat16 if settings.precision == "bfloat16" else None
    network = recompute(in_fast_layout(diffusion.network), settings)
    require_room(diffusion, settings, accelerator.num_processes)
    if init is not None:
        diffusion.load_state_dict(weights_of(init, diffusion))
    smooth = deepcopy(diffusion)
    cut(network.train(), settings, accelerator.num_processes, accelerator.device)
    optimiser = torch.optim.AdamW(groups(diffusion, settings), lr=settings.lr, betas=settings.betas, fused=True)
    average = Average(diffusion, settings.ema)
    profiles = Profiles(diffusion, average, settings.ema, settings.snapshots, run.snapshots)

    first = accelerator.is_main_process
    with run.alone() if first else nullcontext(), stopping_signals() as asked:
        # Where it stands
        changed = first and run.open(replace(config, train=settings), data, force)
        if first:
            state.tidy(run.checkpoints)
        accelerator.wait_for_everyone()
        if run.finished:  # by a process that was there just before
            return run.folder
        memory = diffusion.memory | profiles.memory
        progress, damaged = state.read_latest(run.checkpoints, diffusion, average, optimiser, memory)
        if first:
            profiles.forget_after(progress.step)
        if changed:
            progress.decay_from = progress.last_step = None
        plan(progress, settings)
        agree(accelerator, progress)
        parallel = prepare(accelerator, network, settings)

        def save() -> None:
            average.copy_to(smooth)
            memory = diffusion.memory | profiles.memory
            state.write(run.checkpoints, progress, diffusion, average, optimiser, memory=memory, first=first)

        with (
            Watch(run, smooth, data, split, settings, progress, quiet or not first, first) as watch,
            batches(data, split.train, settings) as batch,
        ):
            for line in [*([f"note: {few}"] if few else []), *damaged]:
                watch.say(line)

            # The loop
            saved = progress.seconds
            while progress.last_step is None or progress.step < progress.last_step:
                began = time.perf_counter()
                step = progress.step
                u, losses, norms = gradient(accelerator, diffusion, parallel, optimiser, batch, settings, step)
                lr = settings.lr * rate(progress, settings)
                if wrong := whats_wrong(losses, norms):
                    items = data.called(batch_items(split.train, settings, step))
                    watch.say(leave_out(wrong, items, progress, settings, run.folder))
                else:
                    progress.left_out = 0
                    if diffusion.memory:
                        diffusion.observe(u, losses)
                    for group in optimiser.param_groups:
                        group["lr"] = lr * group["pace"]
                    optimiser.step()
                    require_finite(diffusion, step + 1, run.folder)
                    average.update(diffusion, step + 1)
                    profiles.update(diffusion, step + 1)
                optimiser.zero_grad()
                progress.step += 1

                progress.seconds += time.perf_counter() - began
                plan(progress, settings)
                agree(accelerator, progress)
                watch.step(None if wrong else float(losses.mean()), norms[0], lr, batch.waited)
                stop = loudest(accelerator, asked)
                if watch.passed(settings.snapshots):
                    profiles.write(progress.step, first)
                due, late = watch.due(), progress.seconds - saved >= 60 * settings.save_minutes
                if due or late or stop:
                    began, saved = time.perf_counter(), progress.seconds
                    save()
                    if first and stop:
                        watch.write_records()
                    elif first and due:
                        with asked.all_saved() if accelerator.num_processes == 1 else nullcontext():
                            watch.look()
                    progress.seconds += time.perf_counter() - began
                    if stop:
                        raise Interrupted(stop)

            # The end
            save()
            if first:
                with asked.all_saved():
                    watch.finish()
    return run.folder


def gradient(
    accelerator: Accelerator,
    diffusion: Diffusion,
    parallel: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    batch: Batches,
    settings: TrainConfig,
    step: int,
) -> tuple[Tensor, Tensor, list[float]]:
    """The batch's u, the losses of its items, (B,) both, and the norm of each group's gradient, left clipped.

    All are of the whole batch, in every process.
    """
    seed = generator(settings.seed, "dropout", step).initial_seed()
    values, u, eps, z, cond = batch(step)
    mine = shares(settings, accelerator.num_processes, accelerator.process_index)
    seen = []
    for number, part in enumerate(mine, start=len(mine) * accelerator.process_index):
        torch.manual_seed(seed + number)  # dropout is that of the pass, whichever process has it
        with nullcontext() if part is mine[-1] else accelerator.no_sync(parallel):  # replicas meet once a step
            each = diffusion.loss(
                values[part],
                u[part],
                eps[part].to(diffusion.device),
                z[part].to(diffusion.device),
                cond and cond.take(part).to(diffusion.device),
                network=parallel,
            )
            accelerator.backward(each.mean() / len(mine))
        seen.append(each.detach())
    share_gradient(accelerator, diffusion)
    norms = [clip(group["params"], settings.clip) for group in optimiser.param_groups]
    losses: Tensor = accelerator.gather(torch.cat(seen))  # type: ignore[assignment]
    return u, losses, norms


def plan(progress: state.Progress, settings: TrainConfig) -> None:
    """Fixes where the decay starts and the run ends: from ``steps``, or, when it is time to decay, from the clock."""
    length = settings.minutes if settings.steps is None else settings.steps
    if progress.last_step is not None and progress.length == length:
        return
    progress.decay_from, progress.last_step, progress.length = None, None, length
    if settings.steps is not None:
        progress.last_step = settings.steps
        progress.decay_from = round(settings.steps * (1 - settings.decay))
    elif settings.minutes is not None:
        budget = 60 * settings.minutes
        if progress.step > 0 and progress.seconds >= (1 - settings.decay) * budget:
            remaining = max(budget - progress.seconds, 0) * progress.step / progress.seconds
            progress.decay_from = progress.step
            progress.last_step = progress.step + max(round(remaining), 1)


def rate(progress: state.Progress, settings: TrainConfig) -> float:
    """The share of the full learning rate for the step to come: a linear rise, a plateau, a linear fall to 0."""
    rise = min(1.0, (progress.step + 1) / settings.warmup) if settings.warmup else 1.0
    if progress.last_step is None or progress.decay_from is None or progress.last_step <= progress.decay_from:
        return rise
    fall = (progress.last_step - progress.step) / (progress.last_step - progress.decay_from)
    return min(rise, max(fall, 0.0), 1.0)


def precision_of(asked: str, device: torch.device) -> str:
    """``auto`` made definite: bfloat16 where the device multiplies matrices in it by itself, else float32."""
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    known = (getattr(torch.cpu, f"_is_{kind}_supported", None) for kind in ("avx512_bf16", "amx_tile"))
    return "bfloat16" if any(supported() for supported in known if supported) else "float32"


def groups(diffusion: Diffusion, settings: TrainConfig) -> list[dict[str, Any]]:
    """What the optimiser moves: the network, and a learned schedule at its own `PACE`, which does not decay."""
    network = {"params": list(diffusion.network.parameters()), "weight_decay": settings.weight_decay, "pace": 1.0}
    schedule = {"params": schedule_parameters(diffusion), "weight_decay": 0.0, "pace": PACE}
    return [network, schedule] if schedule["params"] else [network]


def schedule_parameters(diffusion: Diffusion) -> list[torch.nn.Parameter]:
    """Those of a learned schedule, else none."""
    return list(diffusion.schedule.parameters()) if isinstance(diffusion.schedule, torch.nn.Module) else []


def share_gradient(accelerator: Accelerator, diffusion: Diffusion) -> None:
    """Gives every process the mean gradient of a learned schedule, which is outside of the parallel network."""
    for parameter in schedule_parameters(diffusion) if accelerator.num_processes > 1 else []:
        assert parameter.grad is not None
        mean = accelerator.reduce(parameter.grad.to(accelerator.device), "mean")
        parameter.grad.copy_(mean)  # type: ignore[arg-type]


def weights_of(init: str | Path, diffusion: Diffusion) -> dict[str, Tensor]:
    """The weights of another model, if they fit ``diffusion``. Raises `CheckpointError`."""
    weights = load(init).state_dict()
    fit_tensors(Path(init), diffusion.state_dict(), weights)
    return weights
