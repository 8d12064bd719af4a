"""Samplers are ranked by the distribution of their samples, with a calibrated standard error."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from latent_models import tiny_latent_model

from undiffuse.data.from_array import from_array
from undiffuse.data.transform import Identity
from undiffuse.errors import ConfigError, DataError
from undiffuse.evaluation import features, sampler_ranking
from undiffuse.evaluation.distances import frechet
from undiffuse.evaluation.sampler_ranking import (
    ComparedItems,
    SamplerScore,
    compared_items,
    rank_samplers,
    score_samplers,
    stochastic_samplers,
)
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.sampler_search import count_calls, early_stop_times, fitted_times, reference_flow
from undiffuse.sampling.solvers import SOLVERS, build


class Exact(torch.nn.Module):
    """E[x given x_t] for x ~ N(mean, std²) at a level of log-SNR ``time``."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std, self.unused = mean, std, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x_t, time, cond=None):
        snr = torch.exp(time).double()[:, None]
        alpha = torch.sqrt(snr / (1 + snr))
        variance = alpha**2 * self.std**2 + 1 / (1 + snr)
        return (self.mean + alpha * self.std**2 / variance * (x_t - alpha * self.mean)).to(x_t)


def exact(mean=0.0, std=0.5) -> Diffusion:
    settings = {"schedule": {"name": "linear_log_snr", "high": 10.0, "low": -8.0}, "target": {"name": "x"}}
    model = Diffusion(ModelConfig(network={"kind": "mlp", "width": 4, "depth": 1}, **settings), (3,), Identity())
    model.network = Exact(mean, std)
    return model


def normal(n, seed, std=0.5):
    return std * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def test_the_sampler_with_the_right_distribution_is_nearest():
    ticks = []
    good, bad, few = Sampler("dpm++2m_sde", 40), Sampler("dpm++2m_sde", 1), Sampler("ancestral", 4)
    scores, floor = score_samplers(
        exact(), [bad, few, good], ComparedItems(normal(600, 0), normal(900, 1)), n=600, progress=ticks.append
    )
    assert ([score.sampler for score in scores], floor.sampler) == ([good, few, bad], None)
    assert sum(ticks) == 600 * 45
    assert scores[2].distance > 0.3
    difference, stderr = scores[2].regret(scores[0])
    assert difference == scores[2].distance - scores[0].distance
    assert difference > 10 * stderr > 0
    assert scores[0].distance < 3 * floor.distance
    others, data = normal(900, 1)[-450:], normal(600, 0)  # half, as they are fewer than twice the samples
    assert floor.distance == pytest.approx(frechet(others, data), rel=1e-5)
    mean, error = floor.kernel
    assert abs(mean) < 5 * error
    assert scores[2].kernel[0] > 5 * scores[2].kernel[1]


@pytest.mark.parametrize("trained", [True, False])
def test_compared_items_are_disjoint_and_in_random_order(trained):
    model = exact()
    data = from_array(normal(400, 0)[normal(400, 0)[:, 0].argsort()].numpy(), name="sorted")
    model.info = {"fingerprint": data.fingerprint if trained else "other", "held_out": 0.1}
    held_out, others, *_ = compared_items(model, data, 20)
    rows = [{tuple(row) for row in part.tolist()} for part in (held_out, others)]
    assert not rows[0] & rows[1]
    split = data.split(0.1)
    expected = (len(split.validation), len(split.train)) if trained else (200, 200)
    assert (len(held_out), len(others)) == expected
    for part in (held_out, others):
        halves = part[: len(part) // 2, 0].mean() - part[len(part) // 2 :, 0].mean()
        assert abs(halves) < 5 * 0.5 * (4 / len(part)) ** 0.5  # 0.8 in the order of the data


def test_the_standard_error_is_the_spread_over_other_samples():
    """Over 40 sets. The jackknife itself varies by some 20 % there; the bounds are 2.5 times that and more."""
    model, distances, errors = exact(), [], []
    for seed in range(40):
        _, floor = score_samplers(model, [], ComparedItems(normal(400, 999), 1.5 * normal(400, seed)), n=200)
        distances.append(floor.distance)
        errors.append(floor.mean[1])
    spread = float(torch.tensor(distances).std())
    assert 0.6 * spread < sum(errors) / len(errors) < 1.6 * spread


def test_a_jackknife_by_hand():
    a, b = torch.arange(10.0).double(), torch.zeros(10).double()
    one, other = SamplerScore(None, 5.0, a, (0.0, 0.0)), SamplerScore(None, 2.0, b, (0.0, 0.0))
    stderr = math.sqrt(9 / 10 * sum((i - 4.5) ** 2 for i in range(10)))
    assert one.mean == (5.0, pytest.approx(stderr))
    assert one.regret(other) == (3.0, pytest.approx(stderr))
    assert one.regret(one) == (0.0, 0.0)


def test_each_sampler_is_passed_to_the_model(monkeypatch):
    model, calls = exact(), []
    monkeypatch.setattr(model, "sample", lambda *args, **kwargs: calls.append((args, kwargs)) or normal(30, 5))
    samplers = [Sampler("ddim", 2, "fitted", {"eta": 0.5}, (1.0, 0.5, 0.0)), Sampler("ancestral", 3, "karras")]
    score_samplers(model, samplers, ComparedItems(normal(40, 0), normal(50, 1)), 30, 7, 16, print)
    assert calls == [((30, 7, sampler, None), {"batch": 16, "progress": print}) for sampler in samplers]


@pytest.mark.parametrize("labels", [(), (0, 2), (-1,)])
def test_samples_have_the_labels_of_the_items(monkeypatch, labels):
    """So that a mixture over the classes is compared with data of all classes."""
    classes = np.random.default_rng(0).integers(3, size=400)
    values = classes[:, None].astype(np.float32) + 0.01 * normal(400, 0).numpy()
    data = replace(from_array(values, name="steps"), labels=classes, classes=("a", "b", "c"))
    settings = {"network": {"kind": "mlp", "width": 4, "depth": 1, "classes": 3}, "target": {"name": "x"}}
    model, given = Diffusion(ModelConfig(**settings), (3,), Identity()), []
    model.info = {"fingerprint": data.fingerprint, "held_out": 0.2, "classes": ["a", "b", "c"]}
    items = compared_items(model, data, 100, labels)
    present = {0, 1, 2} if labels in ((), (-1,)) else {0, 2}
    for part in (items.held_out, items.others):
        assert {*part[:, 0].round().tolist()} == present
    monkeypatch.setattr(model, "sample", lambda n, seed, sampler, cond, **_: given.append(cond) or normal(n, 5))
    score_samplers(model, [Sampler("ddim", 1)], items, 30)
    if labels == (-1,):
        assert (items.conditions, items.cond, given) == ("none", None, [None])
        return
    assert (items.conditions, len(items.cond.label), len(given[0].label)) == ("labels", 100, 30)
    assert torch.equal(given[0].label, items.cond.label[:30])
    rows = np.arange(100) % len(items.held_out)
    assert items.cond.label.tolist() == items.held_out[rows, 0].round().tolist()


def test_labels_that_the_data_lack():
    model = exact()
    data = from_array(normal(400, 0).numpy(), name="none")
    model.info = {"fingerprint": data.fingerprint}
    with pytest.raises(DataError, match="its items have no labels of the model"):
        compared_items(model, data, 20, [1])
    with pytest.raises(ConfigError, match="Give it alone"):
        compared_items(model, data, 20, [1, -1])


def test_samplers_with_infinite_samples_are_omitted(monkeypatch):
    model, samplers = exact(), [Sampler("ddim", 2), Sampler("ddim", 3)]
    monkeypatch.setattr(model, "sample", lambda n, seed, sampler, cond, **_: normal(30, 5) / (sampler.num_steps - 2))
    scores, _ = score_samplers(model, samplers, ComparedItems(normal(40, 0), normal(50, 1)), 30)
    assert [score.sampler for score in scores] == samplers[1:]


def test_items_are_encoded_batch_by_batch(monkeypatch):
    model, encoded = tiny_latent_model(), []
    encode = model.transform.autoencoder.encode
    monkeypatch.setattr(model.transform.autoencoder, "encode", lambda x: encoded.append(len(x)) or encode(x))
    values = torch.randint(17, (90, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    score_samplers(model, [Sampler("ddim", 1)], ComparedItems(values[:40], values[40:]), 20, batch=16)
    assert encoded == [16, 14, 16, 16, 8, 16, 4, 16, 4]  # the rest, the data, the samples, the floor


def test_only_the_first_components_are_compared(monkeypatch):
    monkeypatch.setattr(features, "MAX_COMPONENTS", 1)
    others = normal(500, 0) * torch.tensor([10.0, 1.0, 1.0])
    _, floor = score_samplers(exact(), [], ComparedItems(normal(400, 1) * torch.tensor([10.0, 5.0, 1.0]), others))
    assert floor.distance < 1  # the second element, whose variance differs, is not among the components


def test_stochastic_samplers(monkeypatch):
    model = exact()
    start = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    reference = reference_flow(model.sampling_denoiser(), start, 40)
    samplers = stochastic_samplers(model, reference, 10)
    solvers = {name: build(name) for name in SOLVERS}
    stochastic = {name for name, solver in solvers.items() if solver.noises_per_step and solver.order is not None}
    assert {sampler.solver for sampler in samplers} == stochastic
    assert {"ancestral", "dpm++2m_sde", "dpm++3m_sde"} <= stochastic
    assert [sampler.spacing for sampler in samplers[:3]] == ["uniform", "karras", "fitted"]
    for sampler in samplers:
        assert 8 <= count_calls(sampler, model.schedule) <= 10
        if sampler.spacing == "fitted":
            order = solvers[sampler.solver].order or 0
            assert sampler.times == fitted_times(reference, model.schedule, sampler.num_steps, 1 / (order + 1))
        elif "end" in sampler.settings:
            log_snr = float(sampler.spacing.removeprefix("to log-SNR "))
            assert sampler.settings["end"] == "low"
            assert sampler.times == early_stop_times(model.schedule, sampler.num_steps, log_snr)
        else:
            assert sampler.times is None
    early = [(s.settings.get("eta"), s.solver, s.spacing.split()[-1]) for s in samplers if "end" in s.settings]
    stops = [(name, stop) for name in ("dpm++2m_sde", "dpm++3m_sde") for stop in ("1.5", "3", "4.5", "6")]
    assert early == [(eta, *stop) for eta in (None, 2.5) for stop in stops]
    more = [sampler.spacing for sampler in samplers if sampler.settings == {"eta": 2.5}]
    assert more == 2 * ["uniform", "karras", "fitted"]
    monkeypatch.setattr(sampler_ranking, "EARLY_STOP_LOG_SNRS", (-8.0, -7.9, 9.9, 10.0))
    ends = {sampler.spacing for sampler in stochastic_samplers(model, reference, 10) if "end" in sampler.settings}
    assert ends == {"to log-SNR -7.9", "to log-SNR 9.9"}
    assert not any("end" in sampler.settings for sampler in stochastic_samplers(model, reference, 1))
    assert stochastic_samplers(model, reference, 0) == []


def test_finalists_are_compared_by_all_samples(monkeypatch):
    rounds = []

    def score(model, samplers, items, n, seed, progress):
        rounds.append(([one.num_steps for one in samplers], n, seed, progress))
        scores = [SamplerScore(one, float(one.num_steps), torch.zeros(10), (0.0, 0.0)) for one in samplers]
        return scores[::-1], "floor"

    monkeypatch.setattr(sampler_ranking, "score_samplers", score)
    model, items = exact(), ComparedItems(normal(30, 0), normal(30, 1))
    scores, floor = rank_samplers(model, [Sampler("ddim", n) for n in range(6)], items, 100, 3, print)
    assert rounds == [([0, 1, 2, 3, 4, 5], 25, 3, print), ([5, 4, 3, 2], 100, 3, print)]
    assert ([score.sampler.num_steps for score in scores if score.sampler], floor) == ([2, 3, 4, 5], "floor")
    rank_samplers(model, [Sampler("ddim", 1)], items, 40)
    assert [n for _, n, *_ in rounds[2:]] == [20, 40]
