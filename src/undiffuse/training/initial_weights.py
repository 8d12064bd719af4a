"""Fine-tuning: a run that starts from the weights of another diffusion model, and at its loss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from undiffuse.data.dataset import Dataset
from undiffuse.data.transform import DataTransform, IntegerLevels, MinMax, Standardized, is_latent, transform_for
from undiffuse.errors import CheckpointError, ConfigError, DataError, counted
from undiffuse.model import autoencoder as autoencoders
from undiffuse.model.autoencoder import Autoencoder
from undiffuse.model.checkpoint import load
from undiffuse.model.config import Config, TrainConfig, from_dict
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform
from undiffuse.model.text_conditions import encoder_identity, text_encoder_of
from undiffuse.networks.condition import CONDITION_SETTINGS
from undiffuse.networks.protocol import adapt_weights, zero_new_ends
from undiffuse.networks.registry import with_defaults
from undiffuse.process.gaussian import diffuse
from undiffuse.runtime.tensor_file import model_path, read_metadata
from undiffuse.training.run_folder import InitialWeights, Run

SAME_PROCESS = ("schedule", "target", "preconditioning", "output", "autoencoder")
"""Settings of a model that say what its network gets and what its output is."""
FREE_SETTINGS = (*CONDITION_SETTINGS, "dropout")
"""Settings of a network that may differ from those of the weights."""
TAKE_AUTOENCODER = "Leave out --autoencoder to use that of the model if it has one, or train without --init"
TAKE_SETTINGS = (
    "Leave out --preset and this setting of --config, to use the value of the model, or train without --init"
)
MAX_DIFFERENCE = 1e-4
"""The largest difference of two predictions, in units of x, that is rounding."""


def find_initial_weights(run: Run, init: str | Path | None) -> tuple[InitialWeights | None, str | None]:
    """(what the run starts from, the fingerprint of the weights that ``init`` names); None where there is none.

    A run that has begun with weights starts from ``init`` if it names these, else from its copy, whether ``init`` is
    still there or not. Raises `CheckpointError` if the copy is missing or damaged too.
    """
    given, record = None if init is None else _read(Path(init)), run.record
    fingerprint = given and given.fingerprint
    recorded = None if record is None else record.get("init")
    if recorded is None:
        begun_without = record is not None and fingerprint is not None  # a file that is no model is reported
        return None if begun_without else given, fingerprint
    for candidate in (given, _read(run.initial)):
        if candidate is not None and candidate.fingerprint == recorded:
            return candidate, fingerprint
    cause = f"the weights {recorded[:12]} that this run started from are missing or damaged"
    raise CheckpointError("INIT", run.initial, cause, "Name them with --init, or train into another folder")


def _read(path: Path) -> InitialWeights:
    path = model_path(path)
    try:
        return InitialWeights(path, read_metadata(path).get("sha256"))
    except CheckpointError:
        return InitialWeights(path, None)  # loading it says what is wrong


def recipe_of(
    init: Path,
    data: Dataset,
    train: TrainConfig,
    conditional: bool = False,
    network: nn.Module | type[nn.Module] | None = None,
    run: Run | None = None,
) -> Config:
    """The recipe of fine-tuning the model of ``init``, a run or a file, on ``data``: its settings and its training's.

    ``train`` is taken where there is no record of its training. Precision and held-out share are always those of
    ``train``, because the record has values for another machine and other data. Neither length nor seed are taken. What
    was conditional stays so if the data have such conditions; all of theirs are used if ``conditional``. If the model
    is no longer there, the settings are those that ``run`` began with. Raises `CheckpointError`.
    """
    init = Path(init)
    try:
        model = load(init, network=network)
    except CheckpointError:
        if run is None or (record := run.record) is None:
            raise
        begun = from_dict(Config, record["config"], "run.json")
        return replace(begun, train=replace(begun.train, max_steps=None, minutes=None, seed=0))
    try:
        settings: Any = ((Run(init).record if init.is_dir() else None) or {})["config"]["train"]
        old = from_dict(TrainConfig, settings, "run.json")
        old = replace(old, precision=train.precision, held_out=train.held_out)
    except CheckpointError as error:
        fix = f"Name the file of the model, {model_path(init)}, to take its weights without its training settings"
        raise CheckpointError("RUN", init / "run.json", "not the record of a run, or damaged", fix) from error
    except (KeyError, ConfigError):  # a file, or a run of another kind
        old = replace(train, conditional=bool(model.trained_condition_sizes))
    shared = model.condition_sizes.keys() & data.condition_sizes.keys()
    conditional = conditional or (old.conditional and bool(shared - {"image"}))
    return Config(model.config, replace(old, max_steps=None, minutes=None, seed=0, conditional=conditional))


def check_not_distilled(start: Diffusion, path: Path) -> None:
    """Raise `ConfigError` for a distilled model."""
    if start.config.calls:
        cause = "it is a distilled model, whose predictions are samples of the data and not their mean"
        if start.config.few_call_solver == "flow_map":
            cause = "it is a flow map between two times, and fine-tuning trains a model of one time"
        raise ConfigError("DISTILLED", path, cause, "Give the model that it was distilled from")


def check_start(config: Config, data: Dataset, start: Diffusion, path: Path) -> None:
    """Raise an error unless a model of ``config`` and of ``data`` means by its network what ``start`` does.

    `ConfigError` for settings, `DataError` for data without the images that ``start`` enlarges, or with another text
    encoder.
    """
    names = [*SAME_PROCESS, *(["chain_length"] if start.config.preconditioning.get("time") == "step" else [])]
    if "learned" in {config.model.variance, start.config.variance}:
        names.append("variance")
    pairs = [(f"model.{name}", getattr(config.model, name), getattr(start.config, name)) for name in names]
    ours, theirs = (with_defaults(model.network["kind"], model.network) for model in (config.model, start.config))
    for name in dict.fromkeys(["kind", *ours, *theirs]):
        if name not in FREE_SETTINGS:
            pairs.append((f"model.network.{name}", ours.get(name), theirs.get(name)))
    for name, own, other in pairs:
        own, other = (json.dumps(value, sort_keys=True) for value in (own, other))
        if own != other:
            cause = f"the weights of {path} belong to a model with {other}"
            fix = TAKE_AUTOENCODER if name == "model.autoencoder" else TAKE_SETTINGS
            raise ConfigError("INIT", f"{name} = {own}"[:200], cause[:300], fix)
    if "image" in start.condition_sizes and "image" not in data.condition_sizes:
        cause = f"{path} enlarges images, and these data have no smaller ones"
        raise DataError("INIT", data.name, cause, "Give --from as for that model")
    if config.train.conditional:
        check_text_encoder(start, data, path)


def check_text_encoder(model: Diffusion, data: Dataset, name: str | Path) -> None:
    """Raise `DataError` if ``data`` and ``model``, called ``name``, share embeddings that are of two text encoders."""
    encoders = text_encoder_of(model), data.text_encoder
    embedded = any(encoder is not None and "digest" in encoder for encoder in encoders)
    shared = {"vector", "tokens"} & model.condition_sizes.keys() & data.condition_sizes.keys()
    if embedded and shared and len({*map(encoder_identity, encoders)}) > 1:
        ours, theirs = (encoder["name"] if encoder else "none" for encoder in reversed(encoders))
        cause = f"the text encoder of these data is {ours}, and that of {name} is {theirs} or another version"
        raise DataError("TEXT_ENCODER", data.name, cause, "Give --text-encoder as for that model")


def without_sizes_of(config: Config, start: Diffusion, data: Dataset) -> Config:
    """``config`` without the sizes of conditions from ``start`` that a conditional recipe takes from ``data``."""
    sizes, old, network = data.condition_sizes, start.config.network, dict(config.model.network)
    for name, size in sizes.items():
        is_taken = config.train.conditional or name == "image"
        is_of_start = name in network and network[name] == old.get(name)
        if is_taken and is_of_start and not (name == "text" and network[name] >= size):
            del network[name]
    return replace(config, model=replace(config.model, network=network))


def autoencoder_fingerprint(autoencoder: Autoencoder, start: Diffusion | None) -> str:
    """The fingerprint of ``autoencoder``; if it is that of ``start``, the one that ``start`` has of it.

    They differ where the scale of its decoder was fitted to the data of ``start``.
    """
    given = autoencoders.fingerprint(autoencoder)
    transform = None if start is None else start.transform
    if start is None or not isinstance(transform, LatentTransform):
        return given
    return start.config.autoencoder if given == autoencoders.fingerprint(transform.autoencoder) else given


def initial_transform(data: Dataset, start: Diffusion, path: Path) -> DataTransform:
    """The data transform of a run that starts from ``start``: that of ``start``, so that it starts at its loss.

    Integers of another number of values are mapped to [−1, 1] as before, if the network's output does not depend on
    them. Raises `DataError` for data that the transform does not map.
    """
    old, fix = start.transform, "Train without --init"
    if is_latent(old):
        return old
    new = transform_for(data, ((0.0,), (1.0,)))
    is_integer = [isinstance(transform, IntegerLevels) for transform in (old, new)]
    if is_integer[0] != is_integer[1]:
        ours, theirs = ("integers" if integer else "continuous values" for integer in reversed(is_integer))
        raise DataError("INIT", data.name, f"these are {ours}, and {path} models {theirs}", fix)
    if is_integer[0]:
        if new != old and start.config.output == "categorical":
            cause = f"{path} predicts each of {_values(old)}, and these data have {_values(new)}"
            raise DataError("INIT", data.name, cause, fix)
        return new
    if isinstance(old, MinMax) and new != old:
        cause = f"{path} models values from {old.low:g} to {old.high:g}, and these data have another range or none"
        raise DataError("INIT", data.name, cause, fix)
    return old


def _values(transform: DataTransform) -> str:
    assert isinstance(transform, IntegerLevels)
    return counted(transform.num_values, "value")


def label_rows(start: Diffusion, classes: Sequence[str]) -> list[int] | None:
    """For each of the ``classes`` its number in ``start``, −1 for a new one; None where they are the same."""
    size = start.condition_sizes.get("classes", 0)
    known = list(start.info.get("classes", []))[:size]
    if list(classes) == known or (not known and len(classes) == size):
        return None
    return [known.index(name) if name in known else -1 for name in classes]


def load_initial_weights(model: Diffusion, start: Diffusion, path: Path) -> list[str]:
    """Write the weights of ``start`` into ``model``; return notes: what was loaded, what is new, what was left out.

    What is new has no effect at first, if the network declares how (`undiffuse.networks.protocol`). Raises
    `CheckpointError` for a tensor of another shape.
    """
    own, given = model.state_dict(), start.state_dict()
    classes = model.info.get("classes", [])  # of the data; they are no conditions if the sizes differ
    rows = label_rows(start, classes) if model.condition_sizes.get("classes") == len(classes) else None
    adapted = adapt_weights(model, given, rows)
    for name in own:
        if name in adapted and own[name].shape != adapted[name].shape:
            shapes = f"{tuple(adapted[name].shape)} in {path}, and this run needs {tuple(own[name].shape)}"
            fix = "Give data of the same kind and its conditions in the same sizes, or train without --init"
            raise CheckpointError("TENSOR", path, f"the shape of the tensor {_short(name)!r} is {shapes}", fix)
    new, unused = sorted(own.keys() - adapted.keys()), sorted(adapted.keys() - own.keys())
    zero_new_ends(model, new)
    model.load_state_dict({name: tensor for name, tensor in adapted.items() if name in own}, strict=False)
    loaded = len(adapted) - len(unused)
    parts = [f"{counted(loaded, 'tensor')} loaded", f"new: {_list(new)}", f"left out: {_list(unused)}"]
    if rows is not None and "classes" in start.condition_sizes:
        known = sum(row >= 0 for row in rows)
        parts.append(f"{known} of {counted(len(rows), 'class')} known by name, the others start as no class")
    if model.transform != start.transform and not is_latent(start.transform):
        parts.append(f"{_values(model.transform)} in place of {_values(start.transform)}, both mapped to -1 to 1")
    elif isinstance(start.transform, Standardized) or is_latent(start.transform):
        parts.append("x is standardized by the moments of that model's data")
    notes = [f"starts from {path}: {'; '.join(parts)}"]
    if new or unused:
        notes += _difference(model, start)
    return notes


@torch.no_grad()
def _difference(model: Diffusion, start: Diffusion) -> list[str]:
    """A note if the two models, without a condition, predict x̂ differently from the same x_t."""
    training, level = model.training, model.chain[len(model.chain) // 2]
    generator = torch.Generator().manual_seed(0)
    x, eps = (torch.randn(2, *model.x_shape, generator=generator).to(model.device, model.dtype) for _ in range(2))
    x_t = diffuse(x, level, eps)
    autocast, model.autocast = model.autocast, None
    one, other = (m.eval().to(model.device).denoiser()(x_t, level, None).x for m in (model, start))
    model.train(training)
    model.autocast = autocast
    start.to("cpu")
    if float((one - other).abs().max()) <= MAX_DIFFERENCE:
        return []
    rms = float((one - other).square().mean().sqrt())
    return [f"without a condition its first predictions differ from that model's, by {rms:.3g} (rms in x)"]


def _short(name: str) -> str:
    while name.startswith("network."):
        name = name.removeprefix("network.")
    return name


def _list(names: Sequence[str]) -> str:
    """The modules of the tensors ``names``, each with the number of its tensors."""
    parts = [_short(name).split(".") for name in names]
    counts = Counter(".".join(part[: 2 if part[0] == "embed" else 1]) for part in parts)
    return ", ".join(f"{module} ({counted(n, 'tensor')})" for module, n in counts.items()) or "nothing"
