"""The default names of folders of samples: readable, and different where the samples are."""

from pathlib import Path

import pytest

from undiffuse.cli.sample_names import folder_name, model_words
from undiffuse.data.transform import Identity
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.sampling.sampler import Sampler

DIFFERENT = {
    "long labels": [{"labels": ["红" * 80]}, {"labels": ["红" * 81]}],
    "characters of labels": [{"labels": ["a b"]}, {"labels": ["a/b"]}],
    "the end of a label": [{"labels": ["t", "shirt"]}, {"labels": ["t-shirt"]}],
    "names of files": [{"files": [Path("runs/one-0.1")]}, {"files": [Path("runs/one-0.2")]}],
    "folders of files": [{"files": [Path(f"{name}/model.safetensors")]} for name in ("c1", "c2")],
    "folders of stages": [{"others": ["sr"], "stages": [Path(name)]} for name in ("a/sr", "b/sr")],
    "names of models": [{"others": ["my model"]}, {"others": ["my-model"]}],
    "punctuation": [{"prompts": [text]} for text in ("a cat!", "a cat?", "a cat", "a, cat")],
    "the end of a prompt": [{"prompts": ["a", "cat"]}, {"prompts": ["a cat"]}],
    "the negative prompt": [{"prompts": ["a cat"], "negative": "dog"}, {"prompts": ["a cat dog"]}],
    "an empty negative prompt": [{"labels": ["a"], "negative": ""}, {"labels": ["a"]}],
    "a label or a prompt": [{"prompts": ["cat"]}, {"labels": ["cat"]}],
}


@pytest.mark.parametrize("cases", DIFFERENT.values(), ids=DIFFERENT)
def test_other_samples_have_another_name(cases):
    assert len({folder_name(Sampler(), 0, **case) for case in cases}) == len(cases)


def test_another_sampler_of_a_distilled_model_has_another_name():
    """The default sampler of the model has fixed times; the same solver may also be given with a number of steps."""
    network = {"kind": "mlp", "width": 8, "depth": 1}
    student = Diffusion(ModelConfig(network=network, calls=2, chain_length=9), (3,), Identity())
    own, given = student.default_sampler, Sampler("consistency", 2)
    words = [model_words(Path("runs/x"), "auto", student, sampler) for sampler in (own, given)]
    assert words == [[], ["uniform"]]
    assert folder_name(given, 5, others=words[1]) == "consistency-2-uniform-seed-5"
    teacher = Diffusion(ModelConfig(network=network), (3,), Identity())
    assert model_words(Path("runs/x"), "float32", teacher, given) == ["float32"]


def test_a_name_is_readable():
    assert folder_name(Sampler(), 3, ["star", "0"], others=["float32"]) == "ddim-50-star-0-float32-seed-3"
    name = folder_name(Sampler(), 0, [], ["a red, red apple"], "a pear")
    assert name.startswith("ddim-50-a-red-red-apple-a-pear-")
