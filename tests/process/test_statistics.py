import math

import pytest
import torch

from undiffuse.process.statistics import item_mean, item_sum, mean_with_stderr


def test_reductions_of_items():
    values = torch.arange(12.0).reshape(2, 3, 2)
    assert item_sum(values).tolist() == [15.0, 51.0]
    assert item_mean(values).tolist() == [2.5, 8.5]


def test_mean_and_standard_error():
    assert mean_with_stderr(torch.tensor([1.0, 2.0, 6.0])) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert mean_with_stderr(torch.tensor([4.0])) == (4.0, pytest.approx(math.nan, nan_ok=True))
