"""What is told of each item, from the flags."""

import numpy as np
import pytest
import torch

from undiffuse.cli.told import labels_for, tell
from undiffuse.errors import ConfigError, DataError

CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat")


@pytest.mark.parametrize(
    ("classes", "asked", "labels"),
    [
        (CLOTHES, ["coat"], [4]),
        (CLOTHES, ["Trouser", "trouser", "t-shirt/TOP"], [1, 1, 0]),
        (CLOTHES, ["0", "4", "none"], [0, 4, -1]),
        (CLOTHES, ["all", "dress"], [0, 1, 2, 3, 4, 3]),
        (("2", "1", "0"), ["2", "0"], [0, 2]),  # a name goes before a number
        (("a", "A"), ["A", "a", "1"], [1, 0, 1]),
        (("all", "none"), ["all", "none", "None"], [0, 1, 1]),
    ],
)
def test_labels_by_name_and_number(classes, asked, labels):
    assert labels_for(classes, asked).tolist() == labels
    assert labels_for(classes, asked).dtype == torch.int64


@pytest.mark.parametrize(
    ("classes", "name", "words"),
    [
        (CLOTHES, "trousers", r"no such label among 5. Did you mean trouser\.$"),
        (CLOTHES, "PULOVER", r"Did you mean pullover\.$"),
        (CLOTHES, "xyz", r"Labels are T-shirt/top, trouser, pullover, dress, coat\.$"),
        (CLOTHES, "5", r"no such label"),
        (CLOTHES, "-1", r"no such label"),
        (("a", "A", "b"), "ä", r"Labels are a, A, b\.$"),
        ([str(i) for i in range(10, 30)], "x", r"no such label among 20. Labels are 10, .*, 21, \.\.\.\.$"),
        ((), "coat", r"the model was trained without labels. Leave it out, or train one with --conditional"),
    ],
)
def test_labels_that_there_are_not(classes, name, words):
    with pytest.raises(ConfigError, match=words) as caught:
        labels_for(classes, ["coat", name] if "coat" in classes else [name])
    assert (caught.value.code, caught.value.where) == ("LABEL", f"--label {name}")


def test_items_are_told_in_turn_by_their_own_number(tmp_path):
    assert tell(CLOTHES) is None
    told = tell(CLOTHES, ["coat", "none", "1"])
    assert told(range(7)).label.tolist() == [4, -1, 1, 4, -1, 1, 4]
    assert told(range(5, 7)).label.tolist() == [1, 4]
    assert told(range(0)).label.tolist() == []
    assert told(range(2)).vector is None
    vectors = np.arange(8.0).reshape(4, 2)
    np.save(tmp_path / "v.npy", vectors)
    told = tell(CLOTHES, ["coat", "dress", "all"], tmp_path / "v.npy")
    assert told(range(3, 9)).label.tolist() == [1, 2, 3, 4, 4, 3]
    assert told(range(3, 9)).vector.tolist() == vectors[[3, 0, 1, 2, 3, 0]].tolist()
    np.savez(tmp_path / "t.npz", cond=np.arange(12.0).reshape(2, 3, 2), mask=np.eye(2, 3) > 0)
    told = tell((), (), tmp_path / "t.npz")(range(1, 3))
    assert (told.label, told.vector) == (None, None)
    assert told.tokens[:, 0].tolist() == [[6, 7], [0, 1]]
    assert told.mask.tolist() == [[False, True, False], [True, False, False]]
    with pytest.raises(DataError, match=r"v\.txt"):
        tell((), (), tmp_path / "v.txt")
