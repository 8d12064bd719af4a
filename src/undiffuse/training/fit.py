"""The training loop: from a task and data to a run folder that holds everything."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from undiffuse.data.dataset import Dataset, Split
from undiffuse.errors import ConfigError
from undiffuse.networks.norm import to_fast_layout
from undiffuse.networks.protocol import set_checkpointing
from undiffuse.process.seeded_noise import generator
from undiffuse.runtime.precision import resolve_precision
from undiffuse.runtime.signals import Interrupted, StopRequests, collect_stop_signals
from undiffuse.training import compiled
from undiffuse.training.augmentation import check_augmentation
from undiffuse.training.batches import Batch, Batches, Reader, batch_items, global_batch, micro_batches
from undiffuse.training.distributed import (
    average_other_gradients,
    broadcast_progress,
    clip_gradient,
    from_main_process,
    prepare_network,
    reduce_signal,
    start_accelerator,
)
from undiffuse.training.initial_weights import find_initial_weights
from undiffuse.training.lr_schedule import decay_begins, lr_factor, plan_lr_decay
from undiffuse.training.memory_estimate import check_memory
from undiffuse.training.monitor import Monitor
from undiffuse.training.nonfinite import UnreadSteps, find_nonfinite, reading_waits, require_finite_state, skip_step
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import InitialWeights, Run
from undiffuse.training.task import Task
from undiffuse.training.task_parts import held_out_share
from undiffuse.training.train_state import TrainState, finish_interrupted_writes


def fit(
    task: Task,
    data: Dataset,
    run: Run,
    device: str | torch.device = "auto",
    init: str | Path | None = None,
    quiet: bool = False,
    force: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Path:
    """Train ``task`` on ``data`` into the folder of ``run``, which is returned; an unfinished run is resumed.

    ``init``: file or run whose weights a new run starts from, and keeps. ``quiet``: print nothing. ``force``: resume
    although recipe, data or torch have changed, with a new plan for the end. ``clock``: seconds for ``minutes``.

    Every random number is a function of (seed, purpose, step or item). With ``max_steps``, evaluating and saving do not
    change what is trained, and on a CPU a resumed run is bit-identical to an uninterrupted one; with ``minutes`` their
    time counts, and they get as little of it as `progress.measuring_allowance` says.
    Raises `ConfigError` (also for a finished run of another recipe, data or ``init``), `DataError`, `CheckpointError`,
    `NonFiniteError`, `ResourceError` (disk full, or another process trains into the folder), and `Interrupted` after a
    signal, when everything is saved.
    """
    # Set up: processes, settings that fit data and device, model
    began = clock()
    accelerator = start_accelerator(device)
    main = accelerator.is_main_process
    task, start = load_start(task, run, init)
    task, data, notes = adapt_task(task, data, accelerator.device, start.model)
    if run.check_finished(task.config, data, start.init_fingerprint):
        return run.folder
    settings, split = task.config.train, data.split(task.config.train.held_out)
    model = build_model(task, data, split, accelerator, start)
    notes += start_model(task, model, start, is_new=not run.has_checkpoint())
    state = TrainState(task, model, run.snapshots, accelerator)

    with run.exclusive() if main else nullcontext(), collect_stop_signals(run.has_checkpoint) as stop_requests:
        resumed = resume(task, data, run, state, accelerator, force, start)
        if resumed is None:  # finished by another process, since the check above
            return run.folder
        progress, warnings = resumed
        saved_at, took, read = progress.seconds, 0.0, prepare_reader(accelerator, task, model, data, split, run)
        network = choose_network(accelerator, state, data, split, read, progress, notes)
        progress.seconds += clock() - began  # setting up is part of the run
        unread = UnreadSteps(task, model, run.folder, reading_waits(accelerator.device))
        with (
            Monitor(run, task, state.ema_model, data, split, progress, quiet, main, clock) as monitor,
            Batches(data, split.train, settings, clock, read) as batches,
        ):
            for line in [*notes, *warnings]:
                monitor.log(line)
            evaluate_saved(accelerator, monitor, stop_requests)
            while not progress.done:
                # One step: gradient, then weights and averages; neither moves if something is NaN or infinite
                began = clock()
                batch, lr = batches(progress.step), settings.lr * lr_factor(progress, settings)
                losses, norms = compute_gradient(accelerator, state, network, batch, progress)
                problem = find_nonfinite(losses, norms) if unread.check_first else None
                if problem:
                    names = data.item_names(batch_items(split.train, settings, progress.step))
                    monitor.log(skip_step(problem, names, progress, settings, run.folder))
                else:
                    progress.skipped_in_a_row = 0
                    state.step(lr, progress.step + 1)
                    task.after_step(model, batch, losses)  # of all processes: each makes the same update
                    unread.add(progress.step, losses, norms)  # or, on a CPU, check the weights now
                state.optimizer.zero_grad()
                progress.step += 1
                progress.step_seconds = clock() - began
                progress.seconds += progress.step_seconds + took

                # Record it; write a snapshot of the averages when one is due
                plan_lr_decay(progress, settings)  # no change, except with `minutes`: when decay begins, and at the end
                broadcast_progress(accelerator, progress)
                took = record(monitor, state, unread, None if problem else losses.mean(), norms[0], lr, batches.waited)

                # Save and evaluate when due; stop after a signal
                signal = reduce_signal(accelerator, stop_requests)
                evaluation_due = from_main_process(accelerator, monitor.evaluation_due())
                save_due = decay_begins(progress, settings) or progress.seconds - saved_at >= 60 * settings.save_minutes
                if evaluation_due or save_due or signal:
                    began, saved_at, progress.evaluation_missing = clock(), progress.seconds, evaluation_due
                    unread.require_finite(progress, data, split.train)
                    state.save(run.checkpoints, progress)  # also copies the averages to `ema_model`
                    progress.seconds += clock() - began
                    if not signal:  # else all processes raise, and the evaluation is made when the run resumes
                        evaluate_saved(accelerator, monitor, stop_requests)
                    elif main:
                        monitor.write_records()
                if signal:
                    raise Interrupted(signal)

            # Finish
            began = clock()
            state.save(run.checkpoints, progress)
            progress.seconds += clock() - began  # the last measurement gets what is left
            if main:
                with stop_requests.safe_to_exit():
                    monitor.finish()
            accelerator.wait_for_everyone()  # for the model's file
    return run.folder


def record(
    monitor: Monitor,
    state: TrainState,
    unread: UnreadSteps,
    loss: Tensor | None,
    norm: Tensor,
    lr: float,
    waited: float,
) -> float:
    """Record the step that is done, write a snapshot of the averages when one is due, return the seconds of both."""
    began, progress, settings = monitor.clock(), monitor.progress, monitor.settings
    if monitor.record_due or state.snapshots.is_due(progress, settings):
        unread.require_finite(progress, monitor.data, monitor.split.train)
    numbers = (loss, norm) if unread.waits else (None if loss is None else float(loss), float(norm))
    step_seconds = progress.step_seconds + monitor.clock() - began  # with the wait for a GPU
    monitor.record_step(*numbers, lr, waited, step_seconds)
    state.snapshots.write_if_due(progress, settings, monitor.main)
    return monitor.clock() - began


def resume(
    task: Task,
    data: Dataset,
    run: Run,
    state: TrainState,
    accelerator: Accelerator,
    force: bool,
    start: Start,
) -> tuple[Progress, list[str]] | None:
    """The progress of the last checkpoint, with a plan for the end, and lines about damaged ones; None if finished.

    The plan is a new one if ``force`` accepted a changed recipe, data or torch.
    """
    changed = accelerator.is_main_process and run.open(task.config, data, force, start.init_fingerprint, start.weights)
    if accelerator.is_main_process:
        finish_interrupted_writes(run.checkpoints)
    accelerator.wait_for_everyone()
    if run.finished:
        return None
    progress, warnings = state.load_latest(run.checkpoints, run.id)
    if changed:
        progress.decay_from = progress.last_step = None
    plan_lr_decay(progress, task.config.train)
    return progress, warnings


def prepare_reader(accelerator: Accelerator, task: Task, model: Any, data: Dataset, split: Split, run: Run) -> Reader:
    """`Task.reader` of the run, in the first process before the others, which find the files that it wrote."""
    reads = []
    for is_turn in (accelerator.is_main_process, not accelerator.is_main_process):
        if is_turn:
            reads.append(task.reader(model, data, split, run.folder))
        accelerator.wait_for_everyone()
    return reads[0]


def choose_network(
    accelerator: Accelerator,
    state: TrainState,
    data: Dataset,
    split: Split,
    read: Reader,
    progress: Progress,
    notes: list[str],
) -> nn.Module:
    """`prepare_network`; compiled if the recipe leaves it open and gradients take less time, with a line in ``notes``.

    The choice is made before the first step and kept in ``progress``, so that a resumed run computes as it did before.
    """
    settings, device = state.task.config.train, accelerator.device
    network = prepare_network(accelerator, state.model.network, settings)
    is_first = progress.step == 0 and progress.compiled is None
    if not compiled.is_open(settings, device, accelerator.num_processes) or not (is_first or progress.compiled):
        return network
    batch = global_batch(data, split.train, settings, progress.step, read)

    def gradient(form: nn.Module) -> None:  # leaves the model as it is, the statistics of a batch norm too
        buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
        try:
            compute_gradient(accelerator, state, form, batch, progress)
        finally:
            state.optimizer.zero_grad()
            for buffer, was in buffers:
                buffer.copy_(was)

    if is_first:
        form, line = compiled.choose(network, gradient, lambda: torch.accelerator.synchronize(device))
    else:
        form, line = compiled.compile_network(network, gradient)
    progress.compiled = form is not None
    notes += [line] if line else []
    return network if form is None else form


def evaluate_saved(accelerator: Accelerator, monitor: Monitor, stop_requests: StopRequests) -> None:
    """The evaluation that the checkpoint of this step lacks, if one is due.

    Everything is saved, so a signal raises at once, unless other processes would wait.
    """
    if accelerator.is_main_process:
        with stop_requests.safe_to_exit() if accelerator.num_processes == 1 else nullcontext():
            monitor.evaluate_missing()
    broadcast_progress(accelerator, monitor.progress)


def adapt_task(task: Task, data: Dataset, device: torch.device, start: Any = None) -> tuple[Task, Dataset, list[str]]:
    """The task with settings that fit ``data`` and ``device``; the data; lines for the log about what was changed.

    Precision is resolved, and nothing is held out if items are too few, or that ``start``, the model of the initial
    weights, was trained on. Raises `ConfigError` or `DataError` if task and data do not fit together, or if the length
    of the run is not given.
    """
    settings = task.config.train
    if settings.minutes is None and settings.max_steps is None:
        cause = "neither is given, so training would not end"
        raise ConfigError("LENGTH", "train.minutes, train.max_steps", cause, "Give one of them")
    check_augmentation(settings, data.item_shape)
    models = task.other_models() | ({} if start is None else {"the model that it starts from": start})
    held_out, reason = held_out_share(data, settings.held_out, models)
    notes = [] if reason is None else [reason]
    precision = resolve_precision(settings.precision, device, len(data.item_shape) - 1)
    settings = replace(settings, precision=precision, held_out=held_out)
    task = task.adapt(data, settings)
    notes += task.notes()
    return task, data.with_notes(*notes), [f"note: {note}" for note in notes]


def build_model(task: Task, data: Dataset, split: Any, accelerator: Accelerator, start: Start) -> Any:
    """The model on its device with random weights, finite and small enough for the memory. Raises `ConfigError`."""
    settings, device = task.config.train, accelerator.device
    torch.manual_seed(settings.seed)
    model = task.build_model(data, split).to(device)
    require_finite_state(model)
    set_checkpointing(to_fast_layout(model.network), settings.checkpointing)

    read = task.reader(model, data, split, None)

    def loss(trial: Any, items: int) -> Tensor:
        batch = global_batch(data, split.train, replace(settings, batch=items, accumulate=1), 0, read)
        return task.loss(trial, batch.take(slice(items), device), trial.network)

    others = [*task.other_models().values(), *([] if start.model is None else [start.model])]
    check_memory(model, loss, settings, accelerator.num_processes, others)
    return model


class Start(NamedTuple):
    """What a run starts from: the file of its initial ``weights`` and the ``model`` in it, None for random weights.

    ``init_fingerprint`` is that of the weights that ``init`` names, None without ``init``. A resumed run may start from
    its own copy of the weights instead.
    """

    weights: InitialWeights | None
    model: Any
    init_fingerprint: str | None


def load_start(task: Task, run: Run, init: str | Path | None) -> tuple[Task, Start]:
    """(the task that starts from the weights which `find_initial_weights` finds, these weights)."""
    weights, init_fingerprint = find_initial_weights(run, init)
    if weights is None:
        return task, Start(None, None, init_fingerprint)
    model = task.load(weights.path)
    return task.start_from(model, weights.path), Start(weights, model, init_fingerprint)


def start_model(task: Task, model: Any, start: Start, is_new: bool) -> list[str]:
    """Load the weights that a new run starts from, and note them in the model's facts; lines for the log."""
    if start.weights is None:
        return []
    facts = {name: start.model.info[name] for name in ("name", "steps") if name in start.model.info}
    model.info["init"] = {"weights": start.weights.fingerprint, **facts}
    if not is_new:
        return []
    return [f"note: {line}" for line in task.load_initial_weights(model, start.model, start.weights.path)]


def compute_gradient(
    accelerator: Accelerator, state: TrainState, network: nn.Module, batch: Batch, progress: Progress
) -> tuple[Tensor, list[Tensor]]:
    """The loss of each item, (B,), and the gradient norm of each parameter group, over all processes.

    Leaves the gradient of the mean loss, clipped, in the parameters. ``network``, made by `prepare_network`,
    is called in place of ``model.network``.
    """
    settings = state.task.config.train
    batch = replace(batch, fraction=progress.fraction(settings))
    seed = generator(settings.seed, "dropout", progress.step).initial_seed()
    parts = micro_batches(settings, accelerator.num_processes, accelerator.process_index)
    losses = []
    for number, part in enumerate(parts, start=len(parts) * accelerator.process_index):
        torch.manual_seed(seed + number)  # dropout depends on the micro-batch, not on the process that computes it
        synchronize = part is parts[-1]  # replicas average gradients once a step
        with nullcontext() if synchronize else accelerator.no_sync(network):
            loss = state.task.loss(state.model, batch.take(part, accelerator.device), network)
            accelerator.backward(loss.mean() / len(parts))
        losses.append(loss.detach())
    average_other_gradients(accelerator, state.model)
    norms = [clip_gradient(group["params"], settings.clip) for group in state.optimizer.param_groups]
    return accelerator.gather(torch.cat(losses)), norms  # type: ignore[return-value]
