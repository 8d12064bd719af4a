"""The pictures of a run's page: samples, strips between data and noise, solvers side by side, items of the data."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from undiffuse.data.dataset import Dataset, Split
from undiffuse.data.stage_data import StageData
from undiffuse.errors import ConfigError, NonFiniteError, UndiffuseError, counted
from undiffuse.evaluation import process_states
from undiffuse.evaluation.plan import bit_reversed_order, shared_condition
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.text_conditions import class_names
from undiffuse.networks.condition import Condition
from undiffuse.report.comparison_report import neighbours_image
from undiffuse.report.figures import image_grid, image_strip
from undiffuse.report.html import code, join
from undiffuse.report.item_plots import scatter
from undiffuse.report.run_report import Drawing
from undiffuse.report.run_sections import MAX_LISTED
from undiffuse.runtime.own_output import described_picture
from undiffuse.sampling.sampler import Sampler

COLUMNS, ROWS = 9, 4
"""States and items of a strip."""
PLOT_COLUMNS = 4
"""States of a strip of vectors and series, which are plots."""
SOLVER_ITEMS, PLOTTED_VECTORS, PLOTTED_SERIES = 8, 256, 4
"""Samples of each solver side by side, and points in a plot of vectors."""
DATA_ITEMS = 32
TIMED_ITEMS, TIMED_STEPS = 16, 4
"""Samples, and steps of each, by which the speed is measured."""


class Shown(NamedTuple):
    """``items`` of the data that belong to n samples, for their conditions; the condition, and it in words a sample."""

    items: np.ndarray | None
    cond: Condition | None
    words: Sequence[str]


class ModelPictures:
    """Draws the pictures of ``model``, within ``max_calls`` network calls for single items; ``command`` adds the rest.

    ``data`` and ``split`` are those of the run, if they are there. ``minutes_per_call``: minutes of ``--minutes``
    of the command for one call; 0 if that is not known.
    """

    def __init__(
        self,
        model: Diffusion,
        data: Dataset | None,
        split: Split | None,
        max_calls: float,
        command: str,
        minutes_per_call: float = 0.0,
    ) -> None:
        self.model, self.data, self.split, self.command = model, data, split, command
        self.left, self.needed, self.minutes_per_call = max_calls, 0, minutes_per_call
        self.dims = len(model.item_shape)
        self.num_values = model.info.get("num_values")

    def forward(self) -> Drawing:
        """Held-out items on their way to noise."""
        caption = "The forward process is not drawn"
        if self.data is None or self.split is None:
            return Drawing(caption=caption, reason="it needs the data of the run", command=self.command)
        items = self.split.shown[: self._strip_items]
        values = self.data.tensor(items)
        try:
            levels, frames = process_states.forward_states(self.model, values, self._columns)
            words = f"Forward process, from data to noise: {self._rows(len(items), self._noun)}"
            return self._strip(frames, levels, words, items)
        except UndiffuseError as error:
            return Drawing(caption=caption, reason=error.cause)

    def reverse(self) -> Drawing:
        """Samples on their way from noise."""
        caption, n = "The reverse process is not drawn", self._strip_items
        sampler = self.model.default_sampler
        steps = self.model.num_steps(sampler)
        if (undrawn := self.undrawn(caption, n * steps * self.model.build_solver(sampler).calls)) is not None:
            return undrawn
        shown = self.condition(n)
        try:
            levels, frames = process_states.reverse_states(self.model, range(n), self._columns, shown.cond)
            words = f"Reverse process, from noise to {self._rows(n, 'sample')}, by {sampler} in "
            words += f"{counted(steps, 'step')}, seed 0"
            return self._strip(frames, levels, words, shown.items)
        except UndiffuseError as error:
            return Drawing(caption=caption, reason=error.cause)

    def solvers(self) -> Drawing:
        """The same noise by several solvers, or by several numbers of calls of a distilled model."""
        caption = "Solvers are not shown side by side"
        n = PLOTTED_VECTORS if self.dims == 1 else PLOTTED_SERIES if self.dims == 2 else SOLVER_ITEMS
        samplers = process_states.compared_samplers(self.model)
        if (undrawn := self.undrawn(caption, n * sum(calls for *_, calls in samplers))) is not None:
            return undrawn
        shown = self.condition(n)
        images, titles, alts = [], [], []
        for name, sampler, calls in samplers:
            try:
                values = self.model.sample(n, seed=0, sampler=sampler, cond=shown.cond, batch=n).numpy()
                image = self._image(values, min(n, 4 if self.dims == 4 else 8), shown.items)
            except (ConfigError, NonFiniteError):
                continue
            steps = self.model.num_steps(sampler)
            title = join(code(name), f", {counted(steps, 'step')}, {counted(calls, 'network call')}")
            images, titles = [*images, image], [*titles, title]
            alts.append(f"{counted(n, 'sample')} by {name} in {counted(steps, 'step')}")
        if not images:
            return Drawing(caption=caption, reason="no solver drew finite samples of this model")
        words = (
            "The same noise (seed 0) in the same place of each picture. Solvers of the probability flow approach one "
        )
        words += "image as their error falls; one that draws noise in its steps ends at others."
        if self.model.config.few_call_solver:
            words = "The same noise (seed 0) in the same place of each picture, with more and more network calls."
        words += self._columns_shown + _given(shown.words)
        return Drawing(images, alts, words, titles, plot=self.dims <= 2)

    def undrawn(self, caption: str, calls: int) -> Drawing | None:
        """Why a picture of so many network ``calls`` is not drawn; None if it can be, and then they are used."""
        if "image" in self.model.condition_sizes and self.data is None:
            reason = "the model enlarges images, which are in the data of the run"
            return Drawing(caption=caption, reason=reason, command=self.command)
        self.needed += calls
        if calls <= self.left:
            self.left -= calls
            return None
        reason, command = f"{calls:,} network calls do not fit into the time", self.command
        if self.minutes_per_call:  # with half as much again, because the speed varies
            command += f" --minutes {math.ceil(1.5 * self.needed * self.minutes_per_call)}"
        return Drawing(caption=caption, reason=reason, command=command)

    def _strip(self, frames: np.ndarray, levels: Sequence[Any], words: str, items: np.ndarray | None) -> Drawing:
        """``frames`` (T, n, *item_shape) with their log-SNR: a row for each item, or T plots of vectors."""
        alt, titles, num_values = words.partition(":")[0], _log_snrs(levels), self.num_values
        if self.dims == 1:
            images = [self._image(frame, 1, None) for frame in frames]
            titles = [f"log-SNR {title}" for title in titles]
            return Drawing(
                images,
                [alt] * len(images),
                f"{words}; the titles have the log-SNR.{self._columns_shown}",
                titles,
                plot=True,
            )
        if isinstance(self.data, StageData) and items is not None:
            whole, num_values = self.data.full_values(np.concatenate(frames), np.tile(items, len(frames)))
            frames = whole.reshape(*frames.shape[:2], *whole.shape[1:])
        image = image_strip(frames, titles, num_values, names=self.model.info.get("columns", ()))
        return Drawing([image], [alt], f"{words}; each column has its log-SNR.", plot=self.dims == 2)

    def _image(self, values: np.ndarray, columns: int, items: np.ndarray | None) -> Image.Image:
        """``values`` (n, *item_shape) in rows of ``columns``; those of a stage of a cascade as whole images.

        Of vectors the first two columns are plotted.
        """
        num_values, names = self.num_values, self.model.info.get("columns", ())
        if values.ndim == 2 and values.shape[1] > 1:
            return scatter(values[:, :2], names[:2] or ("column 0", "column 1"))
        if isinstance(self.data, StageData) and items is not None:
            values, num_values = self.data.full_values(values, items[: len(values)])
        return image_grid(values, num_values, columns=columns if values.ndim > 2 else None, names=names)

    def condition(self, n: int) -> Shown:
        """The conditions of ``n`` samples: each label in turn, or those of held-out items."""
        sizes, data, split = self.model.condition_sizes, self.data, self.split
        if sizes.keys() == {"classes"} and self.model.trained_condition_sizes:
            names, label = class_names(self.model), torch.arange(n) % sizes["classes"]
            return Shown(None, Condition(label=label), [names[i] for i in label.tolist() if i < len(names)])
        if not sizes or data is None or split is None:
            return Shown(None, None, ())
        items = self._held_out(n)
        cond = data.given_condition(items, shared_condition(self.model, data)[0] != "none")
        captions = [data.captions[i][0] for i in items] if data.captions and cond is not None else ()
        return Shown(items, cond, captions)

    def _held_out(self, n: int) -> np.ndarray:
        """``n`` held-out items, in turn if there are fewer; without any, training items."""
        assert self.split is not None
        return np.resize(self.split.shown, n)

    @property
    def _noun(self) -> str:
        """The items of `Split.shown` in words."""
        assert self.split is not None
        if not self.model.info.get("fingerprint"):
            return "item"
        return "held-out item" if len(self.split.validation) else "training item"

    @property
    def _columns_shown(self) -> str:
        return " The first two columns." if self.dims == 1 and self.model.item_shape[0] > 2 else ""

    @property
    def _strip_items(self) -> int:
        return PLOTTED_VECTORS if self.dims == 1 else 2 if self.dims == 2 else ROWS

    @property
    def _columns(self) -> int:
        return PLOT_COLUMNS if self.dims <= 2 else 5 if self.dims == 4 else COLUMNS

    def _rows(self, n: int, noun: str) -> str:
        return counted(n, noun) + (", a row each" if self.dims > 1 else "")


def sampling_speed(model: Diffusion, data: Dataset | None, split: Split | None) -> float:
    """Network calls for single items per second, measured by a few samples; 0 where none can be drawn."""
    pictures = ModelPictures(model, data, split, math.inf, "")
    if pictures.undrawn("", 0) is not None:
        return 0.0
    cond, seconds = pictures.condition(TIMED_ITEMS).cond, 0.0
    sampler = Sampler(num_steps=min(TIMED_STEPS, model.chain_length))
    for _ in range(2):  # the first one may be slow
        began = time.perf_counter()
        model.sample(TIMED_ITEMS, seed=0, sampler=sampler, cond=cond)
        seconds = time.perf_counter() - began
    return TIMED_ITEMS * min(TIMED_STEPS, model.chain_length) / max(seconds, 1e-9)


def stored_picture(paths: Sequence[Path], caption: str, plot: bool = False) -> Drawing | None:
    """The first of ``paths`` that is a picture, captioned by its own description or else by ``caption``."""
    for path in paths:
        if (found := described_picture(path)) is not None:
            image, description = found
            words = f"{description or caption}."
            return Drawing([image], [words], words, plot=plot)
    return None


def sample_folder_picture(array: Path, model: Diffusion, words: str) -> Drawing | None:
    """The first samples of a finished folder of `sample`; None where they cannot be read."""
    try:
        values = _stored_samples(array)
    except (OSError, ValueError, LookupError):
        return None
    if values.shape[1:] != model.item_shape:
        return None
    shown = values if values.ndim == 2 else values[: min(len(values), 64)]
    dims, columns = len(model.item_shape), None
    shown = shown[:8] if dims == 2 else shown[:16] if dims == 4 else shown
    try:
        image = image_grid(shown, model.info.get("num_values"), columns, names=model.info.get("columns", ()))
    except UndiffuseError:
        return None
    caption = f"{counted(len(shown), 'sample')} of {len(values):,}, {words}."
    return Drawing([image], [caption], caption, plot=dims <= 2)


def nearest_picture(rows: Sequence[Mapping[str, Any]], array: Path, data: Dataset | None) -> Drawing:
    """The samples of a comparison's ``rows``, read from ``array``, each beside its nearest training items."""
    caption = "The nearest training items are not drawn"
    if data is None:
        return Drawing(caption=caption, reason="it needs the data of the run")
    if len(data.item_shape) < 2:
        return Drawing(caption=caption, reason="they are no pictures, and the table has their numbers")
    try:
        values = _stored_samples(array)
        image = neighbours_image(rows, values, data)
    except (OSError, ValueError, LookupError, UndiffuseError):
        return Drawing(caption=caption, reason="the samples that were compared are not there any more")
    words = "The samples that are nearest to training items, a row each, beside their nearest training items."
    return Drawing([image], [words], words, plot=len(data.item_shape) == 2)


def _stored_samples(array: Path) -> np.ndarray:
    with np.load(array, allow_pickle=False) as file:
        return file["x"]


def data_picture(data: Dataset, split: Split) -> Drawing:
    """Training items, spread evenly over the training part."""
    dims = len(data.item_shape)
    n = 1000 if dims == 1 else 4 if dims == 2 else 8 if dims == 4 else DATA_ITEMS
    items = np.sort(split.train[bit_reversed_order(len(split.train))][:n])
    values, num_values = np.asarray(data.values[items]), data.num_values
    if isinstance(data, StageData):
        values, num_values = data.full_values(values, items)
    caption = f"{counted(len(items), 'training item')}, spread evenly over the training part."
    try:
        columns = None if dims != 3 or len(items) < 16 else 16 if len(items) % 16 == 0 else None
        image = image_grid(values, num_values, columns, names=data.columns)
    except UndiffuseError as error:
        return Drawing(caption="Training items are not shown", reason=error.cause)
    if data.captions:
        caption += _given([data.captions[i][0] for i in items])
    return Drawing([image], [caption], caption, plot=dims <= 2)


def _log_snrs(levels: Sequence[Any]) -> list[str]:
    """The log-SNRs of ``levels`` in words."""
    numbers = [f"{float(level.log_snr):.1f}" for level in levels]
    return [number.replace("inf", "∞").replace("-", "−") for number in numbers]


def _given(words: Sequence[str]) -> str:
    """The conditions of samples, in their order; nothing without any."""
    names = list(dict.fromkeys(words))
    if not names:
        return ""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f" Conditions, in turn: {', '.join(names[:MAX_LISTED])}{more}."
