"""A classifier of noisy items: what it says, its file, its training, against the exact posterior of a mixture."""

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import LabelledMixture

from undiffuse import checkpoint
from undiffuse.codec import Identity, Pixels
from undiffuse.conditioning import Condition
from undiffuse.config import ModelConfig, TrainConfig
from undiffuse.data import from_array
from undiffuse.denoiser import Told
from undiffuse.diffusion import Diffusion
from undiffuse.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from undiffuse.grids import grid
from undiffuse.guidance import ClassifierGuided
from undiffuse.networks import UNet
from undiffuse.networks.classifier import Encoder, build
from undiffuse.process import schedule as S
from undiffuse.report.accuracy import accuracy_curve
from undiffuse.sample import trajectory
from undiffuse.solvers import DDIM
from undiffuse.train import Interrupted, Run, classifier_loop
from undiffuse.train.classifier import Classifier, ClassifierConfig, load, save
from undiffuse.train.classifier_loop import Recipe, accuracy, fit

UNET = {"kind": "unet", "widths": (4, 8), "blocks": 1, "attention": ()}
MLP = {"kind": "mlp", "width": 32, "depth": 2}
IMAGES = from_array(np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), np.arange(40) % 3, levels=5, name="tiny")
RECIPE = Recipe(
    ClassifierConfig(UNET, high=6.0),
    TrainConfig(batch=12, steps=4, warmup=2, lr=0.01, precision="float32", held_out=0.2, previews=2, seed=4),
)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    def missing(_):
        raise ConfigError("MISSING", "matplotlib", "it is not installed", "Install it")

    if "picture" not in request.node.name:
        monkeypatch.setattr(classifier_loop, "accuracy_curve", missing)


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (1.5 / math.sqrt(p[0].numel())))
    return network.eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(), (7,), (5, 6), (3, 4, 5)])
def test_a_row_of_numbers_an_item(size):
    settings = {**UNET, "dims": len(size), "norm": "layer"} if size else MLP
    network = build(3, channels=2, **settings)
    x, time = noise(4, 2, *size), torch.linspace(-5, 5, 4)
    assert torch.equal(network(x, time), torch.zeros(4, 3))
    randomised(network)
    said = network(x, time)
    assert said.shape == (4, 3)
    torch.testing.assert_close(network(x[1:2], time[1:2]), said[1:2])
    assert ((network(x, time + 1) - said).abs() > 0).all()
    for p in network.parameters():
        assert p.requires_grad
    said.sum().backward()
    assert all(p.grad is not None for p in network.parameters())  # nothing of the way up is left


def test_an_encoder_by_hand():
    unet = randomised(UNet(1, 1, **{k: v for k, v in UNET.items() if k != "kind"}))
    x, time = noise(2, 1, 4, 6), torch.tensor([0.0, 3.0])
    h = unet.encode(x, time)[0][-1]
    assert h.shape == (2, 8, 2, 3)
    network = randomised(Encoder(unet, 5))
    h = network.unet.encode(x, time)[0][-1]
    h = torch.nn.functional.silu(network.norm(h)).mean((2, 3))
    torch.testing.assert_close(network(x, time), h @ network.leave.weight.T + network.leave.bias)
    assert network(x.double().bfloat16().float(), time).dtype == torch.float32


def test_what_is_no_network_is_refused():
    with pytest.raises(ConfigError, match="no such setting"):
        build(3, channels=1, **UNET, depth=2)


# --- the object -------------------------------------------------------------------------------------------------------


def untrained() -> Classifier:
    classifier = Classifier(RECIPE.model, (1, 4, 4), Pixels(5), ("a", "b", "c"), {"name": "tiny"})
    randomised(classifier)
    return classifier.eval()


def test_log_probabilities_of_what_is_told():
    classifier, x_t = untrained(), noise(4, 1, 4, 4)
    level = S.LinearLogSNR()(torch.tensor([0.5, 0.6, 0.7, 0.8], dtype=torch.float64))
    each = classifier(x_t, level)
    torch.testing.assert_close(each.exp().sum(1), torch.ones(4))
    found = classifier.log_prob(x_t, level, Condition(label=torch.tensor([2, 0, -1, 1])))
    torch.testing.assert_close(found, torch.stack([each[0, 2], each[1, 0], torch.tensor(0.0), each[3, 1]]))
    with pytest.raises(ConfigError, match=r"condition.label: a classifier guides to labels, and none is told"):
        classifier.log_prob(x_t, level, Condition(vector=x_t[:, 0, 0]))


def test_it_says_nothing_where_it_was_not_trained():
    classifier, x_t, label = untrained(), noise(4, 1, 4, 4), Condition(label=torch.zeros(4, dtype=torch.int64))
    at = S.LinearLogSNR(20.0, -20.0)
    level = at(at.inverse(torch.tensor([-5.1, -5.0, 6.0, 6.1], dtype=torch.float64)))
    found = classifier.log_prob(x_t, level, label)
    assert (found != 0).tolist() == [False, True, True, False]
    assert (classifier.log_prob(x_t, level.take(0), label) == 0).all()


def test_only_the_ratio_of_signal_to_noise_counts():
    """x_t of a flow, exploding or preserving schedule at one log-SNR is the same thing in other units."""
    classifier, x, eps = untrained(), noise(3, 1, 4, 4), noise(3, 1, 4, 4).flip(0)
    said = []
    for schedule in (S.LinearLogSNR(), S.Flow(), S.VarianceExploding(), S.linear()):
        level = schedule(schedule.inverse(1.3))
        assert float(level.log_snr) == pytest.approx(1.3, abs=1e-6)
        said.append(classifier(level.like(x).alpha * x + level.like(x).sigma * eps, level))
    for other in said[1:]:
        torch.testing.assert_close(other, said[0], rtol=1e-4, atol=1e-5)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_tells_all(tmp_path):
    classifier = untrained()
    save(classifier, tmp_path / "model.safetensors")
    for place in (tmp_path, tmp_path / "model.safetensors"):
        again = load(place)
        assert not again.training
        assert (again.config, again.item_shape, again.codec, again.classes, again.info) == (
            replace(classifier.config, network={**UNET, "widths": [4, 8], "attention": []}),
            (1, 4, 4),
            Pixels(5),
            ("a", "b", "c"),
            {"name": "tiny"},
        )
        for name, tensor in classifier.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)


def test_one_kind_is_not_taken_for_the_other(tmp_path):
    save(untrained(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"^error\[KIND\] .*is a classifier, and no diffusion model\. Give"):
        checkpoint.load(tmp_path)
    checkpoint.save(Diffusion(ModelConfig(network=UNET), (1, 4, 4), Identity()), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"error\[KIND\] .*this is no classifier\. Give a run of"):
        load(tmp_path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    path, classifier = tmp_path / "model.safetensors", untrained()
    tensors = classifier.state_dict()
    save(classifier, path)
    told = json.loads(checkpoint.read_tensors(path)[1]["classifier"])
    for text in ("{", json.dumps({**told, "config": {"depth": 3}}), json.dumps({**told, "codec": {}})):
        checkpoint.write_tensors(path, tensors, {"undiffuse": "2", "classifier": text})
        with pytest.raises(CheckpointError, match="DESCRIPTION"):
            load(path)
    checkpoint.write_tensors(path, dict(list(tensors.items())[1:]), {"undiffuse": "2", "classifier": json.dumps(told)})
    with pytest.raises(CheckpointError, match="is missing"):
        load(path)


# --- training ---------------------------------------------------------------------------------------------------------


def held(folder):
    newest = max((folder / "checkpoints").glob("step-*"))
    names = ("network", "average", "optimiser")
    return {f"{n} {k}": v for n in names for k, v in checkpoint.read_tensors(newest / f"{n}.safetensors")[0].items()}


@pytest.mark.parametrize("rough", [False, True], ids=["plain", "accumulated-dropout-flip-bfloat16"])
def test_stopping_anywhere_changes_nothing(rough, tmp_path, monkeypatch):
    recipe, real, stop = RECIPE, classifier_loop._step, [0]
    if rough:
        recipe = Recipe(
            replace(RECIPE.model, network={**UNET, "dropout": 0.5}),
            replace(RECIPE.train, accumulate=3, flip=True, precision="bfloat16"),
        )

    def step(classifier, optimiser, data, items, settings, progress, folder):
        loss = real(classifier, optimiser, data, items, settings, progress, folder)
        if progress.step == stop[0]:
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(classifier_loop, "_step", step)

    def until(k, folder):
        stop[0] = k
        with pytest.raises(Interrupted) as stopped:
            fit(recipe, IMAGES, folder)
        assert stopped.value.exit_code == 143

    until(4, tmp_path / "whole")
    for k in range(1, 5):
        until(k, tmp_path / "chain")
    whole, chain = held(tmp_path / "whole"), held(tmp_path / "chain")
    assert whole.keys() == chain.keys()
    assert all(torch.equal(whole[name], chain[name]) for name in whole)
    stop[0] = 0
    one, other = (load(fit(recipe, IMAGES, tmp_path / name)) for name in ("chain", "straight"))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert one.info == other.info


def test_what_a_run_leaves_with_a_picture(tmp_path):
    said = []
    folder = fit(RECIPE, IMAGES, tmp_path / "run", say=said.append)
    assert Run(folder).finished
    assert len(said) == 1
    assert said[0].startswith("step 2  loss ")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2]
    assert set(records[0]) == {"step", "loss", "accuracy"}
    assert (folder / "pictures" / "accuracy.png").stat().st_size > 5000
    classifier = load(folder)
    assert classifier.classes == ("0", "1", "2")
    assert (classifier.info["steps"], classifier.info["seed"], classifier.info["name"]) == (4, 4, "tiny")
    rows = classifier.info["accuracy"]
    assert rows == accuracy(classifier, IMAGES, IMAGES.split(0.2).test)
    assert [row["log_snr"] for row in rows] == pytest.approx(np.linspace(-5, 6, 9))
    before = (folder / "model.safetensors").read_bytes()
    assert fit(RECIPE, IMAGES, folder) == folder  # a finished run stays as it is
    assert (folder / "model.safetensors").read_bytes() == before
    Run(folder)._write({**Run(folder).record, "finished": False})
    with pytest.raises(ConfigError, match=r"model\.high was 6\.0, now 5\.0"):
        fit(replace(RECIPE, model=ClassifierConfig(UNET, high=5.0)), IMAGES, folder)


def test_every_step_has_its_own_dropout_and_micro_batches_make_one(tmp_path, monkeypatch):
    seeds, real = [], torch.manual_seed

    def note(seed):
        seeds.append(seed)
        return real(seed)

    monkeypatch.setattr(torch, "manual_seed", note)
    settings = replace(RECIPE.train, warmup=0)
    folders = [fit(replace(RECIPE, train=replace(settings, accumulate=n)), IMAGES, tmp_path / str(n)) for n in (1, 3)]
    assert len(seeds) == 10
    assert len(set(seeds)) == 5  # of the first weights, and of four steps
    one, three = (json.loads((folder / "metrics.jsonl").read_text()) for folder in folders)
    assert three["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for name, tensor in load(folders[0]).state_dict().items():
        torch.testing.assert_close(load(folders[1]).state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_weights_decay(tmp_path):
    """AdamW takes lr · decay of a weight at a step, beside what the gradient asks for."""
    models = []
    for decay in (0.0, 0.9):
        train = replace(RECIPE.train, weight_decay=decay, steps=1, warmup=0, decay=0.0)
        models.append(load(fit(replace(RECIPE, train=train), IMAGES, tmp_path / str(decay))).state_dict())
    torch.manual_seed(RECIPE.train.seed)
    first = Classifier(RECIPE.model, (1, 4, 4), Pixels(5), IMAGES.classes).state_dict()
    for name, start in first.items():
        torch.testing.assert_close(models[0][name] - models[1][name], 0.01 * 0.9 * start, rtol=1e-3, atol=1e-6)


def test_what_it_needs(tmp_path, monkeypatch):
    unlabelled = from_array(np.zeros((9, 1, 4, 4), np.uint8), name="plain")
    one = from_array(np.arange(144, dtype=np.uint8).reshape(9, 1, 4, 4), np.zeros(9, int), name="one")
    for data in (unlabelled, one):
        with pytest.raises(DataError, match=rf"error\[LABELS\] {data.name}: a classifier needs items of two classes"):
            fit(RECIPE, data, tmp_path / "run")
    with pytest.raises(ConfigError, match="neither says when to stop"):
        fit(replace(RECIPE, train=replace(RECIPE.train, steps=None)), IMAGES, tmp_path / "run")
    said = []
    timed = replace(RECIPE, train=replace(RECIPE.train, steps=None, minutes=1e-4, batch=4))
    assert Run(fit(timed, IMAGES, tmp_path / "clock", say=said.append)).finished
    assert said[-1] == "no picture: it is not installed"
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(NonFiniteError, match="the gradient of step 1 is not finite"):
        fit(RECIPE, IMAGES, tmp_path / "bad")


class Exact:
    """The share of items that are named right by a classifier that always says label 1, with log p −0.5."""

    schedule = S.LinearLogSNR(4.0, -4.0)
    item_shape, codec = (1, 4, 4), Pixels(5)

    def eval(self):
        return self

    def parameters(self):
        yield torch.zeros(1)

    def __call__(self, x_t, level):
        said = torch.tensor([-2.0, -0.5, -1.0])
        return said.expand(len(x_t), 3)


def test_accuracy_by_hand():
    items = np.arange(7)  # labels 0 1 2 0 1 2 0
    rows = accuracy(Exact(), IMAGES, items, levels=3, batch=4)
    share = 2 / 7
    assert rows == [
        {
            "log_snr": pytest.approx(at),
            "accuracy": pytest.approx(share),
            "stderr": pytest.approx(math.sqrt(share * (1 - share) / 7)),
            "log_prob": pytest.approx((3 * -2.0 + 2 * -0.5 + 2 * -1.0) / 7),
            "items": 7,
        }
        for at in (-4.0, 0.0, 4.0)
    ]
    assert accuracy(Exact(), IMAGES, items[:0]) == []
    assert accuracy(Exact(), IMAGES, np.arange(5000) % 40, levels=2)[0]["items"] == 2048


def test_a_picture_of_the_accuracy():
    rows = [{"log_snr": -5.0, "accuracy": 0.1, "stderr": 0.02}, {"log_snr": 5.0, "accuracy": 0.9, "stderr": 0.02}]
    (axes,) = accuracy_curve(rows).axes
    (line,) = axes.get_lines()[:1]
    np.testing.assert_array_equal(line.get_xydata(), [[-5.0, 0.1], [5.0, 0.9]])


# --- what it learns ---------------------------------------------------------------------------------------------------

MIXTURE = LabelledMixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[-1.0, 0.0], [1.0, 1.0], [1.0, -1.2]]),
    torch.full((3, 2), 0.04),
    torch.tensor([0, 1, 0]),
)


def test_it_learns_the_posterior_and_guides_by_it(tmp_path):
    """Seconds of training on a mixture: −log p within 0.06 nats of the exact posterior's at every log-SNR, from the
    noise, where only the shares are known, to the data; and what the exact unconditional denoiser draws follows it.

    The items of a class are told apart by the exact posterior at the end: without guidance 200 items fall to class 1
    with probability 0.3, so that 170 of them would be 17 standard deviations off.
    """
    x, label = MIXTURE.sample_labelled(3000, torch.Generator().manual_seed(0))
    data = from_array(x.float().numpy(), label.numpy(), name="mixture")
    train = TrainConfig(batch=256, steps=150, lr=5e-3, warmup=10, precision="float32", previews=1)
    classifier = load(fit(Recipe(ClassifierConfig(MLP, high=8.0), train), data, tmp_path / "run"))
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (classifier.codec.mean, classifier.codec.std))
    seen = LabelledMixture(
        MIXTURE.weights, (MIXTURE.means - mean) / std, MIXTURE.values / std**2, MIXTURE.labels
    )  # in the codec's units
    test = data.split().test
    inside = classifier.codec.encode(torch.from_numpy(data.values[test])).double()
    gaps = []
    for k, row in enumerate(accuracy(classifier, data, test, levels=5)):
        level = classifier.schedule(1 - k / 4)
        g = torch.Generator().manual_seed(k)
        x_t = level.alpha * inside + level.sigma * torch.randn(inside.shape, generator=g, dtype=torch.float64)
        exact = seen.log_posterior(x_t, level).gather(1, torch.from_numpy(data.labels[test])[:, None])
        gaps.append(float(exact.mean()) - row["log_prob"])
    assert max(map(abs, gaps)) < 0.06
    assert row["accuracy"] > 0.99

    schedule = S.LinearLogSNR(8.0, -5.0)
    guided = ClassifierGuided(Told(seen.denoiser(schedule), None), classifier.log_prob)
    told = Told(guided, Condition(label=torch.ones(200, dtype=torch.int64)))
    with torch.no_grad():
        *_, last = trajectory(told, DDIM(), grid(schedule, 40), noise(200, 2), lambda draws: torch.empty(0))
    ours = seen.log_posterior(last.x.double(), last.level).argmax(1)
    assert int(ours.sum()) > 170
