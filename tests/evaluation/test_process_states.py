"""What is drawn of a model's processes, against the samplers and the forward process themselves."""

import itertools
import math

import numpy as np
import pytest
import torch
from evaluation_models import model_of

from undiffuse.data.transform import IntegerLevels
from undiffuse.evaluation import process_states as states
from undiffuse.sampling.sampler import Sampler

MODEL = model_of((6,), IntegerLevels(256))
VALUES = torch.randint(256, (500, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_the_forward_process_goes_from_data_to_noise():
    levels, frames = states.forward_states(MODEL, VALUES, columns=3)
    times = [float(level.t) for level in levels]
    assert (times[0], times[-1], len(times)) == (0, 1, 3)
    assert 0 < times[1] < 1
    assert frames.shape == (3, 500, 6)
    x = MODEL.transform.to_model(VALUES).double()
    for level, frame in zip(levels, frames, strict=True):
        shown = MODEL.transform.to_model(torch.from_numpy(frame)).double()
        inside = (shown.abs() < 0.99).numpy()  # others are clipped to the range of the values
        error = ((shown - float(level.alpha) * x).numpy()[inside]) / max(float(level.sigma), 1e-9)
        if float(level.sigma) > 0.02:
            assert 0.3 < error.std() < 1.1
    np.testing.assert_allclose(frames[0].astype(float), VALUES.double().numpy(), atol=40)
    again = states.forward_states(MODEL, VALUES, columns=3)[1]
    np.testing.assert_array_equal(frames, again)


def test_the_reverse_process_ends_at_the_samples():
    levels, frames = states.reverse_states(MODEL, range(3, 7), columns=4)
    assert len(levels) == len(frames) == 4
    assert all(a.log_snr < b.log_snr for a, b in itertools.pairwise(levels))
    np.testing.assert_array_equal(frames[-1], MODEL.sample(4, first=3).numpy())


@pytest.mark.parametrize("calls", [5, 20])
def test_compared_samplers_make_the_same_number_of_calls(monkeypatch, calls):
    monkeypatch.setattr(states, "COMPARED_CALLS", calls)
    samplers = states.compared_samplers(MODEL)
    assert [name for name, *_ in samplers] == list(states.COMPARED_SOLVERS)
    for name, sampler, made in samplers:
        each = MODEL.build_solver(Sampler(name)).calls
        assert made == each * sampler.num_steps <= max(calls, each)
        assert sampler.num_steps <= MODEL.chain_length
        assert torch.isfinite(MODEL.sample(2, sampler=sampler).double()).all()


def test_states_are_in_the_range_of_the_data_on_a_schedule_that_explodes():
    level = MODEL.chain[0]._replace(alpha=torch.tensor(1.0), sigma=torch.tensor(80.0))
    x = torch.full((1, 6), 80.0)
    _, frames = states._frames(MODEL, [(level, x)])
    expected = MODEL.transform.to_data(x / math.hypot(1, 80)).numpy()
    np.testing.assert_array_equal(frames[0], expected)
