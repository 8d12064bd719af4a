"""`undiffuse ema`: another length of a finished run, and the best by the bound of held-out items."""

import numpy as np
import pytest
import torch

from undiffuse.checkpoint import load, save
from undiffuse.cli import main
from undiffuse.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.data import from_array
from undiffuse.data import load as load_data
from undiffuse.errors import ConfigError, DataError
from undiffuse.train import Run, fit, lengths, profiles
from undiffuse.train.lengths import compare, model_of
from undiffuse.train.watch import Watch

VALUES = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
CONFIG = Config(
    ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, steps=5),
    TrainConfig(batch=8, steps=30, warmup=2, lr=0.01, precision="float32", held_out=0.2, snapshots=3),
)


def spread(held_out, n=8):
    """So many of the items from the first to the last, evenly: classes may come in order."""
    return held_out[[round(i * (len(held_out) - 1) / (n - 1)) for i in range(n)]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder, and the file of its data."""
    place = tmp_path_factory.mktemp("ema")
    np.save(place / "vectors.npy", VALUES)

    def end(watch):
        save(watch.smooth, watch.run.model)
        watch.run.finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "look", lambda *_: None)
        patch.setattr(Watch, "finish", end)
        fit(CONFIG, load_data(str(place / "vectors.npy")), place / "run", device="cpu", quiet=True)
    return place / "run", place / "vectors.npy"


def test_another_length(trained, capsys):
    run, _ = trained
    assert main(["ema", str(run), "--length", "0.08"]) == 0
    path = run / "model-ema-0.08.safetensors"
    _, error = profiles.combine(profiles.Profile(0.08, 30), list(profiles.snapshots(run / "snapshots")))
    assert capsys.readouterr().out == f"averaged over a length of 0.08, {error:.2%} of its profile missed: {path}\n"
    model, own = load(path), load(run)
    assert (model.info["ema"], model.info["steps"], model.info["ema_error"]) == (0.08, 30, error)
    assert model.config == own.config
    found, _, _ = profiles.reconstruct(run / "snapshots", 0.08)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    assert any(not torch.equal(model.state_dict()[name], tensor) for name, tensor in own.state_dict().items())
    assert model.sample(2, steps=3).shape == (2, 3)


def test_the_best_length_by_the_bound_of_held_out_items(trained, capsys):
    run, data = trained
    options = ["--length", "0.05", "--length", "0.15", "--items", "8", "--draws", "5"]
    assert main(["ema", str(run), str(data), "--best", *options, "--out", str(run / "best.safetensors")]) == 0
    said = capsys.readouterr().out
    dataset = load_data(str(data))
    found = compare(Run(run), dataset, (0.05, 0.15), items=8, draws=5)
    held_out = torch.from_numpy(dataset.values[spread(dataset.split(0.2).validation)])
    bits = [model_of(Run(run), each)[0].nll(held_out, draws=5).bits_per_dim(3).double() for each in (0.05, 0.15)]
    better = int(bits[1].mean() < bits[0].mean())
    apart = bits[1 - better] - bits[better]
    assert [one.bits for one in found] == pytest.approx([float(b.mean()) for b in bits])
    assert [one.stderr for one in found] == pytest.approx([float(b.std()) / 8**0.5 for b in bits])
    assert found[better][4:] == (0, 0)
    assert found[1 - better][4:] == pytest.approx((float(apart.mean()), float(apart.std()) / 8**0.5))
    assert f"best: {found[better].length:g}" in said
    tie = found[1 - better].behind < 2 * found[1 - better].behind_stderr
    assert ("no worse by two standard errors" in said) == tie
    assert load(run / "best.safetensors").info["ema"] == found[better].length
    for one in found:
        assert f"{one.bits:.4f} ± {one.stderr:.4f}" in said


def test_lengths_far_from_what_was_kept(trained, capsys):
    run, data = trained
    kept = list(profiles.snapshots(run / "snapshots"))
    missed = {each: profiles.combine(profiles.Profile(each, 30), kept)[1] for each in lengths.LENGTHS}
    near = [each for each, error in missed.items() if error <= 0.1]
    assert 3 < len(near) < len(missed)
    assert [one.length for one in compare(Run(run), load_data(str(data)), items=2, draws=1)] == near
    assert main(["ema", str(run), "--length", "0.03"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"{missed[0.03]:.2%} of its profile missed" in said[0]
    assert said[1].startswith("note: more snapshots")
    assert main(["ema", str(run), "--length", "1e-9"]) == 2
    assert "would be missed by what was kept" in capsys.readouterr().err
    assert not (run / "model-ema-1e-09.safetensors").exists()


def test_items_are_told_their_labels_where_the_run_heard_them(tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "look", lambda *_: None)
    monkeypatch.setattr(Watch, "finish", lambda watch: save(watch.smooth, watch.run.model))
    labels = np.arange(80) % 2
    data = from_array(VALUES + 3 * labels[:, None].astype(np.float32), labels=labels)
    fit(replace_train(CONFIG, conditional=True, steps=6), data, tmp_path, device="cpu", quiet=True)
    model, _ = model_of(Run(tmp_path), 0.1)
    validation = spread(data.split(0.2).validation)
    held_out = torch.from_numpy(data.values[validation])
    told = model.nll(held_out, draws=5, cond=data.condition(validation)).bits_per_dim(3).double().mean()
    untold = model.nll(held_out, draws=5).bits_per_dim(3).double().mean()
    (found,) = compare(Run(tmp_path), data, (0.1,), items=8, draws=5)
    assert found.bits == pytest.approx(float(told))
    assert abs(float(told - untold)) > 1e-4


def test_what_cannot_be(trained, tmp_path, capsys):
    run, data = trained
    for asked in ([], ["--best"], [str(data)], ["--length", "0.1", "--length", "0.2"], ["--length", "0.4"]):
        assert main(["ema", str(run), *asked]) == 2, asked
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["ema", str(tmp_path), "--length", "0.1"]) == 4
    assert "no snapshots of averages were kept" in capsys.readouterr().err
    with pytest.raises(DataError, match="not trained on these data"):
        compare(Run(run), from_array(VALUES[:50]))
    with pytest.raises(ConfigError, match="none is given"):
        compare(Run(run), load_data(str(data)), ())


def test_no_items_to_compare_with(tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "look", lambda *_: None)
    monkeypatch.setattr(Watch, "finish", lambda watch: save(watch.smooth, watch.run.model))
    data = from_array(VALUES)
    fit(replace_train(CONFIG, held_out=0.0, steps=2), data, tmp_path, device="cpu", quiet=True)
    with pytest.raises(DataError, match="fewer than two items are held out"):
        compare(Run(tmp_path), data)
    assert lengths.LENGTHS[0] < profiles.LENGTHS[0] < profiles.LENGTHS[1] < lengths.LENGTHS[-1]
