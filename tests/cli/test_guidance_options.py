"""The command train-classifier, and the guide of sample from its runs and from weaker models."""

import math
from dataclasses import replace

import pytest
import torch
from latent_models import tiny_autoencoder

from undiffuse.cli.guidance_options import (
    _are_alike,
    class_names,
    load_classifier,
    load_guide,
    report_guidance_twice,
)
from undiffuse.cli.sampler_options import SamplerOptions
from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.denoising.denoiser import NetworkDenoiser
from undiffuse.denoising.guidance import Autoguided, ClassifierFree, ClassifierGuided, DynamicThreshold, Guide
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model import checkpoint
from undiffuse.model import noisy_classifier as classifiers
from undiffuse.model.cascade import Cascade
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform
from undiffuse.model.noisy_classifier import NoisyClassifier, NoisyClassifierConfig
from undiffuse.networks.condition import Condition
from undiffuse.sampling.sampler import Sampler

UNET = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": ()}


# --- the guide --------------------------------------------------------------------------------------------------------


def model(classes=0, seed=0, shape=(1, 4, 4), codec=IntegerLevels(5), names=("a", "b", "c"), **config):  # noqa: B008
    torch.manual_seed(seed)
    network = {**UNET, "classes": classes} if classes else UNET
    made = Diffusion(ModelConfig(network=network, chain_length=5, **config), shape, codec, {"classes": list(names)})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made.eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Files of a model, a weak one, one of other data, one of another process, and two classifiers."""
    tmp_path = tmp_path_factory.mktemp("runs")
    checkpoint.save(model(3), tmp_path / "itself")
    checkpoint.save(model(3, seed=1), tmp_path / "weak")
    checkpoint.save(model(5, seed=1), tmp_path / "five")
    checkpoint.save(model(3, codec=Identity()), tmp_path / "other")
    checkpoint.save(model(3, schedule={"name": "flow"}), tmp_path / "flow")
    for name, classes in {"classifier": ("a", "b", "c"), "strange": ("a", "c", "b")}.items():
        torch.manual_seed(1)
        made = NoisyClassifier(NoisyClassifierConfig(UNET), (1, 4, 4), IntegerLevels(5), classes)
        with torch.no_grad():  # the last layer is zero at initialization
            for parameter in made.parameters():
                if not parameter.any():
                    parameter.normal_()
        classifiers.save(made, tmp_path / name)
    return tmp_path


def guide_of(model, sampler, classifier=None, weak=None, **options):
    return load_guide(model, sampler, classifier and load_classifier(model, classifier), weak, **options)


def test_guidance_wraps_the_model(runs):
    conditional = model(3)
    assert load_guide(conditional, Sampler()) is None
    sampler = Sampler(
        guidance=2.0,
        guidance_interval=(-1.0, 3.0),
        guidance_rescale=0.7,
        classifier_scale=0.5,
        autoguidance_scale=1.5,
        threshold="dynamic",
    )
    denoise = sampler.guide(conditional.denoiser(), guide_of(conditional, sampler, runs / "classifier", runs / "weak"))
    assert isinstance(denoise, DynamicThreshold)
    assert isinstance(denoise.denoise, ClassifierGuided)
    assert denoise.denoise.scale == 0.5
    assert isinstance(denoise.denoise.log_prob.__self__, NoisyClassifier)
    weak = denoise.denoise.denoise
    assert isinstance(weak, Autoguided)
    assert isinstance(weak.weak, NetworkDenoiser)
    assert weak.scale == 1.5
    assert isinstance(weak.denoise, ClassifierFree)
    assert (weak.denoise.scale, weak.denoise.low, weak.denoise.high, weak.denoise.rescale) == (2.0, -1.0, 3.0, 0.7)


def test_every_guidance_changes_the_samples(runs):
    """A classifier also guides a model that takes no labels."""
    cond = Condition(label=torch.tensor([0, 1, 2]))
    conditional, plain = model(3), model()

    def sampled(model, classifier=None, weak=None, **guidance):
        sampler = Sampler(num_steps=4, clip=False, **guidance)
        guide = guide_of(model, sampler, classifier and runs / classifier, weak and runs / weak)
        *_, last = model.trajectory(range(3), sampler=sampler, cond=cond, guide=guide)
        assert torch.isfinite(last.x).all()
        return last.x

    unguided = sampled(conditional)
    for guided in (
        sampled(conditional, guidance=3.0),
        sampled(conditional, "classifier"),
        sampled(conditional, "classifier", solver="ancestral", classifier_form="mean"),
        sampled(conditional, threshold="dynamic"),
        sampled(conditional, weak="weak"),
    ):
        assert not torch.allclose(unguided, guided)
    *_, unconditional = plain.trajectory(range(3), sampler=Sampler(num_steps=4, clip=False))
    assert not torch.allclose(unconditional.x, sampled(plain, "classifier"))
    ancestral = [sampled(plain, "classifier", solver="ancestral", classifier_form=form) for form in ("score", "mean")]
    assert not torch.allclose(*ancestral)
    strong, stronger = (sampled(plain, "classifier", classifier_scale=scale) for scale in (50.0, 100.0))
    assert not torch.allclose(strong, stronger)


def test_names_of_labels(runs):
    assert class_names(model(3)) == ["a", "b", "c"]
    assert class_names(model(3), classifiers.load(runs / "strange")) == ["a", "b", "c"]
    assert class_names(model(), load_classifier(model(), runs / "strange")) == ["a", "c", "b"]
    assert class_names(model()) == []
    unnamed = model(3)
    del unnamed.info["classes"]  # as where the names in a file were damaged
    assert class_names(unnamed) == ["0", "1", "2"]


def test_models_that_do_not_fit_together(runs):
    other_codec, other_shape = model(3, codec=Identity()), model(3, shape=(1, 8, 8))
    for diffusion, settings, classifier, weak, message in (
        (model(), {"guidance": 2.0}, None, None, r"--guidance: the model was trained without labels .* Train one"),
        (model(3), {}, "strange", None, r".*strange has other classes than the model\. Train both"),
        (other_codec, {}, "classifier", None, r"--classifier: .*classifier was trained on other data"),
        (other_shape, {}, "classifier", None, r"items \(1, 4, 4\), IntegerLevels\(num_values=5\)\. Use one"),
        (model(3), {}, None, "other", r"--autoguide: .*other was trained on other data: items .* Identity\(\)\. Use"),
        (model(3), {}, None, "five", r"--autoguide: .*five has other conditions than the model\. Use a model of the"),
        (model(3), {}, None, "flow", r"the weak model: the two models have different noise processes"),
        (model(3), {}, None, "itself", r"--autoguide: .*itself is the model itself\. Use an earlier"),
        (model(3), {"autoguidance_scale": math.inf}, None, "weak", "scale = inf: it is not a number"),
        (model(3), {"classifier_scale": math.nan}, "classifier", None, "scale = nan: it is not a number"),
        (
            model(3),
            {"guidance_rescale": 0.7},
            None,
            None,
            "-rescale: it has no effect without a --guidance scale other than 1",
        ),
        (
            model(3),
            {"guidance_interval": (0.0, 1.0)},
            None,
            None,
            "-interval: it has no effect without a --guidance scale",
        ),
        (model(3), {"classifier_scale": 5.0}, None, "weak", "-scale: it has no effect without --classifier"),
        (model(3), {"solver": "ancestral", "classifier_form": "mean"}, None, "weak", "-form: it has no effect without"),
        (model(3), {"autoguidance_scale": math.inf}, "classifier", None, "-scale: it has no effect without --autogu"),
        (model(codec=Identity()), {"threshold": "dynamic"}, None, None, "--threshold dynamic: .* are unbounded"),
    ):
        with pytest.raises(ConfigError, match=rf"^error\[GUIDANCE\] .*{message}"):
            guide_of(diffusion, Sampler(**settings), classifier and runs / classifier, weak and runs / weak)
    for sampler, file, message in (
        (Sampler(guidance=2.0), None, r"--guidance: it needs a condition\. Give --label or --cond"),
        (Sampler(), "classifier", r"--classifier: it guides to a label\. Give --label"),
    ):
        with pytest.raises(ConfigError, match=message):
            guide_of(model(3), sampler, file and runs / file, has_condition=False)
    assert load_guide(model(3), Sampler(threshold="dynamic"), has_condition=False) is None
    with pytest.raises(CheckpointError, match="this is not a classifier"):
        load_classifier(model(3), runs / "weak")
    with pytest.raises(CheckpointError, match="this is a classifier"):
        load_guide(model(3), Sampler(), autoguide=runs / "classifier")
    assert guide_of(model(), Sampler(), runs / "strange") is not None  # the model has no classes to differ from


def test_the_command_reads_a_classifier_once(runs, call, tmp_path, monkeypatch):
    read, load = [], classifiers.load
    monkeypatch.setattr(classifiers, "load", lambda *arguments: read.append(arguments[0]) or load(*arguments))
    checkpoint.save(model(), tmp_path / "plain")  # its labels are those of the classifier
    options = ("--classifier", runs / "classifier", "--label", "b", "--n", 1, "--steps", 2, "--device", "cpu")
    said = call("sample", tmp_path / "plain", *options, "--out", tmp_path / "out")
    assert (said.code, read) == (0, [runs / "classifier"]), said


def test_latents_are_alike_up_to_the_rounding_of_their_moments():
    def latents(factor=1.0, seed=0):
        mean, std = ((factor * a, factor * b) for a, b in ((0.6, -0.3), (0.8, 1.2)))
        return LatentTransform(tiny_autoencoder(seed=seed), mean, std)

    others = [latents(1.001), latents(1.1), latents(0.9), latents(seed=1), IntegerLevels(17)]
    assert [_are_alike(latents(), other) for other in others] == [True, False, False, False, False]


def test_guidance_of_a_model_that_was_distilled_with_guidance():
    """A line if both scales differ from 1, else none: `distill --guidance` has made the first part of the weights."""
    distilled, cascade = model(3), object.__new__(Cascade)
    cascade.models = [distilled, model(3)]
    for baked, scale, lines in ((3.0, 2.0, 1), (3.0, 1.0, 0), (1.0, 2.0, 0), (None, 2.0, 0)):
        distilled.info["distilled"] = {} if baked is None else {"guidance": baked}
        said: list[str] = []
        for whole in (distilled, cascade):
            report_guidance_twice(whole, Sampler(guidance=scale), said.append)
        assert len(said) == 2 * lines
        assert all("guidance 3" in line and "--guidance 2" in line for line in said)


def test_another_solver_of_a_consistency_model():
    """A line: the other solvers need the mean of the data, which a consistency model does not predict."""
    for calls, solver, steps, lines in (
        (1, "ddim", None, 1),
        (1, None, 3, 1),
        (1, "consistency", 2, 0),
        (1, None, None, 0),
        (0, "ddim", None, 0),
    ):
        said: list[str] = []
        SamplerOptions(None, None, solver, [], steps, None, {}).choose(model(calls=calls), said.append, lambda *_: None)
        assert len(said) == lines
        assert all("predicts a sample" in line for line in said)


def test_advice_is_used_for_a_flow_map_and_not_for_a_consistency_model():
    advice = Sampler("unipc", 4)
    flow_map, consistency = model(calls=1), model(calls=1)
    flow_map.config = replace(flow_map.config, network={**UNET, "two_times": True})
    for made, calls, expected in (
        (flow_map, 4, "unipc"),
        (flow_map, None, "flow_map"),
        (consistency, 4, "consistency"),
    ):
        options = SamplerOptions(None, calls, None, [], None, None, {})
        assert options.choose(made, print, lambda *_: advice).solver == expected
    without = SamplerOptions(None, 4, None, [], None, None, {}).choose(flow_map, print, lambda *_: None)
    assert (without.solver, without.num_steps) == ("flow_map", 4)


def test_a_distilled_model_makes_at_most_the_calls_of_its_chain():
    said: list[str] = []
    options = SamplerOptions(None, 10**17, None, [], None, None, {})
    assert options.choose(model(calls=2), said.append, lambda *_: None).num_steps == 5
    assert said == [f"{10**17:,} calls exceed the model's chain: 5 steps are used"]


def test_a_consistency_model_cannot_be_the_weaker_one(tmp_path):
    checkpoint.save(model(3, calls=1), tmp_path / "distilled")
    with pytest.raises(ConfigError, match=r"distilled: it is a consistency model"):
        load_guide(model(3), Sampler(), autoguide=tmp_path / "distilled")


def test_only_a_condition_guides_a_consistency_model(runs):
    distilled = model(3, calls=1)
    for guide in ({"classifier": load_classifier(distilled, runs / "classifier")}, {"autoguide": runs / "weak"}):
        with pytest.raises(ConfigError, match=r"this model: it is a consistency model"):
            load_guide(distilled, Sampler(), **guide)
    load_guide(distilled, Sampler(guidance=2.0))


def test_a_guide_of_another_kind_is_an_error():
    cond = Condition(label=torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match=r"GUIDANCE.* it is a str, not a Guide"):
        model(3).sample(2, sampler=Sampler("ddim", 2), cond=cond, guide="cat")
    with pytest.raises(ConfigError, match=r"CONDITION"):
        model(3).sample(2, sampler=Sampler("ddim", 2, guidance=2.0), cond=cond, guide=Guide(negative=cond))
