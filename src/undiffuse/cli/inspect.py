"""``undiffuse inspect``: what a checkpoint contains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.cli.options import NetworkFile, RunArgument, register_network
from undiffuse.errors import counted

if TYPE_CHECKING:
    from undiffuse.model.diffusion import Diffusion

MAX_LISTED = 16
"""The longest list of a setting that is printed whole."""


def inspect(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the complete description as JSON.")] = False,
    network: NetworkFile = None,
) -> None:
    """Describe a model: network, noise process, data and training."""
    import json

    from undiffuse.model import checkpoint
    from undiffuse.report import table

    register_network(network)
    model = checkpoint.load(run)
    if as_json:
        print(json.dumps(checkpoint.describe(model), indent=1))
        return
    high, low = float(model.chain[-1].log_snr), float(model.chain[0].log_snr)
    trained = ("steps", "seconds", "seed", "batch", "precision", "torch")
    parts = ("network", "schedule", "target", "weight", "times", "preconditioning")
    steps = counted(model.chain_length, "step")
    items = counted(model.info["items"], "item") if "items" in model.info else "? items"
    facts: dict[str, Any] = {
        "items": f"{'×'.join(map(str, model.item_shape))}, {_values(model.info.get('num_values'))}",
        "data": f"{model.info.get('name', 'unknown')} ({items})",
        "parameters": f"{sum(p.numel() for p in model.network.parameters()):,}",
        **{part: _settings(getattr(model.config, part)) for part in parts},
        "chain": f"{steps}, log-SNR {low:.2f} to {high:.2f}, variance {model.config.variance}",
        **_text(model),
        **_distilled(model),
        **_stage(model),
        **_latent(model),
        "trained": ", ".join(f"{key} {model.info[key]}" for key in trained if key in model.info),
        **_imported(model),
        "notes": "; ".join(model.info.get("notes", [])) or "none",
    }
    table.render([{"": key, "model": value} for key, value in facts.items()], str(run))


def _text(model: Diffusion) -> dict[str, str]:
    """What turns prompts into conditions; empty for a model that was not trained with captions."""
    from undiffuse.model.text_conditions import text_encoder_of

    encoder, sizes = text_encoder_of(model), model.condition_sizes
    if encoder is None:
        return {}
    if "digest" in encoder:
        made = f"embeddings by {encoder['name']} ({encoder['digest'][:12]}), which prompts need too"
        return {"text": f"{made}: a vector of {sizes['vector']}, tokens of {sizes['tokens']} numbers"}
    return {"text": f"prompts of up to {sizes['text']} bytes, by a transformer trained along"}


def _distilled(model: Diffusion) -> dict[str, str]:
    """How the model was distilled; empty if it was not."""
    if not model.config.calls:
        return {}
    made = model.info.get("distilled", {})
    guidance = f", with guidance {made['guidance']:g}" if made.get("guidance", 1) != 1 else ""
    teacher = f" from the weights {str(made.get('teacher', 'unknown'))[:12]}"
    method = f", {made['method']}" if "method" in made else ""
    return {"distilled": f"for {counted(model.config.calls, 'network call')}{teacher}{method}{guidance}"}


def _stage(model: Diffusion) -> dict[str, str]:
    """Which stage of a cascade the model is; empty if it is none."""
    from undiffuse.data.resolution import split_from_dict

    if not isinstance(facts := model.info.get("stage"), dict):
        return {}
    split = split_from_dict(facts)
    small, large = ("×".join(map(str, shape)) for shape in (split.low_shape, split.item_shape))
    text = f"enlarges {small} to {large}" if "image" in model.condition_sizes else f"base, {small} of {large}"
    return {"stage": f"{text}, map {split.map}"}


def _latent(model: Diffusion) -> dict[str, str]:
    """The autoencoder of a latent model; empty for other models."""
    from undiffuse.model.latent import LatentTransform

    if not isinstance(model.transform, LatentTransform):
        return {}
    shape, config = "×".join(map(str, model.x_shape)), model.transform.autoencoder.config
    given = "no likelihood" if config.distribution == "none" else f"p(x given z) {config.distribution}"
    kind = f"{_settings(config.network)}; {config.reconstruction} with KL weight {config.kl_weight:g}, {given}"
    return {"latents": shape, "autoencoder": f"{kind}, {model.config.autoencoder[:12]}"}


def _imported(model: Diffusion) -> dict[str, str]:
    """Where the model comes from; empty for one that was trained here."""
    made = model.info.get("imported")
    if not isinstance(made, dict):
        return {}
    return {"imported": f"from {made.get('from')}, weights {str(made.get('weights', 'unknown'))[:12]}"}


def _values(num_values: int | None) -> str:
    return f"{num_values} values" if num_values else "continuous values"


def _settings(settings: dict[str, Any]) -> str:
    """``name key=value, ...`` of one part of the configuration."""
    rest = dict(settings)
    name = rest.pop("name", None) or rest.pop("kind", "")
    return f"{name} {', '.join(f'{key}={_shortened(value)}' for key, value in rest.items())}".strip()


def _shortened(value: Any) -> str:
    """``value``, of a long list its ends and its length."""
    is_long = isinstance(value, list | tuple) and len(value) > MAX_LISTED
    return f"[{value[0]}, ..., {value[-1]}] ({len(value)} numbers)" if is_long else str(value)
