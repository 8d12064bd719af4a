"""What `sample` is guided by, from the runs that its flags name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from undiffuse import checkpoint
from undiffuse.codec import BOUNDED
from undiffuse.denoiser import Denoiser
from undiffuse.diffusion import Diffusion
from undiffuse.errors import ConfigError
from undiffuse.guidance import Guidance, build
from undiffuse.train import classifier as classifiers
from undiffuse.train.classifier import Classifier

Guide = Callable[[Denoiser], Denoiser]


def guide(
    model: Diffusion,
    guidance: Guidance,
    classifier: Path | None = None,
    autoguide: Path | None = None,
    told: bool = True,
) -> Guide | None:
    """What `Diffusion.sample` takes as ``guide``; None where nothing is asked for. ``told``: whether there is a label.

    A model without labels does not hear those that the ``classifier`` guides to. Raises `ConfigError` where model,
    classifier and the weak model ``autoguide`` do not go together or something asked for would change nothing, and
    `CheckpointError`.
    """
    _none_alone(guidance, classifier, autoguide)
    if guidance.threshold != "none" and not isinstance(model.codec, BOUNDED):
        cause = "the data of this model have no range that an x̂ could leave"
        raise ConfigError("GUIDANCE", f"--threshold {guidance.threshold}", cause, "Leave it out")
    if (guidance, classifier, autoguide) == (Guidance(), None, None):
        return None
    if guidance.scale != 1 and not any(model.config.network.get(name) for name in ("classes", "vector", "tokens")):
        cause = "the model was trained without labels or other conditions: there is nothing to be guided to"
        raise ConfigError("GUIDANCE", "--guidance", cause, "Train one with --conditional, or use --classifier")
    if not told and (guidance.scale != 1 or classifier is not None):
        flag = "--guidance" if classifier is None else "--classifier"
        raise ConfigError("GUIDANCE", flag, "nothing is told that it could guide to", "Give a --label, or --cond")
    namer = None if classifier is None else classifiers.load(classifier, model.device)
    if namer is not None:
        _same_items(model, namer, "--classifier", f"{classifier}")
        if list(namer.classes) != (class_names(model) or list(namer.classes)):
            cause = f"{classifier} has other classes than the model"
            raise ConfigError("GUIDANCE", "--classifier", cause, "Train both on the same data")
    weak = None if autoguide is None else checkpoint.load(autoguide, model.device)
    if weak is not None:
        _same_items(model, weak, "--autoguide", f"{autoguide}")
        if checkpoint.fingerprint(weak) == checkpoint.fingerprint(model):
            cause = f"{autoguide} is the model itself, from which nothing leads away"
            raise ConfigError("GUIDANCE", "--autoguide", cause, "Use an earlier or a smaller model of the same data")

    def guided(denoise: Denoiser) -> Denoiser:
        return build(denoise, guidance, namer and namer.log_prob, weak and weak.denoiser())

    guided(model.denoiser())  # what cannot work is refused before the first step
    return guided


def class_names(model: Diffusion, classifier: Path | None = None) -> list[str]:
    """The names that a label may have: the model's, else the classifier's; none where nothing knows any."""
    if model.config.network.get("classes"):
        return list(model.info.get("classes", []))
    return [] if classifier is None else list(classifiers.load(classifier).classes)


def _none_alone(guidance: Guidance, classifier: Path | None, autoguide: Path | None) -> None:
    """Raises `ConfigError` for what is said of a guidance that is not asked for."""
    usual, free = Guidance(), guidance.scale != 1
    for flag, said, default, needed, there in (
        ("--guidance-interval", (guidance.low, guidance.high), (None, None), "--guidance other than 1", free),
        ("--guidance-rescale", guidance.rescale, usual.rescale, "--guidance other than 1", free),
        ("--classifier-scale", guidance.classifier_scale, usual.classifier_scale, "--classifier", classifier),
        ("--autoguide-scale", guidance.weak_scale, usual.weak_scale, "--autoguide", autoguide),
    ):
        if said != default and not there:
            raise ConfigError("GUIDANCE", flag, f"it does nothing without {needed}", "Give both, or neither")


def _same_items(model: Diffusion, other: Diffusion | Classifier, flag: str, place: str) -> None:
    if (other.item_shape, other.codec) != (model.item_shape, model.codec):
        cause = f"{place} is of other data: items {other.item_shape}, {other.codec}"
        raise ConfigError("GUIDANCE", flag, cause[:300], "Use one that was trained on the data of the model")
