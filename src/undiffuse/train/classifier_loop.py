"""Training a classifier of noisy items: −log p(label|x_t), at log-SNRs uniform over its range [Dhariwal21 §4]."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.codec import codec_for
from undiffuse.config import TrainConfig
from undiffuse.data import Dataset
from undiffuse.errors import ConfigError, DataError, NonFiniteError
from undiffuse.networks.norm import in_fast_layout
from undiffuse.process.gaussian import diffuse
from undiffuse.randomness import generator
from undiffuse.report.accuracy import accuracy_curve
from undiffuse.train import loop, state
from undiffuse.train.batch import global_batch, shares
from undiffuse.train.classifier import Classifier, ClassifierConfig, save
from undiffuse.train.ema import Average
from undiffuse.train.run import Run, describe
from undiffuse.train.stop import Interrupted, stopping_signals

MEASURED = 2048
"""Held-out items that the accuracy is measured on, at most."""


@dataclass(frozen=True)
class Recipe:
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def fit(
    recipe: Recipe,
    data: Dataset,
    out: str | Path,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Trains on the labels of ``data`` into the run folder ``out``; goes on, to the bit, where it stopped.

    The loss is −log p(label|x_t), nats. ``say`` is told a line at every look. Raises `ConfigError`, `DataError`,
    `CheckpointError`, `NonFiniteError`, and `Interrupted` after a signal, when all is saved.
    """
    settings, run = replace(recipe.train, conditional=True, condition_dropout=0.0), Run(out)
    if data.labels is None or len(data.classes) < 2:
        cause = "a classifier needs items of two classes or more"
        raise DataError("LABELS", data.name, cause, "Give a folder of folders, one a class, or an array with labels")
    if settings.minutes is None and settings.steps is None:
        raise ConfigError("LENGTH", "train.minutes, train.steps", "neither says when to stop", "Give one of them")
    if run.finished:
        return run.folder
    split = data.split(settings.held_out)
    codec = codec_for(data, None if data.levels is not None else data.moments(split.train))
    torch.manual_seed(settings.seed)
    classifier = Classifier(recipe.model, data.item_shape, codec, data.classes, describe(data)).to(device)
    classifier.autocast = loop.precision_of(settings.precision, torch.device(device)) == "bfloat16"
    in_fast_layout(classifier.network)
    optimiser = torch.optim.AdamW(
        classifier.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
    )
    average, smooth = Average(classifier, settings.ema), deepcopy(classifier)
    with run.alone(), stopping_signals() as asked:
        run.open(recipe, data)
        state.tidy(run.checkpoints)
        progress, damaged = state.read_latest(run.checkpoints, classifier, average, optimiser)
        records = run.read_metrics(progress.step)
        for line in damaged:
            say(line)
        loop.plan(progress, settings)
        looked = _share(progress, settings)
        while progress.last_step is None or progress.step < progress.last_step:
            began = time.perf_counter()
            loss = _step(classifier, optimiser, data, split.train, settings, progress, run.folder)
            average.update(classifier, progress.step)
            progress.seconds += time.perf_counter() - began
            loop.plan(progress, settings)
            share = _share(progress, settings)
            due = share < 1 and int(share * settings.previews) > int(looked * settings.previews)
            if asked or due:
                state.write(run.checkpoints, progress, classifier, average, optimiser)
            if asked:
                raise Interrupted(asked[0])
            if due:
                looked = share
                average.copy_to(smooth)
                found = accuracy(smooth, data, split.validation)
                mean = sum(row["accuracy"] for row in found) / len(found)
                records.append({"step": progress.step, "loss": loss, "accuracy": mean})
                run.write_metrics(records)
                say(f"step {progress.step:,}  loss {loss:.3f} nats  held-out accuracy {mean:.3f}, mean over log-SNR")
        average.copy_to(smooth)
        found = accuracy(smooth, data, split.test)
        smooth.info |= {"steps": progress.step, "seed": settings.seed, "accuracy": found}
        save(smooth, run.model)
        try:
            accuracy_curve(found).savefig(run.pictures / "accuracy.png", dpi=150)
        except ConfigError as missing:
            say(f"no picture: {missing.cause}")
        run.finish()
    return run.folder


def _step(
    classifier: Classifier,
    optimiser: torch.optim.Optimizer,
    data: Dataset,
    items: np.ndarray,
    settings: TrainConfig,
    progress: state.Progress,
    folder: Path,
) -> float:
    """One step, a function of (seed, step) and the weights alone; its loss."""
    torch.manual_seed(generator(settings.seed, "dropout", progress.step).initial_seed())
    values, u, eps, _, cond = global_batch(data, items, settings, progress.step)
    classifier.train()
    device, total = next(classifier.parameters()).device, 0.0
    for part in (parts := shares(settings, 1, 0)):
        level, x = classifier.schedule(u[part]), classifier.codec.encode(values[part]).to(device)
        said = classifier(diffuse(x, level, eps[part].to(device)), level)
        loss = F.nll_loss(said, cond.label[part].to(device)) / len(parts)  # type: ignore[union-attr]
        loss.backward()
        total += float(loss.detach())
    norm = float(nn.utils.clip_grad_norm_(classifier.parameters(), settings.clip))
    if not math.isfinite(norm):
        cause = f"the gradient of step {progress.step + 1} is not finite"
        raise NonFiniteError("NON_FINITE", folder, cause, "Lower train.lr; the last checkpoint is good")
    for group in optimiser.param_groups:
        group["lr"] = settings.lr * loop.rate(progress, settings)
    optimiser.step()
    optimiser.zero_grad()
    progress.step += 1
    return total


def _share(progress: state.Progress, settings: TrainConfig) -> float:
    """How much of the run is done, in [0, 1]."""
    by_steps = progress.step / progress.last_step if progress.last_step else 0.0
    by_clock = progress.seconds / (60 * settings.minutes) if settings.minutes else 0.0
    return min(1.0, max(by_steps, by_clock))


@torch.no_grad()
def accuracy(
    classifier: Classifier, data: Dataset, items: np.ndarray, seed: int = 0, levels: int = 9, batch: int = 256
) -> list[dict[str, float]]:
    """For log-SNRs from noise to data: how often the likeliest label is right, its standard error, and log p, nats.

    On at most 2048 of ``items``, with fixed noise. Empty where there are no items.
    """
    assert data.labels is not None
    classifier.eval()
    device, rows = next(classifier.parameters()).device, []
    items = items[np.unique(np.linspace(0, len(items) - 1, min(len(items), MEASURED)).astype(int))]
    for k in range(levels if len(items) else 0):
        level, right, log_p = classifier.schedule(1 - k / (levels - 1)), 0, 0.0
        for part, eps in _noise(classifier, items, seed, k, batch):
            x = classifier.codec.encode(torch.from_numpy(data.values[part])).to(device)
            label = torch.from_numpy(data.labels[part])
            said = classifier(diffuse(x, level, eps.to(device)), level).double().cpu()
            right += int((said.argmax(1) == label).sum())
            log_p += float(said.gather(1, label[:, None]).sum())
        share = right / len(items)
        stderr = math.sqrt(share * (1 - share) / len(items))
        rows.append(
            {
                "log_snr": float(level.log_snr),
                "accuracy": share,
                "stderr": stderr,
                "log_prob": log_p / len(items),
                "items": len(items),
            }
        )
    return rows


def _noise(
    classifier: Classifier, items: np.ndarray, seed: int, k: int, batch: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    g = generator(seed, "accuracy", k)
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        yield part, torch.randn(len(part), *classifier.item_shape, generator=g)
