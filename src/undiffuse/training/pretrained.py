"""Models in folders and on the Hugging Face hub: the functions behind `undiffuse.model.pretrained.Pretrained`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from undiffuse.errors import CheckpointError, ConfigError, ResourceError
from undiffuse.model import checkpoint
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.tables import INSTALLED_NETWORKS
from undiffuse.report import model_card
from undiffuse.runtime import hub
from undiffuse.runtime.atomic_file import file_digest, write_atomic
from undiffuse.runtime.hub import MODEL_FILE, HubName
from undiffuse.runtime.output_folder import check_output_folder
from undiffuse.runtime.tensor_file import read_metadata
from undiffuse.training.run_folder import Run
from undiffuse.training.run_report import collect_records

if TYPE_CHECKING:
    from collections.abc import Callable

CARD = "README.md"
CARD_CHOICES = ("keep", "replace")
MESSAGE = "Upload a model of undiffuse"
IMAGES, TEXT = "unconditional-image-generation", "text-to-image"
"""Tasks of the hub that fit a model of images without conditions, and one with prompts."""


def load(
    source: str | Path,
    device: torch.device | str = "cpu",
    network: nn.Module | type[nn.Module] | None = None,
    precision: str = "float32",
) -> Diffusion:
    """See `Pretrained.from_pretrained`."""
    if hub.is_hub_name(source):
        path = hub.download(hub.parse_name(str(source)))
    elif not (path := Path(source)).exists():
        hint = f", or {hub.PREFIX}{source} for one on the hub" if hub.NAME.fullmatch(str(source)) else ""
        fix = f"Name a run folder or a .safetensors file{hint}"
        raise CheckpointError("NOT_FOUND", path, "no such file or folder", fix)
    return checkpoint.load(path, device, network, precision)


def save(model: Diffusion, folder: str | Path, license: str | None = None) -> Path:
    """See `Pretrained.save_pretrained`."""
    folder = Path(folder)
    _check_folder(model, folder)
    _write(model, folder, folder.resolve().name, license)
    return folder


def push(
    model: Diffusion, name: str, private: bool | None, message: str | None, license: str | None, card: str | None
) -> str:
    """See `Pretrained.push_to_hub`."""
    at = hub.parse_name(name)
    if card not in (None, *CARD_CHOICES):
        raise ConfigError("CARD", f"card = {card}", "no such choice", f"Give {' or '.join(CARD_CHOICES)}")
    kept = [CARD] if card != "replace" and _is_card_edited(at, allowed=card == "keep") else None
    repository = _repository(lambda folder: _write(model, folder, f"{hub.PREFIX}{at.repo}", license))
    options: dict[str, Any] = {"private": private, "branch": at.revision, "ignore_patterns": kept}
    with hub.hub_errors(at):
        return str(repository.push_to_hub(at.repo, commit_message=message or MESSAGE, **options))


def _repository(write: Callable[[Path], None]) -> Any:
    """The mixin of huggingface_hub, which creates a repository and commits the files that ``write`` puts in a folder.

    It is no base class of `Diffusion`: that would import huggingface_hub with torch, and its methods for folders delete
    a config.json of the user and look up a path that does not exist on the hub.
    """
    from huggingface_hub import ModelHubMixin

    class Repository(ModelHubMixin, library_name="undiffuse"):
        def _save_pretrained(self, save_directory: Path) -> None:
            write(save_directory)

    return Repository()


def _write(model: Diffusion, folder: Path, name: str, license: str | None) -> None:
    """Write the model, then its card, which is the record of both."""
    if license is not None and not re.fullmatch(r"[\w.+-]+", license):
        raise ConfigError("LICENSE", repr(license), "is not the name of a license", "Give one of the hub, such as mit")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = f"cannot be created ({error.strerror or error})"
        raise ResourceError("FOLDER", folder, cause, "Name another folder") from None
    path = folder / MODEL_FILE
    checkpoint.save(model, path)
    content = collect_records(_run_of(model) or Run(folder), model)
    kind = str(model.config.network.get("kind", ""))
    own = kind if kind.isidentifier() and kind not in INSTALLED_NETWORKS else ""
    enlarges = "image" in model.condition_sizes
    text = model_card.card(content, file_digest(path), name, _task(model), license, own, enlarges)
    write_atomic(folder / CARD, text.encode())


def _run_of(model: Diffusion) -> Run | None:
    """The folder that the ``model`` was read from; None if its weights are others by now, or not those of the run."""
    path = model.read_from
    if path is None:
        return None
    run = Run(path.parent)
    try:
        unchanged = read_metadata(path).get("sha256") == checkpoint.fingerprint(model)
        return run if unchanged and (run.record is None or path == run.model) else None
    except CheckpointError:  # the file is not there any more, or the record is damaged
        return None


def _task(model: Diffusion) -> str:
    """The hub's word for what the model generates; empty if it has none."""
    if len(model.item_shape) != 3:
        return ""
    if "text_encoder" in model.info or "text" in model.condition_sizes:
        return TEXT
    return "" if model.condition_sizes else IMAGES


def _check_folder(model: Diffusion, folder: Path) -> None:
    """Raise `ConfigError` if ``folder`` holds files that `save` did not write."""
    card = folder / CARD
    described = _described_model(card)
    ours = None
    if described is not None:
        ours = {MODEL_FILE} if _has_digest(folder / MODEL_FILE, described) else set()
    left = [f"{MODEL_FILE}.partial", *_unfinished(model, folder)]
    try:
        check_output_folder(folder, card, ours, {MODEL_FILE, CARD}, left)
    except ConfigError as error:
        raise ConfigError(error.code, error.where, error.cause, "Name a new folder, or move this one away") from None


def _described_model(card: Path) -> str | None:
    try:
        return model_card.described_model(card.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _has_digest(path: Path, digest: str) -> bool:
    try:
        return file_digest(path) == digest
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _unfinished(model: Diffusion, folder: Path) -> list[str]:
    """The model file, if it is the same ``model``: what a process left that was killed before it wrote the card."""
    try:
        own = read_metadata(folder / MODEL_FILE).get("sha256") == checkpoint.fingerprint(model)
    except CheckpointError:
        return []
    return [MODEL_FILE] if own else []


def _is_card_edited(at: HubName, allowed: bool) -> bool:
    """Whether the repository has a card that is not as undiffuse wrote it. Raises `ConfigError` unless ``allowed``."""
    try:
        card = hub.download(at, CARD)
    except CheckpointError:  # no repository, branch or card yet
        return False
    if _described_model(card) is not None:
        return False
    if not allowed:
        cause = f"its {CARD} was edited"
        fix = "Give card='keep' to leave it as it is, or card='replace'"
        raise ConfigError("HUB_CARD", str(at), cause, fix)
    return True
