"""The `Guide` of the ``sample`` command: a classifier and a weaker model, from the runs that its options name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from undiffuse.errors import ConfigError
from undiffuse.sampling.sampler import Sampler

if TYPE_CHECKING:
    from undiffuse.data.transform import DataTransform
    from undiffuse.denoising.guidance import Guide
    from undiffuse.model.cascade import AnyModel
    from undiffuse.model.diffusion import Diffusion
    from undiffuse.model.noisy_classifier import NoisyClassifier
    from undiffuse.networks.condition import Condition


def load_guide(
    model: AnyModel,
    sampler: Sampler,
    classifier: NoisyClassifier | None = None,
    autoguide: Path | None = None,
    has_condition: bool = True,
    negative: Condition | None = None,
) -> Guide | None:
    """The guide of `Diffusion.sample`, None without ``classifier``, weak model ``autoguide`` and ``negative`` prompt.

    Checks the guidance of ``sampler`` too: raises `ConfigError` if the models do not fit together or an option has no
    effect, for instance guidance if there is no label (``has_condition`` false), and `CheckpointError`.
    """
    from undiffuse.data.transform import BOUNDED
    from undiffuse.denoising.guidance import Guide
    from undiffuse.model.arguments import check_predicts_mean
    from undiffuse.model.text_conditions import text_encoder_of

    _check_options_have_effect(sampler, classifier, autoguide)
    if sampler.threshold != "static" and not isinstance(model.transform, BOUNDED):
        cause = "the data of this model are unbounded"
        raise ConfigError("GUIDANCE", f"--threshold {sampler.threshold}", cause, "Omit it")
    if sampler.guidance != 1 and not model.condition_sizes.keys() - {"image"}:
        cause = "the model was trained without labels or other conditions"
        raise ConfigError("GUIDANCE", "--guidance", cause, "Train one with --conditional, or use --classifier")
    if not has_condition and (sampler.guidance != 1 or classifier is not None):
        flag = "--guidance" if classifier is None else "--classifier"
        fix = "Give --prompt" if text_encoder_of(model) else "Give --label or --cond"
        cause, fix = ("it needs a condition", fix) if classifier is None else ("it guides to a label", "Give --label")
        raise ConfigError("GUIDANCE", flag, cause, fix)
    if negative is not None and sampler.guidance == 1:
        raise ConfigError(
            "GUIDANCE", "--negative", "it has no effect without a --guidance scale other than 1", "Give both"
        )
    if classifier or autoguide:
        check_predicts_mean(_base(model).config)
    weak = None if autoguide is None else _load_weak_model(model, autoguide)
    guide = Guide(classifier and classifier.log_prob, weak and weak.denoiser(), negative)
    sampler.guide(model.denoiser(), guide)  # raises before the first step if a scale is out of range
    return None if guide == Guide() else guide


def load_classifier(model: AnyModel, path: Path) -> NoisyClassifier:
    """The classifier of a run, for guidance of ``model``. Raises `ConfigError` if they do not fit together."""
    from undiffuse.model import noisy_classifier

    classifier = noisy_classifier.load(path, model.device)
    _check_same_data(model, classifier, "--classifier", path)
    if list(classifier.classes) != (class_names(model) or list(classifier.classes)):
        cause = f"{path} has other classes than the model"
        raise ConfigError("GUIDANCE", "--classifier", cause, "Train both on the same data")
    return classifier


def class_names(model: AnyModel, classifier: NoisyClassifier | None = None) -> list[str]:
    """The names of the labels of the model, or of the classifier for a model without labels."""
    from undiffuse.model import text_conditions

    if classifier is None or "classes" in model.condition_sizes:
        return text_conditions.class_names(model)
    return list(classifier.classes)


def report_guidance_twice(model: AnyModel, sampler: Sampler, log: Callable[[str], None]) -> None:
    """A line about guidance of a model, or of the base of a cascade, that was distilled from a guided one."""
    scale = _base(model).info.get("distilled", {}).get("guidance", 1)
    if scale != 1 and sampler.guidance != 1:
        log(f"note: the model was distilled with guidance {scale:g}; --guidance {sampler.guidance:g} adds to it")


def _base(model: AnyModel) -> Diffusion:
    """``model``, or the first of a cascade's models."""
    from undiffuse.model.cascade import Cascade

    return model.models[0] if isinstance(model, Cascade) else model


def _load_weak_model(model: AnyModel, path: Path) -> Diffusion:
    from undiffuse.model import checkpoint
    from undiffuse.model.arguments import check_predicts_mean
    from undiffuse.model.cascade import weights_of

    weak = checkpoint.load(path, model.device, precision=model.precision)
    check_predicts_mean(weak.config, path)
    _check_same_data(model, weak, "--autoguide", path)
    for name, size in weak.condition_sizes.items():
        if name == "image" or (name != "text" and model.condition_sizes.get(name, size) != size):
            cause = f"{path} has other conditions than the model"
            raise ConfigError("GUIDANCE", "--autoguide", cause, "Use a model of the same data")
    if checkpoint.fingerprint(weak) == weights_of(model):
        fix = "Use an earlier or a smaller model of the same data"
        raise ConfigError("GUIDANCE", "--autoguide", f"{path} is the model itself", fix)
    return weak


def _check_options_have_effect(sampler: Sampler, classifier: NoisyClassifier | None, autoguide: Path | None) -> None:
    """Raises `ConfigError` for an option of a kind of guidance that is not in use."""
    default, guided = Sampler(), sampler.guidance != 1
    for flag, name, required, in_use in (
        ("--guidance-interval", "guidance_interval", "a --guidance scale other than 1", guided),
        ("--guidance-rescale", "guidance_rescale", "a --guidance scale other than 1", guided),
        ("--classifier-scale", "classifier_scale", "--classifier", classifier),
        ("--classifier-form", "classifier_form", "--classifier", classifier),
        ("--autoguide-scale", "autoguidance_scale", "--autoguide", autoguide),
    ):
        if getattr(sampler, name) != getattr(default, name) and not in_use:
            raise ConfigError("GUIDANCE", flag, f"it has no effect without {required}", "Give both, or neither")


def _check_same_data(model: AnyModel, other: Diffusion | NoisyClassifier, flag: str, path: Path) -> None:
    if other.item_shape != model.item_shape or not _are_alike(other.transform, model.transform):
        cause = f"{path} was trained on other data: items {other.item_shape}, {other.transform}"
        raise ConfigError("GUIDANCE", flag, cause[:300], "Use one that was trained on the data of the model")


def _are_alike(one: DataTransform, other: DataTransform) -> bool:
    """Whether two transforms are equal, those of latents up to the rounding of their moments."""
    from undiffuse.model.autoencoder import fingerprint
    from undiffuse.model.latent import LatentTransform

    if not (isinstance(one, LatentTransform) and isinstance(other, LatentTransform)):
        return one == other
    moments = zip((*one.mean, *one.std), (*other.mean, *other.std), strict=True)
    same = fingerprint(one.autoencoder) == fingerprint(other.autoencoder)
    return same and all(math.isclose(a, b, rel_tol=0.01, abs_tol=0.01) for a, b in moments)
