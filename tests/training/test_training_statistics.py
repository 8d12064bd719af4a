"""Statistics of the training data that parts of a network start from."""

import numpy as np
import torch

from undiffuse.data.from_array import from_array
from undiffuse.training.batches import TrainingStatistics


def test_statistics_are_those_of_the_given_items():
    g = np.random.default_rng(0)
    vectors = g.normal(3.0, 2.0, (12, 3)).astype("float32")
    vectors[:, 1] = 7.0
    data, items = from_array(g.integers(5, size=(12, 2, 3, 3)), num_values=5, cond=vectors), np.array([0, 3, 4, 9])
    statistics = TrainingStatistics(data, items, conditional=True)
    counts = [[int((data.values[items, c] == v).sum()) for v in range(5)] for c in range(2)]
    assert statistics.counts.tolist() == counts
    mean, std = statistics.vector_moments
    torch.testing.assert_close(mean, torch.from_numpy(vectors[items]).double().mean(0))
    expected = vectors[items].astype("float64").std(0)
    torch.testing.assert_close(std, torch.tensor([expected[0], 1.0, expected[2]], dtype=torch.float64))
    assert TrainingStatistics(data, items, conditional=False).vector_moments is None
