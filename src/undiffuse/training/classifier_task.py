"""Training a classifier of noisy items: −log p(label|x_t) at log-SNRs uniform over its range [Dhariwal21 §4]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse.data.dataset import Dataset, Split
from undiffuse.errors import ConfigError, DataError, counted
from undiffuse.evaluation.plan import bit_reversed_order
from undiffuse.evaluation.time_limit import TimeLimit
from undiffuse.model import noisy_classifier
from undiffuse.model.config import TrainConfig
from undiffuse.model.noisy_classifier import NoisyClassifier, NoisyClassifierConfig
from undiffuse.process.gaussian import diffuse
from undiffuse.process.seeded_noise import generator
from undiffuse.runtime.precision import autocast_dtype
from undiffuse.training.batches import Batch
from undiffuse.training.fit import fit
from undiffuse.training.run_folder import Run
from undiffuse.training.task import Evaluation, Task
from undiffuse.training.task_parts import data_facts, fitted_transform

MAX_ACCURACY_ITEMS = 2048
"""Held-out items of which the accuracy is measured, at most."""


@dataclass(frozen=True)
class ClassifierRecipe:
    """A whole recipe of a classifier: what it is, and how it is trained."""

    model: NoisyClassifierConfig = field(default_factory=NoisyClassifierConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def fit_classifier(
    config: ClassifierRecipe,
    data: Dataset,
    out: str | Path,
    device: str | torch.device = "auto",
    init: str | Path | None = None,
    quiet: bool = False,
    force: bool = False,
    loggers: Sequence[str] = (),
) -> Path:
    """Train a classifier on the labels of ``data`` into the run folder ``out``, which is returned.

    An unfinished run in ``out`` is resumed. ``loggers`` as of `fit_diffusion`, the rest as in
    `undiffuse.training.fit.fit`.
    """
    return fit(ClassifierTask(config), data, Run(out, loggers), device, init, quiet, force)


@dataclass
class ClassifierTask(Task):
    """Train the recipe ``config``."""

    config: ClassifierRecipe

    def adapt(self, data: Dataset, settings: TrainConfig) -> ClassifierTask:
        if data.labels is None or len(data.classes) < 2:
            cause = "a classifier needs items of two classes or more"
            fix = "Give a folder with a sub-folder for each class, or an array with labels"
            raise DataError("LABELS", data.name, cause, fix)
        if "image" in data.condition_sizes:
            cause = "a classifier gets no image beside the noisy item, and --from gives the rest of one"
            raise ConfigError("CLASSIFIER", data.name, cause, "Leave out --from; --reduce gives the small images")
        return ClassifierTask(replace(self.config, train=replace(settings, conditional=True, condition_dropout=0.0)))

    def build_model(self, data: Dataset, split: Split) -> NoisyClassifier:
        settings = self.config.train
        transform, info = fitted_transform(data, split), data_facts(data, settings)
        model = NoisyClassifier(self.config.model, data.item_shape, transform, data.classes, info)
        model.autocast = autocast_dtype(settings.precision)
        return model

    def loss(self, model: NoisyClassifier, batch: Batch, network: nn.Module) -> Tensor:
        """−log p(label|x_t) of each item, nats, (B,); its log-SNR is ``batch.u`` of the way through the range."""
        assert batch.cond is not None
        assert batch.cond.label is not None
        level, x = model.schedule(batch.u), model.transform.to_model(batch.values).to(batch.device)
        log_p = model(diffuse(x, level, batch.eps), level, network)
        return F.nll_loss(log_p, batch.cond.label, reduction="none")

    def evaluate(
        self, model: NoisyClassifier, data: Dataset, split: Split, final: bool, limit: TimeLimit
    ) -> Evaluation:
        """The mean over log-SNRs of the accuracy for validation items; ``final`` adds that for test items.

        The test accuracy at each log-SNR goes into ``model.info``.
        """
        if len(split.validation) == 0:
            return Evaluation({}, "no held-out items")
        rows = measure_accuracy(model, data, split.validation, limit=limit.share(0.5) if final else limit)
        if not rows:
            return Evaluation({}, "no time for a measurement")
        numbers, details = {"accuracy": _mean_accuracy(rows), "items": rows[0]["items"]}, []
        if final and (test := measure_accuracy(model, data, split.test, limit=limit)):
            model.info["accuracy"] = test
            numbers["final_accuracy"] = _mean_accuracy(test)
            details.append(f"final, on {counted(test[0]['items'], 'test item')}: {numbers['final_accuracy']:.3f}")
        few = (
            ""
            if rows[0]["items"] == min(len(split.validation), MAX_ACCURACY_ITEMS)
            else f", {counted(rows[0]['items'], 'item')}"
        )
        summary = f"held-out accuracy {numbers['accuracy']:.3f}, mean over log-SNR{few}"
        return Evaluation(numbers, summary, details)

    def draw(
        self, model: NoisyClassifier, data: Dataset, split: Split, folder: Path, step: int | None, limit: TimeLimit
    ) -> None:
        """No pictures: the report draws the test accuracy at each log-SNR."""

    def save(self, model: NoisyClassifier, path: Path) -> None:
        noisy_classifier.save(model, path)

    def load(self, path: Path) -> NoisyClassifier:
        return noisy_classifier.load(path)


@torch.no_grad()
def measure_accuracy(
    model: NoisyClassifier,
    data: Dataset,
    items: np.ndarray,
    num_levels: int = 9,
    batch: int = 256,
    limit: TimeLimit | None = None,
) -> list[dict[str, float]]:
    """For log-SNRs from noise to data: the fraction of items whose likeliest label is right, and mean log p, nats.

    Each with the standard error of the accuracy, at most `MAX_ACCURACY_ITEMS` of ``items`` on fixed noise, and only as
    many as ``limit`` permits, spread evenly over them. Empty if that is none.
    """
    labels = data.labels
    assert labels is not None
    model.eval()
    device = next(model.parameters()).device
    limit = limit or TimeLimit()
    fitting = int(min(len(items), MAX_ACCURACY_ITEMS, limit.calls_left / num_levels))
    items = items[np.unique(np.linspace(0, len(items) - 1, fitting).astype(int))]
    if limit.left < math.inf:  # it may end before the last item
        items = items[bit_reversed_order(len(items))]
    noises = [generator(0, "accuracy", k) for k in range(num_levels)]
    correct, log_prob, done = [0] * num_levels, [0.0] * num_levels, 0

    def measure(here: slice) -> None:
        nonlocal correct, log_prob, done, noises  # set at the end: where memory is too small, a part is measured again
        hits, sums, fresh = [*correct], [*log_prob], [noise.clone_state() for noise in noises]
        for start in range(here.start, here.stop, batch):
            part = items[start : min(start + batch, here.stop)]
            values, label = data.tensor(part), torch.from_numpy(labels[part])
            for k, noise in enumerate(fresh):
                level = model.schedule(1 - k / (num_levels - 1))
                eps = torch.randn(len(part), *model.item_shape, generator=noise, dtype=torch.float32)
                x = model.transform.to_model(values).to(device)
                log_p = model(diffuse(x, level, eps.to(device)), level).double().cpu()
                hits[k] += int((log_p.argmax(1) == label).sum())
                sums[k] += float(log_p.gather(1, label[:, None]).sum())
        correct, log_prob, noises, done = hits, sums, fresh, done + here.stop - here.start

    limit.in_parts(measure, len(items), num_levels)
    return [
        {
            "log_snr": float(model.schedule(1 - k / (num_levels - 1)).log_snr),
            "accuracy": correct[k] / done,
            "stderr": math.sqrt(correct[k] / done * (1 - correct[k] / done) / done),
            "log_prob": log_prob[k] / done,
            "items": done,
        }
        for k in range(num_levels if done else 0)
    ]


def _mean_accuracy(rows: list[dict[str, float]]) -> float:
    return sum(row["accuracy"] for row in rows) / len(rows)
