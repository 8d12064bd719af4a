"""Averages of other lengths from snapshots: the weight of each step in closed form, and the least squares."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model.config import TrainConfig
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.training.ema import PowerEMA, power_for_length
from undiffuse.training.posthoc_ema import (
    SNAPSHOT_LENGTHS,
    EMASnapshots,
    Profile,
    combine_profiles,
    list_snapshots,
    profile_inner_product,
    reconstruct_average,
    snapshot_interval,
)
from undiffuse.training.progress import Progress

N, EVERY = 200, 25


def path(step):
    """Weights that move as in training: fast at first, then slower, with noise."""
    return np.array([3 * np.exp(-step / 30) + np.sin(1.7 * step), -2.0 + 0.01 * step])


def step_weights(length, n=N):
    """The weight of each step in the average of ``length`` after n steps."""
    edges = (np.arange(n + 1) / n) ** (power_for_length(length) + 1)
    return np.diff(edges)


def trained(folder, length=0.05, snapshots=4, dtype=torch.float64, steps=N, run_id=""):
    network = nn.Linear(2, 1, bias=False, dtype=dtype)
    network.register_buffer("still", torch.full((3,), 0.3, dtype=dtype))
    average = PowerEMA(network, length)
    kept = EMASnapshots(network, average, length, snapshots, folder)
    for step in range(1, steps + 1):
        network.weight.data = torch.tensor(path(step), dtype=dtype)[None]
        average.update(network, step)
        kept.update(network, step)
        if step % EVERY == 0 and snapshots:
            kept.write(step, run_id)
    return kept, average


def on_grid(profile, n):
    """The profile's values in the middle of n equal parts of [0, N]."""
    p, tau = power_for_length(profile.length), (np.arange(n) + 0.5) * N / n
    return np.where(tau < profile.step, (p + 1) * tau**p / profile.step ** (p + 1), 0.0)


@pytest.mark.parametrize(
    ("one", "other"), [((0.05, 200), (0.1, 200)), ((0.05, 150), (0.1, 200)), ((0.2, 60), (0.07, 200))]
)
def test_inner_products_are_the_integrals(one, other):
    one, other, n = Profile(*one), Profile(*other), 400_000
    integral = (on_grid(one, n) * on_grid(other, n)).sum() * N / n
    assert profile_inner_product(one, other) == pytest.approx(integral, rel=2e-5)
    assert profile_inner_product(one, other) == pytest.approx(profile_inner_product(other, one), rel=1e-14)


@pytest.mark.parametrize("length", [0.03, 0.08, 0.15])
def test_the_coefficients_minimize_the_error_among_those_that_sum_to_one(length):
    """The residual is orthogonal to every difference of two profiles, and its norm is the error returned."""
    kept = [Profile(each, step) for each in SNAPSHOT_LENGTHS for step in (100, 150, 200)]
    wanted = Profile(length, 200)
    c, error = combine_profiles(wanted, kept)
    assert float(c.sum()) == pytest.approx(1, abs=1e-12)
    n = 200_000
    residual = on_grid(wanted, n) - sum(float(x) * on_grid(profile, n) for x, profile in zip(c, kept, strict=True))
    size = np.sqrt((residual**2).sum() / (on_grid(wanted, n) ** 2).sum())
    assert error == pytest.approx(size, rel=1e-3)
    for profile in kept[1:]:
        difference = on_grid(profile, n) - on_grid(kept[0], n)
        assert abs((residual * difference).sum()) < 2e-4 * np.sqrt((residual**2).sum() * (difference**2).sum())


def test_a_snapshot_is_reconstructed_exactly():
    kept = [Profile(each, step) for each in SNAPSHOT_LENGTHS for step in (50, 100, 200)]
    c, error = combine_profiles(kept[-1], kept)
    assert c.tolist() == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-9)
    assert error < 1e-6


@pytest.mark.parametrize("length", [0.03, 0.05, 0.08, 0.12])
def test_the_average_of_a_given_path_of_weights(tmp_path, length):
    """In float64, equal to Σ_k w_k θ_k with the weights of steps in the snapshots, and near the exact average."""
    trained(tmp_path)
    files = list_snapshots(tmp_path)
    assert len(files) == 2 * N // EVERY
    c, error = combine_profiles(Profile(length, N), list(files))
    weights = np.zeros(N)
    for x, profile in zip(c.tolist(), files, strict=True):
        weights[: profile.step] += x * step_weights(profile.length, profile.step)
    theta = np.stack([path(step) for step in range(1, N + 1)])
    tensors, last, stated_error = reconstruct_average(tmp_path, length)
    assert (last, stated_error) == (N, error)
    np.testing.assert_allclose(tensors["weight"][0].numpy(), weights @ theta, rtol=0, atol=1e-11)
    np.testing.assert_allclose(tensors["still"].numpy(), 0.3, rtol=0, atol=1e-12)
    exact = step_weights(length) @ theta
    bound = (
        error * np.sqrt((step_weights(length) ** 2).sum() * (theta**2).sum(0)) * 1.5
    )  # Cauchy-Schwarz, with a margin
    assert (abs(tensors["weight"][0].numpy() - exact) <= bound + 1e-9).all()
    assert error < (0.11 if length < 0.05 else 0.015)


def test_more_snapshots_reduce_the_error():
    def error(n, length):
        return combine_profiles(
            Profile(length, 1000), [Profile(e, 1000 * i // n) for e in SNAPSHOT_LENGTHS for i in range(1, n + 1)]
        )[1]

    for length, few, many in [(0.04, 0.058, 0.011), (0.08, 0.03, 0.0031), (0.12, 0.04, 0.0036), (0.15, 0.103, 0.0091)]:
        assert error(4, length) == pytest.approx(few, rel=0.02)
        assert error(16, length) == pytest.approx(many, rel=0.06)


def test_averages_of_bfloat16_weights_are_float32(tmp_path):
    kept, _ = trained(tmp_path, dtype=torch.bfloat16)
    tensors, tags = read_tensors(tmp_path / "0.100-00000200.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert (tags["length"], tags["step"]) == ("0.1", "200")
    assert torch.equal(tensors["weight"], kept.averages[0.10].mean["weight"])
    average, _, _ = reconstruct_average(tmp_path, 0.07)
    assert average["weight"].dtype == torch.float32


def test_the_models_own_average_is_not_stored_twice(tmp_path):
    kept, average = trained(tmp_path, length=0.05)
    assert kept.averages[0.05] is average
    assert sorted(kept.state) == ["0.1/still", "0.1/weight"]
    other, _ = trained(tmp_path, length=0.07, steps=3)
    assert sorted(other.state) == ["0.05/still", "0.05/weight", "0.1/still", "0.1/weight"]
    one, two = (
        p.averages[0.05].mean["weight"] for p in (trained(tmp_path, length=m, steps=9)[0] for m in (0.05, 0.07))
    )
    assert torch.equal(one, two)
    none, _ = trained(tmp_path / "none", snapshots=0)
    assert none.state == {}
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("snapshots", [1, 2, 3, 4, 16])
def test_the_interval_of_snapshots(snapshots):
    """At least so many in a run, fewer than twice as many, and those of a longer run are among those of a shorter."""
    intervals = [snapshot_interval(steps, snapshots) for steps in range(snapshots, 2000)]
    for steps, interval in enumerate(intervals, snapshots):
        assert snapshots <= steps // interval < 2 * snapshots
    assert all(longer % shorter == 0 for shorter, longer in itertools.pairwise(intervals))


def test_snapshots_of_a_run_by_the_clock(tmp_path):
    """The number of steps is estimated; it is then as many, and even for a run that becomes four times as fast."""
    kept, average = trained(tmp_path, snapshots=0)
    kept, settings, progress = (
        EMASnapshots(nn.Linear(2, 1), average, 0.07, 4, tmp_path),
        TrainConfig(minutes=1.0),
        Progress(),
    )
    while progress.seconds < 60:
        progress.step += 1
        progress.seconds += 1.0 if progress.step < 10 else 0.25
        progress.last_step = progress.step if progress.seconds >= 60 else None
        kept.write_if_due(progress, settings, True)
    steps = sorted({profile.step for profile in list_snapshots(tmp_path)})
    assert steps[-1] == progress.step == 213
    assert steps[:-1] == [32, 64, 96, 128, 160, 192]


def test_later_snapshots_are_removed(tmp_path):
    kept, _ = trained(tmp_path)
    (tmp_path / "0.050-00000075.safetensors.partial").touch()
    others = ["best.safetensors", "weights-00000100.safetensors", "0.050-00000100.safetensors.old", "thesis.tex"]
    for name in others:
        (tmp_path / name).touch()
    kept.drop_after(75)
    own = [f"{length}-{step:08d}.safetensors" for length in ("0.050", "0.100") for step in (25, 50, 75)]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(own + others)
    assert [path.name for path in list_snapshots(tmp_path).values()] == own


@pytest.mark.parametrize(
    ("one", "other"),
    [("0.050-00000100", "0.100-00000100"), ("0.050-00000100", "0.050-00000125"), ("0.050-00000100", "0.050-00000999")],
)
def test_a_snapshot_of_another_name_is_refused(tmp_path, one, other):
    """Another length or another step, of the same shape."""
    trained(tmp_path)
    (tmp_path / f"{one}.safetensors").replace(tmp_path / f"{other}.safetensors")
    with pytest.raises(CheckpointError, match=rf"{other}.*it says that it is the average of length 0\.05 at step 100"):
        reconstruct_average(tmp_path, 0.08)


def test_a_snapshot_of_another_run_is_refused(tmp_path):
    trained(tmp_path / "a", run_id="a")
    trained(tmp_path / "b", run_id="b")
    reconstruct_average(tmp_path / "a", 0.08, "a")
    name = "0.100-00000050.safetensors"
    (tmp_path / "b" / name).replace(tmp_path / "a" / name)
    with pytest.raises(CheckpointError, match=rf"{name}: it is a snapshot of another run\. Remove it"):
        reconstruct_average(tmp_path / "a", 0.08, "a")


def test_missing_snapshots_and_unreachable_lengths_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no snapshots of averages were stored"):
        reconstruct_average(tmp_path, 0.08)
    for length in (0.0, 0.28, float("nan")):
        with pytest.raises(ConfigError, match=r"shorter than 0\.28 of the run"):
            reconstruct_average(tmp_path, length)
    trained(tmp_path)
    damaged = tmp_path / "0.050-00000025.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=damaged.name):
        reconstruct_average(tmp_path, 0.08)
