"""Training an autoencoder: reconstruction and KL, see `Autoencoder.loss`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from undiffuse.data.dataset import Dataset, Split
from undiffuse.errors import counted
from undiffuse.evaluation.plan import bit_reversed_order
from undiffuse.evaluation.time_limit import TimeLimit
from undiffuse.model import autoencoder as autoencoders
from undiffuse.model.autoencoder import Autoencoder, AutoencoderConfig
from undiffuse.model.config import TrainConfig
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.process.statistics import item_mean, item_sum
from undiffuse.report.figures import image_grid, image_strip
from undiffuse.runtime.own_output import save_described
from undiffuse.runtime.precision import autocast_dtype
from undiffuse.training.batches import Batch, Reader, values_of
from undiffuse.training.fit import fit
from undiffuse.training.run_folder import Run
from undiffuse.training.task import Evaluation, Task
from undiffuse.training.task_parts import data_facts, fitted_transform, optimizer_groups, picture_path

MEASURED_ITEMS, DRAWN_ITEMS = 256, 8
"""Held-out items that are measured at every evaluation, at most, and those in a picture."""
SCALE_LR_FACTOR = 10.0
"""The learning rate of the scale of p(x given z), relative to that of the network."""


@dataclass(frozen=True)
class AutoencoderRecipe:
    """A whole recipe of an autoencoder: what it is, and how it is trained."""

    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def fit_autoencoder(
    config: AutoencoderRecipe,
    data: Dataset,
    out: str | Path,
    device: str | torch.device = "auto",
    init: str | Path | None = None,
    quiet: bool = False,
    force: bool = False,
    loggers: Sequence[str] = (),
) -> Path:
    """Train an autoencoder on ``data`` into the run folder ``out``, which is returned.

    An unfinished run in ``out`` is resumed. ``loggers`` as of `fit_diffusion`, the rest as in
    `undiffuse.training.fit.fit`.
    """
    return fit(AutoencoderTask(config), data, Run(out, loggers), device, init, quiet, force)


@dataclass
class AutoencoderTask(Task):
    """Train the recipe ``config``."""

    config: AutoencoderRecipe

    def adapt(self, data: Dataset, settings: TrainConfig) -> AutoencoderTask:
        return AutoencoderTask(replace(self.config, train=settings))

    def build_model(self, data: Dataset, split: Split) -> Autoencoder:
        settings = self.config.train
        transform, info = fitted_transform(data, split), data_facts(data, settings)
        model = Autoencoder(self.config.model, data.item_shape, transform, info)
        model.autocast = autocast_dtype(settings.precision)
        return model

    def parameter_groups(self, model: Autoencoder) -> list[dict[str, Any]]:
        """The network, then the scale of p(x given z)."""
        return optimizer_groups(self.config.train, model.network, [model.log_scale], SCALE_LR_FACTOR)

    def reader(self, model: Autoencoder, data: Dataset, split: Split, folder: Path | None) -> Reader:
        """The values of the data, with noise of the shape of z."""
        return values_of(data)._replace(noise_shape=model.latent_shape)

    def loss(self, model: Autoencoder, batch: Batch, network: nn.Module) -> Tensor:
        return model.loss(batch.values, batch.eps, network)

    def evaluate(self, model: Autoencoder, data: Dataset, split: Split, final: bool, limit: TimeLimit) -> Evaluation:
        """Of held-out items: the mean of |x − x̂| in x, −log p(x given z) and the KL to N(0, I) in bits per dimension.

        z ~ q(z given x) from fixed noise; of fewer items where ``limit`` is short. The sum of the last two is the bound
        of the autoencoder alone, with the prior N(0, I). The first is that of x̂ as values of the data: an x̂ far outside
        their range may cost no likelihood, and a picture does not show it.
        """
        items = split.validation[bit_reversed_order(len(split.validation))][:MEASURED_ITEMS]
        if len(items) == 0:
            return Evaluation({}, "no held-out items")
        parts = limit.in_parts(lambda here: self._measure(model, data, items[here], here.start), len(items), 1)
        if not parts:
            return Evaluation({}, "no time for a measurement")
        error, reconstruction, kl = torch.cat(parts).double().mean(0).tolist()
        n = sum(len(part) for part in parts)
        numbers = {"l1": error, "reconstruction": reconstruction, "kl": kl, "items": n}
        of = "" if n == len(items) else f" ({counted(n, 'item')})"
        return Evaluation(
            numbers, f"held out L1 {error:.4f}, reconstruction {reconstruction:.3f} + KL {kl:.3f} bits/dim{of}"
        )

    def draw(
        self, model: Autoencoder, data: Dataset, split: Split, folder: Path, step: int | None, limit: TimeLimit
    ) -> None:
        """Items beside x̂(mean of q), ``reconstructions-STEP.png``, and ``reconstructions.png`` at the end."""
        items = split.shown[bit_reversed_order(len(split.shown))][:DRAWN_ITEMS]

        def reconstruct(here: slice) -> tuple[Tensor, Tensor]:
            values = data.tensor(items[here])
            x = model.transform.to_model(values).to(model.log_scale.device)
            decoded = model.transform.to_data(model.decode(model.encode(x)[0])).cpu()
            return values.to(decoded.dtype), decoded  # torch does not join uint16 with other types

        if not (parts := limit.in_parts(reconstruct, len(items), 1)):
            return
        frames = torch.stack([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
        if frames.ndim >= 4:
            picture = image_strip(frames.numpy(), ["item", "decoded"], data.num_values)
        else:
            picture = image_grid(frames.flatten(0, 1).numpy(), data.num_values, names=data.columns)
        save_described(picture, picture_path(folder, "reconstructions", step), "Items and their reconstructions")

    def save(self, model: Autoencoder, path: Path) -> None:
        autoencoders.save(model, path)

    def load(self, path: Path) -> Autoencoder:
        return autoencoders.load(path)

    def _measure(self, model: Autoencoder, data: Dataset, items: np.ndarray, first: int) -> Tensor:
        """(n, 3): |x − x̂| with x̂ as values of the data, −log p(x given z) and KL, these two in bits per dimension."""
        values = data.tensor(items)
        x = model.transform.to_model(values).to(model.log_scale.device)
        mean, log_var = model.encode(x)
        assert log_var is not None
        q = Gaussian(mean.double(), log_var.double())
        noise = ItemNoise(0, range(first, first + len(items)), model.latent_shape, "posterior", x.device)
        x_hat = model.decode(q.sample(noise(1)[0].double()))
        bits = x[0].numel() * float(np.log(2))
        kl = item_sum(q.kl(Gaussian(torch.zeros_like(q.mean), torch.zeros_like(q.mean)))) / bits
        shown = model.transform.to_model(model.transform.to_data(x_hat))
        return torch.stack([item_mean((x - shown).abs()).double(), -model.log_prob(values, x_hat) / bits, kl], 1).cpu()
