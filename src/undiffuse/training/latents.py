"""Batches of latent diffusion: q(z given x) of every training item, computed once, and a fresh z at each use."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.data.dataset import Dataset
from undiffuse.data.lazy_array import LazyArray, npy_rows
from undiffuse.data.source_report import FileStamp
from undiffuse.data.transform import IntegerLevels, MinMax, Standardized
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation.plan import describe_items
from undiffuse.model import autoencoder as autoencoders
from undiffuse.model.config import TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform
from undiffuse.process.seeded_noise import generator
from undiffuse.runtime.atomic_file import atomic_file, file_digest, json_digest
from undiffuse.runtime.file_headers import npy_header, read_npy_header
from undiffuse.runtime.side_files import read_record, write_record
from undiffuse.training.augmentation import FLIPS, mirrored
from undiffuse.training.batches import Batch, Reader, values_of

FOLDER, POSTERIORS, RECORD, AUTOENCODER = "latents", "posteriors.npy", "latents.json", "autoencoder.safetensors"
"""In the folder of a run: means and log-variances, what they are, and the autoencoder as it was given."""
ENCODE_BATCH = 64
"""Items that are encoded together: a constant, because rounding depends on it."""
SCALE_ITEMS = 512
"""Training items that the scale of an imported autoencoder is fitted to, at most."""


def batch_x(model: Diffusion, batch: Batch) -> Tensor:
    """x of a ``batch``: the latents that it holds, or its values in the units of the model."""
    if isinstance(model.transform, LatentTransform):
        return batch.values
    return model.transform.to_model(batch.values, model.dtype)


def stored_autoencoder(folder: Path) -> autoencoders.Autoencoder | None:
    """The autoencoder that the run in ``folder`` began with, as it was given; None if there is none.

    Raises `CheckpointError` if its file is damaged.
    """
    path = folder / FOLDER / AUTOENCODER
    return autoencoders.load(path) if path.is_file() else None


def fitted(autoencoder: autoencoders.Autoencoder, data: Dataset, items: np.ndarray) -> autoencoders.Autoencoder:
    """``autoencoder``, or its copy with a scale of p(x given z) fitted to the training ``items`` if it has none.

    An imported one then also standardizes continuous data, by the moments of the ``items``.
    """
    channels = autoencoder.item_shape[0]
    moments = Standardized((0.0,) * channels, (1.0,) * channels)  # of an imported one, until it is fitted
    is_open = "imported" in autoencoder.info and autoencoder.transform == moments
    if autoencoder.config.distribution != "none" and not is_open:
        return autoencoder
    if is_open:
        autoencoder = deepcopy(autoencoder)
        autoencoder.transform = Standardized(*data.moments(items))
    chosen = items[np.linspace(0, len(items) - 1, min(len(items), SCALE_ITEMS)).round().astype(int)]
    return autoencoder.with_fitted_scale(data.tensor(chosen))


def check_data(autoencoder: autoencoders.Autoencoder, data: Dataset, settings: TrainConfig) -> None:
    """Raise `DataError` for data of another kind than the autoencoder's, `ConfigError` for augmentation by moving."""
    values = autoencoder.transform
    num_values = values.num_values if isinstance(values, IntegerLevels) else None
    if (data.item_shape, data.num_values) != (autoencoder.item_shape, num_values):
        theirs = describe_items(data.item_shape, data.num_values)
        ours = describe_items(autoencoder.item_shape, num_values)
        cause = f"the items are {theirs}, those of the autoencoder {ours}"
        raise DataError("SHAPE", data.name, cause, "Give an autoencoder of such items, or prepare the data")
    limits = (values.low, values.high) if isinstance(values, MinMax) else None
    if num_values is None and data.value_range != limits:
        theirs, ours = ("the range {:g} to {:g}".format(*r) if r else "no range" for r in (data.value_range, limits))
        cause = f"these data have {theirs} of values, and those of the autoencoder {ours}"
        raise DataError("RANGE", data.name, cause, "Give the same --value-range to train-autoencoder and train")
    if "image" in data.condition_sizes:
        cause = "a stage of a cascade is conditioned on pixels and models pixels"
        raise ConfigError("AUTOENCODER", data.name, cause, "Leave out --from, or --autoencoder")
    if settings.crop:
        cause = "items are encoded once, so they can be mirrored but not moved"
        raise ConfigError("CROP", f"train.crop = {settings.crop}", cause, "Give 0 with an autoencoder")


def reader_of(
    model: Diffusion,
    autoencoder: autoencoders.Autoencoder | None,
    data: Dataset,
    items: np.ndarray,
    settings: TrainConfig,
    folder: Path | None,
) -> Reader:
    """`Task.reader` of a diffusion model of values, or of latents of the training ``items``.

    ``autoencoder`` is what the latents' folder stores, by default that of the model.
    """
    transform = model.transform
    if not isinstance(transform, LatentTransform):
        return values_of(data)
    if folder is None:
        return trial_reader(transform, data, settings, model.device)
    return packed_reader(transform, autoencoder or transform.autoencoder, data, items, settings, folder, model.device)


def posteriors(transform: LatentTransform, values: Tensor, settings: TrainConfig, device: Any) -> np.ndarray:
    """(n, copies, 2, *x_shape) float32: mean and log-variance of q of ``values`` (n, ...) and of their mirror images.

    The copies are all combinations of the mirror images that ``settings`` have, the first without any. Log-variances
    of a deterministic encoder are −inf.
    """
    copies = []
    values = values.to(torch.int32) if values.dtype == torch.uint16 else values  # torch does not flip uint16
    for axes in _mirror_axes(settings):
        mean, log_var = transform.posterior(values.flip(axes) if axes else values, device)
        log_var = torch.full_like(mean, -math.inf) if log_var is None else log_var
        copies.append(torch.stack([mean, log_var], 1).float().cpu())
    return torch.stack(copies, 1).numpy()


def _mirror_axes(settings: TrainConfig) -> list[tuple[int, ...]]:
    axes = [axis for name, axis in FLIPS.items() if getattr(settings, name)]
    return [tuple(itertools.compress(axes, on)) for on in itertools.product((0, 1), repeat=len(axes))]


def latent_reader(transform: LatentTransform, rows: Callable[[np.ndarray], np.ndarray]) -> Reader:
    """x = (z − mean)/std with z ~ q(z given x) from the noise of (seed, step), (B, *x_shape) float32.

    ``rows`` gives the `posteriors` of items by their index in the data. Which mirror image is taken is what
    `augment` would choose for the items themselves.
    """

    def read(items: np.ndarray, settings: TrainConfig, step: int) -> np.ndarray:
        table, copy = rows(items), np.zeros(len(items), np.int64)
        for name in FLIPS:
            if getattr(settings, name):
                copy = 2 * copy + mirrored(name, settings, step, len(items))
        mean, log_var = (torch.from_numpy(part) for part in np.moveaxis(table[np.arange(len(items)), copy], 1, 0))
        noise = torch.randn(mean.shape, generator=generator(settings.seed, "latent", step), dtype=torch.float32)
        z = mean + torch.exp(0.5 * log_var) * noise
        shift, scale = transform.moments(z)
        return ((z - shift) / scale).numpy()

    return Reader(read)


def trial_reader(transform: LatentTransform, data: Dataset, settings: TrainConfig, device: Any) -> Reader:
    """A reader that encodes the items of each batch, for a trial before anything is packed."""

    def rows(items: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return posteriors(transform, data.tensor(items), settings, device)

    return latent_reader(transform, rows)


@torch.no_grad()
def packed_reader(
    transform: LatentTransform,
    autoencoder: autoencoders.Autoencoder,
    data: Dataset,
    items: np.ndarray,
    settings: TrainConfig,
    folder: Path,
    device: Any,
) -> Reader:
    """The reader of `posteriors` of the training ``items``, packed in ``folder`` unless they are there already.

    Sets the moments of ``transform`` if it has none: the mean and the standard deviation of each channel of
    z ~ q(z given x) over the items and their mirror images. ``autoencoder`` is stored too, as it was given.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    key = json_digest(
        {
            "autoencoder": autoencoders.fingerprint(autoencoder),  # q does not depend on the fitted scale
            "data": data.fingerprint,
            "items": len(items),
            "held_out": settings.held_out,
            "mirrors": [name for name in FLIPS if getattr(settings, name)],
        }
    )
    record, path = read_record(place / RECORD) or {}, place / POSTERIORS
    if not path.is_file() or record.get("key") != key or record.get("digest") != file_digest(path):
        autoencoders.save(autoencoder, place / AUTOENCODER)
        _write_posteriors(path, transform, data, items, settings, device)
        mean, std = _moments(_open(path))
        record = {"key": key, "digest": file_digest(path), "mean": mean, "std": std}
        write_record(place / RECORD, record)
    if not transform.has_moments:
        transform.standardize(tuple(record["mean"]), tuple(record["std"]))
    table = _open(path)
    return latent_reader(transform, lambda chosen: table[np.searchsorted(items, chosen)])


def _write_posteriors(
    path: Path, transform: LatentTransform, data: Dataset, items: np.ndarray, settings: TrainConfig, device: Any
) -> None:
    shape = (len(items), len(_mirror_axes(settings)), 2, *transform.x_shape)
    with atomic_file(path, 4 * math.prod(shape)) as file:
        file.write(npy_header(shape, np.dtype("<f4")))
        for start in range(0, len(items), ENCODE_BATCH):
            values = data.tensor(items[start : start + ENCODE_BATCH])
            file.write(posteriors(transform, values, settings, device).astype("<f4").tobytes())


def _open(path: Path) -> LazyArray:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        header = read_npy_header(file, status.st_size)
    return npy_rows(path, header, FileStamp.of(status))


def _moments(table: LazyArray) -> tuple[list[float], list[float]]:
    """(mean, std) of each channel of z over all rows, float64: var z = mean of (mean_q − mean)² + var_q."""

    def average(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        total, count = np.zeros(table.shape[3]), 0
        for mean, var in _chunks(table):
            terms = function(mean, var)
            total += terms.sum((0, 1, *range(3, terms.ndim)))
            count += terms[:, :, 0].size
        return total / count

    def column(numbers: np.ndarray) -> np.ndarray:
        return numbers.reshape(-1, *[1] * (len(table.shape) - 4))

    mean = average(lambda m, var: m)
    std = np.sqrt(average(lambda m, var: (m - column(mean)) ** 2 + var))
    return mean.tolist(), np.where(std > 0, std, 1.0).tolist()


def _chunks(table: LazyArray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(table), 1024):
        rows = table[start : start + 1024].astype(np.float64)
        yield rows[:, :, 0], np.exp(rows[:, :, 1])
