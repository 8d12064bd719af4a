"""A model in words: its parts and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from undiffuse.data.resolution import split_from_dict
from undiffuse.errors import counted
from undiffuse.evaluation.plan import describe_shape
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform
from undiffuse.model.text_conditions import text_encoder_of

PARTS = ("network", "schedule", "target", "weight", "times", "preconditioning")
MAX_LISTED = 16
"""The longest list of a setting that is printed whole."""
TRAINED = ("steps", "seconds", "seed", "batch", "precision", "torch")


def model_facts(model: Diffusion) -> dict[str, str]:
    """What `undiffuse inspect` prints: the items, the data, each part with its settings, the training, and notes."""
    high, low = float(model.chain[-1].log_snr), float(model.chain[0].log_snr)
    steps = counted(model.chain_length, "step")
    items = counted(model.info["items"], "item") if "items" in model.info else "? items"
    return {
        "items": f"{describe_shape(model.item_shape)}, {_values(model.info.get('num_values'))}",
        "data": f"{model.info.get('name', 'unknown')} ({items})",
        "parameters": f"{sum(p.numel() for p in model.network.parameters()):,}",
        **{part: settings_in_words(getattr(model.config, part)) for part in PARTS},
        "chain": f"{steps}, log-SNR {low:.2f} to {high:.2f}, variance {model.config.variance}",
        **_text(model),
        **_distilled(model),
        **_stage(model),
        **_latent(model),
        **_initial(model),
        "trained": ", ".join(f"{key} {model.info[key]}" for key in TRAINED if key in model.info),
        **_imported(model),
        "notes": "; ".join(model.info.get("notes", [])) or "none",
    }


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """``name key=value, ...`` of one part of the configuration."""
    rest = dict(settings)
    name = rest.pop("name", None) or rest.pop("kind", "")
    return f"{name} {', '.join(f'{key}={_shortened(value)}' for key, value in rest.items())}".strip()


def _text(model: Diffusion) -> dict[str, str]:
    """What turns prompts into conditions; empty for a model that was not trained with captions."""
    encoder, sizes = text_encoder_of(model), model.condition_sizes
    if encoder is None:
        return {}
    if "digest" in encoder:
        made = f"embeddings by {encoder['name']} ({encoder['digest'][:12]}), which prompts need too"
        return {"text": f"{made}: a vector of {sizes['vector']}, tokens of {sizes['tokens']} numbers"}
    return {"text": f"prompts of up to {sizes['text']} bytes, by a transformer trained with the network"}


def _distilled(model: Diffusion) -> dict[str, str]:
    """How the model was distilled; empty if it was not."""
    if not model.config.calls:
        return {}
    made = model.info.get("distilled", {})
    guidance = f", with guidance {made['guidance']:g}" if made.get("guidance", 1) != 1 else ""
    teacher = f" from the weights {str(made.get('teacher', 'unknown'))[:12]}"
    method = f", {made['method']}" if "method" in made else ""
    return {"distilled": f"for {counted(model.config.calls, 'network call')}{teacher}{method}{guidance}"}


def _initial(model: Diffusion) -> dict[str, str]:
    """The weights that training started from; empty if those were random."""
    facts = model.info.get("init")
    if facts is None:
        return {}
    known = [str(facts["name"])] if "name" in facts else []
    known += [counted(facts["steps"], "step")] if "steps" in facts else []
    described = f" ({', '.join(known)})" if known else ""
    return {"starts from": f"the weights {facts['weights'][:12]}{described}"}


def _stage(model: Diffusion) -> dict[str, str]:
    """Which stage of a cascade the model is; empty if it is none."""
    if not isinstance(facts := model.info.get("stage"), dict):
        return {}
    split = split_from_dict(facts)
    small, large = ("×".join(map(str, shape)) for shape in (split.low_shape, split.item_shape))
    text = f"enlarges {small} to {large}" if "image" in model.condition_sizes else f"base, {small} of {large}"
    return {"stage": f"{text}, map {split.map}"}


def _latent(model: Diffusion) -> dict[str, str]:
    """The autoencoder of a latent model; empty for other models."""
    if not isinstance(model.transform, LatentTransform):
        return {}
    shape, config = "×".join(map(str, model.x_shape)), model.transform.autoencoder.config
    given = "no likelihood" if config.distribution == "none" else f"p(x given z) {config.distribution}"
    kind = f"{settings_in_words(config.network)}; {config.reconstruction} with KL weight {config.kl_weight:g}, {given}"
    return {"latents": shape, "autoencoder": f"{kind}, {model.config.autoencoder[:12]}"}


def _imported(model: Diffusion) -> dict[str, str]:
    """Where the model comes from; empty for one that was trained here."""
    made = model.info.get("imported")
    if not isinstance(made, dict):
        return {}
    return {"imported": f"from {made.get('from')}, weights {str(made.get('weights', 'unknown'))[:12]}"}


def _values(num_values: int | None) -> str:
    return f"{num_values} values" if num_values else "continuous values"


def _shortened(value: Any) -> str:
    """``value``, of a long list its ends and its length."""
    is_long = isinstance(value, list | tuple) and len(value) > MAX_LISTED
    return f"[{value[0]}, ..., {value[-1]}] ({len(value)} numbers)" if is_long else str(value)
