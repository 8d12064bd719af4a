"""The arithmetic of ``benchmarks/judge``: ranks against enumeration, intervals against their equation, file names."""

from __future__ import annotations

import importlib.util
import json
from itertools import combinations
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / f"benchmarks/judge/{name}.py"
    spec = importlib.util.spec_from_file_location(f"judge_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranking, samples = load("ranking"), load("samples")


@pytest.mark.parametrize("better", range(7))
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_hit_probability_is_that_of_every_draw(better: int, k: int) -> None:
    """Seven other names, of which the first ``better`` score higher; three are drawn: all 35 draws counted."""
    draws = list(combinations(range(7), 3))
    expected = sum(sum(name < better for name in draw) < k for draw in draws) / len(draws)
    assert ranking.hit_probability(better, 7, k, candidates=4) == pytest.approx(expected, abs=1e-15)


def test_hit_probability_at_its_ends() -> None:
    assert ranking.hit_probability(0, 500) == 1
    assert ranking.hit_probability(500, 500) == 0
    assert ranking.hit_probability(1, 99) == 0
    assert ranking.hit_probability(9, 99, 10) == 1
    with pytest.raises(ValueError, match="fewer than 99"):
        ranking.hit_probability(0, 98)


@pytest.mark.parametrize("k", [1, 10])
def test_the_mean_over_all_places_is_chance(k: int) -> None:
    """A score without information puts the right name at each of M + 1 places equally often: exactly k / 100."""
    mean = np.mean([ranking.hit_probability(better, 399, k) for better in range(400)])
    assert mean == pytest.approx(k / 100, abs=1e-12)


def test_hits_count_ties_against_the_picture() -> None:
    scores = np.array([[0.9, 0.1, 0.2, 0.3], [0.9, 0.9, 0.2, 0.3], [0.1, 0.9, 0.2, 0.3]])
    assert ranking.hits(scores, [0, 0, 0], 1, candidates=4).tolist() == [1, 0, 0]
    assert ranking.hits(scores, [0, 0, 0], 2, candidates=4).tolist() == [1, 1, 0]
    assert ranking.hits(scores, [0, 0, 3], 1, candidates=2).tolist() == pytest.approx([1, 2 / 3, 2 / 3])


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (7, 20), (20, 20), (55, 147)])
def test_wilson_solves_its_equation(successes: int, n: int) -> None:
    """Both ends q satisfy (p − q)² = z² q (1 − q)/n, and p lies between them."""
    z, p = 1.959963984540054, successes / n
    rate = ranking.wilson(p, n)
    assert rate.low <= p <= rate.high
    for q in (rate.low, rate.high):
        assert (p - q) ** 2 == pytest.approx(z * z * q * (1 - q) / n, abs=1e-12)
    assert rate.low < rate.high


def test_wilson_covers() -> None:
    """p = 0.05, n = 150: the sum over binomial counts of those whose interval contains p, near 95 %."""
    from math import comb

    p, n = 0.05, 150
    rates = [ranking.wilson(i / n, n) for i in range(n + 1)]
    covered = sum(comb(n, i) * p**i * (1 - p) ** (n - i) for i, r in enumerate(rates) if r.low <= p <= r.high)
    assert 0.93 < covered < 0.98


def test_rate_counts_prompts_not_pictures() -> None:
    values = np.array([1.0, 1.0, 1.0, 0.0])
    rate = ranking.rate(values, ["a", "a", "a", "b"])
    assert (rate.value, rate.n) == (0.5, 2)
    assert (rate.low, rate.high) == (ranking.wilson(0.5, 2).low, ranking.wilson(0.5, 2).high)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_shuffled_prompts_move_each_prompt(n: int) -> None:
    order = ranking.derangement(n, 0)
    assert sorted(order.tolist()) == list(range(n))
    assert all(order[i] != i for i in range(n))


def test_best_among_the_colours_of_a_thing() -> None:
    names = ["red car", "blue car", "red hat", "grey car"]
    scores = np.array([[0.5, 0.4, 0.9, 0.1], [0.4, 0.5, 0.0, 0.5], [0.0, 0.0, 0.1, 0.0]])
    best, size = ranking.best_among(scores, [0, 1, 2], [name.split()[1] for name in names])
    assert (best.tolist(), size.tolist()) == ([1, 0, 1], [3, 3, 1])


def test_names_of_pictures(tmp_path: Path) -> None:
    text = 'file_name,text\ntrain/a.png,ant\ntrain/a.png,ant: bug\ntest/b.png,"bow, dark skin tone"\ntest/c.png,cat\n'
    (tmp_path / "metadata.csv").write_text(text)
    assert samples.read_metadata(tmp_path)["train/a.png"] == ["ant", "ant: bug"]
    assert samples.read_named(tmp_path) == {tmp_path / "train/a.png": "ant", tmp_path / "test/c.png": "cat"}
    assert samples.read_named(tmp_path, part="test/") == {tmp_path / "test/c.png": "cat"}


def test_samples_show_their_prompts_in_turn(tmp_path: Path) -> None:
    for i in (0, 1, 2, 7):
        (tmp_path / f"{i:06d}.png").touch()
    (tmp_path / "grid.png").touch()
    (tmp_path / "manifest.json").write_text(json.dumps({"plan": {"prompts": ["ant", "cat"]}}))
    found = {path.name: name for path, name in samples.read_named(tmp_path).items()}
    assert found == {"000000.png": "ant", "000001.png": "cat", "000002.png": "ant", "000007.png": "cat"}
    (tmp_path / "prompts.txt").write_text("bee\ndog\nfox\n")
    found = {path.name: name for path, name in samples.read_named(tmp_path, tmp_path / "prompts.txt").items()}
    assert found == {"000000.png": "bee", "000001.png": "dog", "000002.png": "fox", "000007.png": "dog"}
