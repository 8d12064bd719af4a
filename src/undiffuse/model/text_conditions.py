"""Conditions in words: the names of a model's labels, and prompts for one that was trained with captions."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from undiffuse.data.caption_embeddings import distinct, text_rows
from undiffuse.data.text_encoders import ENCODERS, find_encoder
from undiffuse.errors import ConfigError
from undiffuse.networks.condition import Condition


class TextModel(Protocol):
    """A model: the sizes of the conditions that it accepts, and what its file records."""

    info: dict[str, Any]

    @property
    def condition_sizes(self) -> dict[str, int]: ...


def class_names(model: TextModel) -> list[str]:
    """The names of the labels, numbers if they are not recorded; empty for a model without labels."""
    if "classes" not in model.condition_sizes:
        return []
    return list(map(str, model.info.get("classes") or range(model.condition_sizes["classes"])))


def encoder_identity(encoder: Mapping[str, str] | None) -> str | None:
    """The digest of a text encoder, whatever its folder is called, or the name of one without a digest."""
    return None if encoder is None else encoder.get("digest", encoder.get("name"))


def text_encoder_of(model: TextModel) -> dict[str, Any] | None:
    """The ``name`` of the model's text encoder, and the ``digest`` of a pretrained one; None without one."""
    sizes, recorded = model.condition_sizes, model.info.get("text_encoder")
    if "text" in sizes:
        return {"name": "bytes"}
    is_embedded = isinstance(recorded, dict) and "digest" in recorded and {"vector", "tokens"} <= sizes.keys()
    return recorded if is_embedded else None


def text_condition(model: TextModel, prompts: str | Sequence[str], encoder: str | None = None) -> Condition:
    """The conditions of ``prompts``, one for each item, for `Diffusion.sample` and all that takes a condition.

    A string is one prompt, an empty one the null condition. A model that was trained with the embeddings of a folder
    needs it as ``encoder``. Raises `ConfigError` for a model without text, prompts that are too long or not UTF-8, and
    an encoder that is not the one of training; `DataError` for one that cannot be loaded.
    """
    recorded = text_encoder_of(model)
    texts = [_checked(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
    if recorded is None:
        fix = "Use a model that was trained with --captions"
        raise ConfigError("PROMPT", "the prompt", "the model was trained without captions", fix)
    if "digest" not in recorded:
        if encoder not in (None, "bytes"):
            cause = "the text encoder is a part of the model's network"
            raise ConfigError("TEXT_ENCODER", str(encoder), cause, "Leave it out")
        return _bytes_condition(model, texts)
    if encoder is None and recorded["name"] not in ENCODERS:
        cause = f"its text encoder {recorded['name']!r} is a folder, which the model's file does not contain"
        raise ConfigError("TEXT_ENCODER", "the prompt", cause, "Give the folder as text_encoder")
    found = find_encoder(encoder or recorded["name"])
    if found is None or found.digest != recorded["digest"]:
        theirs = "bytes" if found is None else f"{found.name!r} with the digest {found.digest[:12]}"
        cause = f"it is {theirs}, and the model was trained with {recorded['name']!r}, {recorded['digest'][:12]}"
        raise ConfigError("TEXT_ENCODER", encoder or recorded["name"], cause, "Give the text encoder of training")
    given = distinct([[text for text in texts if text]])
    embeddings, cut = found.embed(given or ["-"])
    if cut:
        raise ConfigError("PROMPT", repr(cut[0])[:80], "it has more tokens than the text encoder takes", "Shorten it")
    return embeddings.condition(texts)


def _checked(prompt: Any) -> str:
    """The prompt in Unicode's composed form, without white space around it. Raises `ConfigError`."""
    if not isinstance(prompt, str):
        raise ConfigError("PROMPT", repr(prompt)[:80], f"it is a {type(prompt).__name__}, not a string", "Give text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("PROMPT", repr(prompt)[:80], "it is not valid UTF-8", "Correct the text") from None
    return unicodedata.normalize("NFC", prompt).strip()


def _bytes_condition(model: TextModel, texts: Sequence[str]) -> Condition:
    limit = model.condition_sizes["text"]
    for text in texts:
        if (length := len(text.encode())) > limit:
            cause = f"it has {length} bytes, and the model takes prompts of up to {limit}"
            raise ConfigError("PROMPT", repr(text)[:80], cause, "Shorten it")
    return Condition(text=text_rows(texts))
