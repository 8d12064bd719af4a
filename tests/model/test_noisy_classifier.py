"""A classifier of noisy items: its log-probabilities and its file."""

import json
import math
from dataclasses import replace

import pytest
import torch

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model import checkpoint
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.noisy_classifier import NoisyClassifier, NoisyClassifierConfig, load, save
from undiffuse.networks.condition import Condition
from undiffuse.process import discrete_schedule as DS
from undiffuse.process import schedule as S
from undiffuse.runtime.tensor_file import FORMAT, read_tensors, write_tensors

CONFIG = NoisyClassifierConfig({"kind": "unet", "widths": (4, 8), "blocks": 1, "attention": ()}, high=6.0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def untrained() -> NoisyClassifier:
    classifier = NoisyClassifier(CONFIG, (1, 4, 4), IntegerLevels(5), ("a", "b", "c"), {"name": "tiny"})
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in classifier.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (1.5 / math.sqrt(p[0].numel())))
    return classifier.eval()


def test_log_probabilities_of_the_condition():
    classifier, x_t = untrained(), noise(4, 1, 4, 4)
    level = S.LinearLogSNR()(torch.tensor([0.5, 0.6, 0.7, 0.8], dtype=torch.float64))
    log_p = classifier(x_t, level)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(4))
    selected = classifier.log_prob(x_t, level, Condition(label=torch.tensor([2, 0, -1, 1])))
    torch.testing.assert_close(selected, torch.stack([log_p[0, 2], log_p[1, 0], torch.tensor(0.0), log_p[3, 1]]))
    with pytest.raises(ConfigError, match=r"condition.label: a classifier guides to labels only"):
        classifier.log_prob(x_t, level, Condition(vector=x_t[:, 0, 0]))


def test_log_probability_is_zero_outside_the_trained_range():
    classifier, x_t, label = untrained(), noise(4, 1, 4, 4), Condition(label=torch.zeros(4, dtype=torch.int64))
    schedule = S.LinearLogSNR(20.0, -20.0)
    level = schedule(schedule.inverse(torch.tensor([-5.1, -5.0, 6.0, 6.1], dtype=torch.float64)))
    log_p = classifier.log_prob(x_t, level, label)
    assert (log_p != 0).tolist() == [False, True, True, False]
    assert (classifier.log_prob(x_t, level.take(0), label) == 0).all()


def test_schedules_of_equal_log_snr_give_equal_results():
    """x_t of a flow, variance-exploding or variance-preserving schedule at one log-SNR differ by a factor only."""
    classifier, x, eps = untrained(), noise(3, 1, 4, 4), noise(3, 1, 4, 4).flip(0)
    results = []
    for schedule in (S.LinearLogSNR(), S.Flow(), S.VarianceExploding(), DS.linear()):
        level = schedule(schedule.inverse(1.3))
        assert float(level.log_snr) == pytest.approx(1.3, abs=1e-6)
        results.append(classifier(level.broadcast_like(x).alpha * x + level.broadcast_like(x).sigma * eps, level))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_a_file_holds_the_whole_classifier(tmp_path):
    classifier = untrained()
    save(classifier, tmp_path / "model.safetensors")
    for place in (tmp_path, tmp_path / "model.safetensors"):
        again = load(place)
        assert not again.training
        assert again.config == replace(CONFIG, network={**CONFIG.network, "widths": [4, 8], "attention": []})
        assert (again.item_shape, again.transform, again.classes) == ((1, 4, 4), IntegerLevels(5), ("a", "b", "c"))
        assert again.info == {"name": "tiny"}
        for name, tensor in classifier.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)


def test_a_classifier_is_not_loaded_as_a_diffusion_model_nor_the_reverse(tmp_path):
    save(untrained(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"^error\[KIND\] .*is a classifier.*Give"):
        checkpoint.load(tmp_path)
    diffusion = Diffusion(ModelConfig(network=CONFIG.network), (1, 4, 4), Identity())
    checkpoint.save(diffusion, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"error\[KIND\] .*this is not a classifier\. Give a run of"):
        load(tmp_path)


def test_an_unreadable_description_is_refused(tmp_path):
    path, classifier = tmp_path / "model.safetensors", untrained()
    tensors = classifier.state_dict()
    save(classifier, path)
    description = json.loads(read_tensors(path)[1]["classifier"])
    wrong = ({**description, "config": {"depth": 3}}, {**description, "transform": {}})
    for text in ("{", *map(json.dumps, wrong)):
        write_tensors(path, tensors, {"undiffuse": str(FORMAT), "classifier": text})
        with pytest.raises(CheckpointError, match="DESCRIPTION"):
            load(path)
    tags = {"undiffuse": str(FORMAT), "classifier": json.dumps(description)}
    write_tensors(path, dict(list(tensors.items())[1:]), tags)
    with pytest.raises(CheckpointError, match="is missing"):
        load(path)
