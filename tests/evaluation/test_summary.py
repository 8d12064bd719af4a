"""The numbers of an evaluation: what is a bound, what is explained, and where the bits are."""

import math

import numpy as np
import pytest
import torch
from evaluation_models import SCHEDULE, model_of
from latent_models import tiny_latent_model

from undiffuse.data.transform import Identity, IntegerLevels
from undiffuse.errors import ConfigError
from undiffuse.evaluation import summary
from undiffuse.report.evaluation_report import bits_figure

WIDE, NARROW = model_of((20,), IntegerLevels(256)), model_of((16,), IntegerLevels(256))
VECTORS, LATENTS = model_of((2,), Identity()), tiny_latent_model()


@pytest.mark.parametrize(
    ("model", "name", "mc_samples", "bound"),
    [
        (WIDE, "ode", 1, True),
        (WIDE, "ode", 2, False),  # noise of the divergence biases the weights
        (NARROW, "ode", 2, True),
        (LATENTS, "ode", 1, True),
        (LATENTS, "ode", 2, False),
        (VECTORS, "ode", 1, False),
        (VECTORS, "discrete", 2, True),
        (WIDE, "openai", None, False),
    ],
)
def test_bounds(model, name, mc_samples, bound):
    assert summary.is_bound(model, name, mc_samples) is bound


def test_explanations():
    assert "no bound: noise in the estimated divergence" in summary.explanations(WIDE, ["ode"], 2)[0]
    assert "its divergence is exact" in summary.explanations(NARROW, ["ode"], 2)[1]
    assert "exact, to the integrator's tolerance 1e-05" in summary.explanations(VECTORS, ["ode"], 1)[1]
    wide = model_of((17,), Identity())
    assert "the likelihood itself, up to noise" in summary.explanations(wide, ["ode"], 1)[1]
    assert summary.explanations(WIDE, ["openai"], 1) == []
    assert summary.explanations(VECTORS, ["discrete"], 1)[1].startswith("a density")


def test_the_flow_beside_a_bound_is_another_model():
    for names, noted in ((["discrete", "ode"], True), (["continuous", "ode"], True), (["ode"], False)):
        lines = summary.explanations(WIDE, names, 1)
        assert any("its total may be above the bounds" in line for line in lines) == noted


def test_titles_name_the_samples():
    assert summary.title(WIDE, "discrete", None) == "bound of the chain, all 5 steps"
    assert summary.title(WIDE, "discrete", 2) == "bound of the chain, 2 of 5 steps"
    assert summary.title(WIDE, "ode", 1) == "probability flow"
    assert summary.title(WIDE, "ode", 3) == "probability flow, 3 importance samples"


def test_a_chain_of_one_step_has_no_curve():
    model = model_of((20,), IntegerLevels(256), steps=1, schedule={"name": "linear", "T": 1})
    nll = {"discrete": model.nll(torch.zeros(3, 20, dtype=torch.uint8))}
    assert summary.bits_by_log_snr(model, nll) == {}
    with pytest.raises(ConfigError, match=r"FIGURE.*no step between two finite noise levels"):
        bits_figure(model, nll)


@pytest.mark.parametrize("schedule", [SCHEDULE, {"name": "linear", "T": 100}, {"name": "cosine", "T": 100}])
def test_curves_of_bits_add_up_to_the_diffusion_term(schedule):
    model = model_of((20,), IntegerLevels(256), steps=100, schedule=schedule)
    values = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    exact, sampled = (model.nll(values, mc_samples=mc_samples) for mc_samples in (None, 7))
    points = model.nll(values, mc_samples=100, estimate="continuous")
    for nll in ({"discrete": exact}, {"discrete": sampled, "continuous": points}):
        curves = summary.bits_by_log_snr(model, nll)
        assert list(curves) == list(nll)
        for (edges, bits), result in zip(curves.values(), nll.values(), strict=True):
            assert len(bits) == len(edges) - 1 <= 61
            assert (np.diff(edges) > 0).all()
            assert bits.sum() == pytest.approx(float(result.diffusion_nats.mean()) / 20 / math.log(2), rel=1e-12)
