"""The conditions of items from --label and --cond."""

import numpy as np
import pytest
import torch

from undiffuse.cli.label_options import make_condition, parse_labels, report_unused_conditions
from undiffuse.errors import ConfigError, DataError

CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat")


@pytest.mark.parametrize(
    ("classes", "labels", "indices"),
    [
        (CLOTHES, ["coat"], [4]),
        (CLOTHES, ["Trouser", "trouser", "t-shirt/TOP"], [1, 1, 0]),
        (CLOTHES, ["0", "4", "none"], [0, 4, -1]),
        (CLOTHES, ["all", "dress"], [0, 1, 2, 3, 4, 3]),
        (("2", "1", "0"), ["2", "0"], [0, 2]),  # a name takes precedence over an index
        (("a", "A"), ["A", "a", "1"], [1, 0, 1]),
        (("all", "none"), ["all", "none", "None"], [0, 1, 1]),
    ],
)
def test_labels_by_name_and_index(classes, labels, indices):
    assert parse_labels(classes, labels).tolist() == indices
    assert parse_labels(classes, labels).dtype == torch.int64


@pytest.mark.parametrize(
    ("classes", "name", "words"),
    [
        (CLOTHES, "trousers", r"no such label among 5. Did you mean trouser\.$"),
        (CLOTHES, "PULOVER", r"Did you mean pullover\.$"),
        (CLOTHES, "xyz", r"Labels are T-shirt/top, trouser, pullover, dress, coat\.$"),
        (CLOTHES, "5", r"no such label"),
        (CLOTHES, "-1", r"no such label"),
        (CLOTHES, "9" * 5000, r"no such label"),  # more digits than Python converts
        (("a", "A", "b"), "ä", r"Labels are a, A, b\.$"),
        ([str(i) for i in range(10, 30)], "x", r"no such label among 20. Labels are 10, .*, 21, \.\.\.\.$"),
        ((), "coat", r"the model was trained without labels. Omit it, or train a model with --conditional"),
    ],
)
def test_unknown_labels(classes, name, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_labels(classes, ["coat", name] if "coat" in classes else [name])
    assert (caught.value.code, caught.value.where) == ("LABEL", f"--label {name}")


def test_a_file_of_conditions_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"^error\[NOT_FOUND\] .*none.npy: no such file. Name an array file"):
        make_condition((), file=tmp_path / "none.npy")


def test_items_get_conditions_in_turn_by_their_index(tmp_path):
    assert make_condition(CLOTHES) is None
    condition = make_condition(CLOTHES, ["coat", "none", "1"])
    assert condition(range(7)).label.tolist() == [4, -1, 1, 4, -1, 1, 4]
    assert condition(range(5, 7)).label.tolist() == [1, 4]
    assert condition(range(0)).label.tolist() == []
    assert condition(range(2)).vector is None
    vectors = np.arange(8.0).reshape(4, 2)
    np.save(tmp_path / "v.npy", vectors)
    condition = make_condition(CLOTHES, ["coat", "dress", "all"], tmp_path / "v.npy")
    assert condition(range(3, 9)).label.tolist() == [1, 2, 3, 4, 4, 3]
    assert condition(range(3, 9)).vector.tolist() == vectors[[3, 0, 1, 2, 3, 0]].tolist()
    np.savez(tmp_path / "t.npz", cond=np.arange(12.0).reshape(2, 3, 2), mask=np.eye(2, 3) > 0)
    condition = make_condition((), (), tmp_path / "t.npz")(range(1, 3))
    assert (condition.label, condition.vector) == (None, None)
    assert condition.tokens[:, 0].tolist() == [[6, 7], [0, 1]]
    assert condition.mask.tolist() == [[False, True, False], [True, False, False]]
    with pytest.raises(DataError, match=r"v\.txt"):
        make_condition((), (), tmp_path / "v.txt")


def test_more_conditions_than_items_are_a_line():
    said: list[str] = []
    report_unused_conditions(2, said.append, labels=[3, 5, 7], prompts=["a", "b"])
    assert said == ["note: --n 2 uses only the first 2 of 3 labels"]
