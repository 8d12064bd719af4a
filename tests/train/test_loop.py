"""The whole loop on forty 4×4 images and a network of a few hundred weights."""

import csv
import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from undiffuse.checkpoint import load, read_tensors, save
from undiffuse.codec import Identity, Pixels, Standardised
from undiffuse.conditioning import Condition
from undiffuse.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.data import from_array
from undiffuse.diffusion import Diffusion
from undiffuse.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from undiffuse.presets import fitted
from undiffuse.train import Interrupted, Run, fit, loop, state
from undiffuse.train import batch as batches_of
from undiffuse.train.batch import global_batch
from undiffuse.train.stop import StoppedAtOnce, stopping_signals
from undiffuse.train.watch import Watch

DATA = from_array(np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), levels=5, name="tiny")
NET = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
STEPS = 8
CONFIG = Config(
    ModelConfig(network=NET, schedule={"name": "linear_log_snr", "high": 6.0}, steps=5),
    TrainConfig(batch=12, steps=STEPS, warmup=3, lr=0.01, precision="float32", held_out=0.2, previews=1, seed=4),
)
ROUGH = replace(
    replace_train(CONFIG, accumulate=3, flip=True, precision="bfloat16"),
    model=replace(CONFIG.model, network=NET | {"dropout": 0.5}),
)

LEARNED = replace(
    CONFIG,
    model=replace(
        CONFIG.model,
        schedule={"name": "learned", "high": 6.0, "low": -4.0, "width": 4},
        times={"name": "uniform", "low": 0.0},
        loss="continuous",
    ),
)

VECTORS = np.random.default_rng(1).normal(5, [3, 0], size=(40, 2))  # the second number never changes
TOLD = from_array(DATA.values, np.arange(40) % 3, levels=5, name="told", cond=VECTORS)
TELLING = replace_train(CONFIG, conditional=True, condition_dropout=0.3, accumulate=2)


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Runs without matplotlib, whose curve would be half the time of these tests."""

    def missing(_):
        raise ConfigError("MISSING_PACKAGE", "matplotlib", "is not installed", "Install it")

    if request.node.name != "test_what_a_run_leaves":
        monkeypatch.setattr("undiffuse.report.pictures.training_curve", missing)


def train(config, out, data=DATA, **settings):
    return fit(config, data, out, device="cpu", quiet=True, **settings)


@pytest.fixture
def stop(monkeypatch):
    """stop(k) makes the process get SIGTERM (or another signal) after step k; stop(None) no more."""
    at, kind, real = [None], [signal.SIGTERM], Watch.step

    def step(watch, *numbers):
        real(watch, *numbers)
        if watch.progress.step == at[0]:
            signal.raise_signal(kind[0])

    monkeypatch.setattr(Watch, "step", step)

    def ask(k, number=signal.SIGTERM):
        at[0], kind[0] = k, number

    return ask


def just_save(watch):
    """A finish without its last look."""
    save(watch.smooth, watch.run.model)


def held(folder, step=STEPS):
    """Every tensor of a checkpoint of training: weights, average and moments."""
    place = folder / "checkpoints" / f"step-{step:08d}"
    return {
        f"{name} {key}": tensor
        for name in ("network", "average", "optimiser")
        for key, tensor in read_tensors(place / f"{name}.safetensors")[0].items()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("config", "data"),
    [(CONFIG, DATA), (ROUGH, DATA), (LEARNED, DATA), (TELLING, TOLD)],
    ids=["plain", "accumulated-dropout-flip-bfloat16", "learned-schedule", "conditional"],
)
def test_stopping_anywhere_changes_nothing(config, data, tmp_path, stop):
    def until(k, folder):
        stop(k)
        with pytest.raises(Interrupted) as stopped:
            train(config, folder, data)
        assert stopped.value.exit_code == 143
        return folder

    whole = held(until(STEPS, tmp_path / "whole"))
    for k in (1, 5):
        folder = until(k, tmp_path / f"stop-{k}")
        assert equal(held(until(STEPS, folder)), whole), k
    for k in range(1, STEPS + 1):  # a stop after each step of one run
        until(k, tmp_path / "chain")
    assert equal(held(tmp_path / "chain"), whole)
    stop(None)
    for name in ("whole", "chain"):  # all that is left to do is to finish
        train(config, tmp_path / name, data)
    straight = train(config, tmp_path / "straight", data)
    models = [load(folder) for folder in (straight, tmp_path / "whole", tmp_path / "chain")]
    for other in models[1:]:
        assert equal(other.state_dict(), models[0].state_dict())
        assert torch.equal(other.sample(8, seed=1, steps=5), models[0].sample(8, seed=1, steps=5))
        values = torch.from_numpy(DATA.values[:4])
        assert torch.equal(other.nll(values).total, models[0].nll(values).total)
    pictures = [(folder / "pictures" / "samples.png").read_bytes() for folder in (straight, tmp_path / "chain")]
    assert pictures[0] == pictures[1]
    average = {k.removeprefix("average "): v for k, v in whole.items() if k.startswith("average ")}
    assert equal(models[0].state_dict(), average)  # the model is the average


def test_dropout_differs_from_step_to_step(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(Watch, "step", lambda *_: seeds.append(torch.initial_seed()))
    monkeypatch.setattr(Watch, "finish", just_save)
    train(CONFIG, tmp_path / "a")
    train(replace_train(CONFIG, seed=5), tmp_path / "b")
    assert len(set(seeds)) == len(seeds) == 2 * STEPS


def test_signals(tmp_path, stop, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    stop(2, signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        train(CONFIG, tmp_path / "a")
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [c.name for c in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000002"]
    with pytest.raises(CheckpointError, match="train on"):
        load(tmp_path / "a")  # not so far yet
    with stopping_signals() as asked:
        signal.raise_signal(signal.SIGTERM)
        assert asked == [signal.SIGTERM]
        with pytest.raises(StoppedAtOnce) as now:
            signal.raise_signal(signal.SIGINT)
        assert now.value.exit_code == 130
        with pytest.raises(Interrupted) as stopped, asked.all_saved():
            raise AssertionError("it was asked to stop")
        assert type(stopped.value) is Interrupted
        assert stopped.value.exit_code == 143


def test_a_signal_that_comes_when_all_is_saved_stops_there(tmp_path, monkeypatch):
    """While a run looks at itself, which may take a minute, nothing can be lost; what it stopped in is not missed."""
    straight = load(train(CONFIG, tmp_path / "straight")).state_dict()
    for part in ("look", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(Watch, part, lambda *_: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Interrupted) as stopped:
                train(replace_train(CONFIG, previews=2), tmp_path / part)
        assert stopped.value.exit_code == 143
        (last, *_) = sorted((tmp_path / part / "checkpoints").iterdir(), reverse=True)
        assert last.name == ("step-00000004" if part == "look" else "step-00000008")
        assert equal(load(train(replace_train(CONFIG, previews=2), tmp_path / part)).state_dict(), straight)


def test_looking_changes_nothing(tmp_path, monkeypatch):
    rough = replace_train(ROUGH, precision="float32", accumulate=1)
    weights = []
    for previews in (0, STEPS):
        folder = train(replace_train(rough, previews=previews), tmp_path / str(previews))
        weights.append(load(folder).network.state_dict())
        assert len(list((folder / "pictures").glob("samples-*.png"))) == max(previews, 1)
        assert equal(weights[0], weights[-1]), previews
    monkeypatch.setattr(Watch, "look", lambda watch, *_: torch.randn(1000))  # whatever a look draws
    monkeypatch.setattr(Watch, "finish", just_save)
    assert equal(weights[0], load(train(replace_train(rough, previews=3), tmp_path / "x")).network.state_dict())
    other = load(train(replace_train(rough, seed=5), tmp_path / "z")).network.state_dict()
    assert not equal(weights[0], other)  # power: a seed does


def test_labels_that_are_not_told_change_nothing(tmp_path, monkeypatch):
    """An unconditional run on data with labels is bit for bit the run without, whatever the share told nothing."""
    monkeypatch.setattr(Watch, "finish", just_save)
    runs = [
        load(train(replace_train(CONFIG, condition_dropout=share), tmp_path / data.name, data)).state_dict()
        for data, share in ((DATA, 0.1), (TOLD, 0.9))
    ]
    assert equal(*runs)


def test_a_conditional_model_knows_what_it_hears(tmp_path, monkeypatch):
    seen, drawn = [], []
    real_nll, real_sample = Diffusion.nll, Diffusion.sample
    monkeypatch.setattr(Diffusion, "nll", lambda m, *a, **k: seen.append(k["cond"]) or real_nll(m, *a, **k))
    monkeypatch.setattr(Diffusion, "sample", lambda m, *a, **k: drawn.append(k["cond"]) or real_sample(m, *a, **k))
    split = TOLD.split(0.2)
    model = load(train(TELLING, tmp_path / "both", TOLD))
    assert {k: model.config.network[k] for k in ("classes", "vector")} == {"classes": 3, "vector": 2}
    assert model.info["classes"] == ["0", "1", "2"]
    vector = torch.from_numpy(TOLD.cond[split.train]).double()
    torch.testing.assert_close(model.network.embed.vector.mean.double(), vector.mean(0), rtol=1e-6, atol=1e-6)
    std = torch.stack([vector[:, 0].std(correction=0), torch.ones(()).double()])
    torch.testing.assert_close(model.network.embed.vector.std.double(), std, rtol=1e-6, atol=1e-6)
    told = [sorted(cond.label.tolist()) for cond in seen[-3:]]  # bounds are those given all that is known: of the
    assert told[0] == told[2] == sorted(TOLD.labels[split.validation].tolist())  # held-out items, and of as many others
    assert len(told[1]) == len(told[0])
    assert drawn[-1].vector.tolist() == TOLD.cond[np.resize(split.validation, 64)].tolist()
    labelled = from_array(DATA.values, np.arange(40) % 3, levels=5)
    train(replace_train(TELLING, steps=1), tmp_path / "labels", labelled)
    assert drawn[-1].label.tolist() == (torch.arange(64) % 3).tolist()  # pictures show each in turn
    train(replace_train(TELLING, steps=1, held_out=0.0), tmp_path / "all", TOLD)
    assert drawn[-1].label.tolist() == TOLD.labels[np.resize(np.arange(40), 64)].tolist()


def test_conditions_that_cannot_be(tmp_path):
    with pytest.raises(DataError, match=r"error\[NO_CONDITIONS\] tiny: these data say nothing of their items"):
        train(TELLING, tmp_path / "a")
    other = replace(TELLING, model=replace(CONFIG.model, network=NET | {"classes": 4}))
    with pytest.raises(ConfigError, match=r"model.network.classes = 4: the data make it 3"):
        train(other, tmp_path / "b", TOLD)
    agreeing = replace(TELLING, model=replace(CONFIG.model, network=NET | {"classes": 3}))
    assert fitted(agreeing, 5, TOLD.hearing).model.network == NET | {"classes": 3, "vector": 2}
    assert fitted(agreeing, 5, {}).model.network == NET | {"classes": 3}
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["label", "vector"])
def test_training_learns_to_follow_what_it_is_told(kind, tmp_path, monkeypatch):
    """Two clusters at −2 and 2, told apart by a label or a vector: samples go where they are told to, or to both.

    The one test of training as such: seconds of a small network, on what it is told and not on how well it does.
    """
    monkeypatch.setattr(Watch, "finish", just_save)
    side = np.arange(400) % 2
    values = (np.random.default_rng(0).normal(size=(400, 1)) * 0.3 + 4.0 * side[:, None] - 2.0).astype(np.float32)
    more = {"labels": side} if kind == "label" else {"cond": 1000.0 + 50.0 * side[:, None]}
    config = Config(
        ModelConfig(network={"kind": "mlp", "width": 32, "depth": 2}, schedule={"name": "linear_log_snr", "high": 8.0}),
        TrainConfig(batch=128, steps=150, lr=5e-3, warmup=20, precision="float32", previews=0, conditional=True),
    )
    model = load(train(config, tmp_path / "run", from_array(values, **more)))
    for goal in (0, 1):
        value = torch.full((50,), goal) if kind == "label" else torch.full((50, 1), 1000.0 + 50.0 * goal)
        x = model.sample(50, steps=20, cond=Condition(**{kind: value}))
        assert ((x - (4.0 * goal - 2.0)).abs() < 2).float().mean() > 0.95
    untold = model.sample(200, steps=20)
    assert 0.25 < (untold > 0).float().mean() < 0.75
    assert (untold.abs() > 1).float().mean() > 0.5


def plain_descent(monkeypatch):
    """The steps (loss, gradient norm, rate) of a run with plain gradient descent, whose steps are the gradient."""
    told, real = [], Watch.step

    def step(watch, *numbers):
        told.append(numbers[:3])
        real(watch, *numbers)

    def descent(parameters, lr, **_):
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", descent)
    monkeypatch.setattr(Watch, "step", step)
    monkeypatch.setattr(Watch, "finish", just_save)
    return told


def test_accumulation_is_the_whole_batch(tmp_path, monkeypatch):
    told = plain_descent(monkeypatch)
    runs = []
    for accumulate in (1, 3, 12):
        del told[:]
        folder = train(replace_train(CONFIG, accumulate=accumulate, steps=4, lr=1.0), tmp_path / str(accumulate))
        runs.append((torch.tensor(told), load(folder).network.state_dict()))
    for numbers, weights in runs[1:]:
        torch.testing.assert_close(numbers, runs[0][0], rtol=1e-5, atol=1e-6)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, runs[0][1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_one_step_by_hand(tmp_path, monkeypatch, clip):
    """w − lr (1/warmup) g min(1, clip/‖g‖), with g the gradient of the mean loss of the step's own batch."""
    told = plain_descent(monkeypatch)
    config = replace_train(CONFIG, steps=1, lr=2.0, warmup=4, decay=0.0, clip=clip)
    trained = load(train(config, tmp_path / "run"))
    torch.manual_seed(4)
    model = Diffusion(config.model, DATA.item_shape, Pixels(5)).train()
    model.loss(*global_batch(DATA, DATA.split(0.2).train, config.train, 0)).mean().backward()
    gradients = {name: p.grad for name, p in model.network.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert told == [(pytest.approx(told[0][0]), pytest.approx(float(norm), rel=1e-5), 0.5)]
    for name, weight in model.network.named_parameters():
        expected = weight.detach() - 0.5 * gradients[name] * min(1.0, clip / float(norm))
        torch.testing.assert_close(trained.network.state_dict()[name], expected, rtol=1e-4, atol=1e-7)


def test_one_step_of_a_learned_schedule_by_hand(tmp_path, monkeypatch):
    """At its own pace, by its own gradient, clipped by that one's own norm; and the network as if alone."""
    told = plain_descent(monkeypatch)
    config = replace_train(LEARNED, steps=1, lr=1.0, warmup=4, decay=0.0, clip=1e-2)
    trained = load(train(config, tmp_path / "run"))
    torch.manual_seed(4)
    model = Diffusion(config.model, DATA.item_shape, Pixels(5)).train()
    model.loss(*global_batch(DATA, DATA.split(0.2).train, config.train, 0)).mean().backward()
    for part, pace in (("network", 1.0), ("schedule", loop.PACE)):
        gradients = {name: p.grad for name, p in getattr(model, part).named_parameters()}
        norm = float(torch.stack([g.norm().double() for g in gradients.values()]).norm())
        assert norm > 1e-2
        if part == "network":
            assert told[0][1:] == (pytest.approx(norm, rel=1e-5), 0.25)
        for name, weight in getattr(model, part).named_parameters():
            expected = weight.detach() - 0.25 * pace * gradients[name] * 1e-2 / norm
            found = getattr(trained, part).state_dict()[name]
            torch.testing.assert_close(found - weight, expected - weight, rtol=1e-4, atol=3e-8)
    decaying = replace_train(config, weight_decay=0.5).train
    assert [g["weight_decay"] for g in loop.groups(model, decaying)] == [0.5, 0.0]
    assert len(loop.groups(Diffusion(CONFIG.model, DATA.item_shape, Pixels(5)), config.train)) == 1


def test_a_schedule_that_goes_wrong_stops_the_run(tmp_path, monkeypatch):
    real = loop.share_gradient

    def poisoned(accelerator, diffusion):
        real(accelerator, diffusion)
        diffusion.schedule.low.grad.fill_(float("nan"))

    monkeypatch.setattr(loop, "share_gradient", poisoned)
    with pytest.raises(NonFiniteError, match="the gradient of step 1 is not finite"):
        train(LEARNED, tmp_path / "run")


def test_processes_share_a_schedules_gradient():
    class Two:
        num_processes, device = 2, "cpu"

        def reduce(self, tensor, how):
            assert how == "mean"
            return (tensor + 3) / 2

    model = Diffusion(LEARNED.model, DATA.item_shape, Pixels(5))
    for parameter in model.schedule.parameters():
        parameter.grad = torch.ones_like(parameter)
    loop.share_gradient(Two(), model)
    assert all(bool((p.grad == 2).all()) for p in model.schedule.parameters())
    loop.share_gradient(Two(), Diffusion(CONFIG.model, DATA.item_shape, Pixels(5)))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights of a run that nothing disturbed."""
    return load(train(CONFIG, tmp_path_factory.mktemp("straight"))).network.state_dict()


@pytest.mark.parametrize(("at", "bad"), [(1, float("nan")), (5, float("inf")), (STEPS, float("nan"))])
def test_a_gradient_that_is_no_number_stops_the_run(tmp_path, monkeypatch, straight, bad, at):
    config, real = replace_train(CONFIG, previews=4), batches_of.global_batch

    def poisoned(data, items, settings, step):
        batch = real(data, items, settings, step)
        if step + 1 == at:
            batch[2][3, 0, 1, 2] = bad
        return batch

    monkeypatch.setattr(batches_of, "global_batch", poisoned)
    with pytest.raises(
        NonFiniteError, match=rf"the loss of step {at} is not finite, for 1 of its 12 items: \d+\. "
    ) as caught:
        train(config, tmp_path / "run")
    assert caught.value.exit_code == 5
    monkeypatch.setattr(batches_of, "global_batch", real)
    written = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [int(c.name[5:]) for c in written] == [k for k in (2, 4, 6) if k < at][-2:]
    for place in written:
        tensors = held(tmp_path / "run", int(place.name[5:]))
        assert all(torch.isfinite(t).all() for t in tensors.values())
    assert equal(load(train(config, tmp_path / "run")).network.state_dict(), straight)


def test_a_damaged_checkpoint_costs_one_interval(tmp_path, stop):
    config = replace_train(CONFIG, previews=4)
    stop(STEPS)
    for name in ("whole", "hurt"):
        with pytest.raises(Interrupted):
            train(config, tmp_path / name)
    (tmp_path / "hurt" / "checkpoints" / f"step-{STEPS:08d}" / "network.safetensors").write_bytes(b"x")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watch, "say", lambda watch, line: said.append(line))
        with pytest.raises(Interrupted):
            train(config, tmp_path / "hurt")
    assert sum("An older checkpoint is used" in line for line in said) == 1
    assert any(line.startswith("training goes on") for line in said)
    assert equal(held(tmp_path / "hurt"), held(tmp_path / "whole"))


def test_what_a_run_leaves(tmp_path):
    folder = train(replace_train(CONFIG, previews=3), tmp_path / "run")
    assert Run(folder).finished
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "bits_per_dim" in r] == [3, 6, 8]
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [r["step"] for r in records]
    (last,) = (r for r in records if "loss" in r)
    assert last["step"] == STEPS
    assert last["lr"] == pytest.approx(0.01 / 3)  # the rate of the last step: a third of the fall is left
    assert last["gradient_norm"] > 0
    model = load(folder)
    assert (model.info["steps"], model.info["seed"], model.info["batch"]) == (STEPS, 4, 12)
    assert (model.info["precision"], model.info["held_out"], model.info["levels"]) == ("float32", 0.2, 5)
    assert model.info["fingerprint"] == DATA.fingerprint
    assert model.codec == Pixels(5)
    assert (folder / "pictures" / "samples.png").is_file()
    assert (folder / "pictures" / "training.png").is_file()
    assert not list(folder.rglob("*.partial"))
    before = {f: f.stat().st_mtime_ns for f in (folder / "checkpoints").rglob("*")}
    again = train(replace_train(CONFIG, previews=3), folder)  # nothing is left to train
    assert equal(load(again).network.state_dict(), model.network.state_dict())
    assert before == {f: f.stat().st_mtime_ns for f in (folder / "checkpoints").rglob("*")}


def test_a_stopped_run_has_its_records(tmp_path, stop, monkeypatch):
    """Fifty steps make a record; those since the last look are written too when a signal stops the run."""
    stop(51)
    with pytest.raises(Interrupted):
        train(replace_train(CONFIG, steps=80, batch=2), tmp_path / "run")
    assert [r["step"] for r in Run(tmp_path / "run").read_metrics()] == [50]


def test_other_recipes_and_data_are_refused(tmp_path, stop):
    stop(1)
    with pytest.raises(Interrupted):
        train(CONFIG, tmp_path)
    stop(None)
    with pytest.raises(ConfigError, match=r"train.lr was 0.01, now 0.02"):
        train(replace_train(CONFIG, lr=0.02), tmp_path)
    with pytest.raises(ConfigError, match=r"data\.fingerprint was"):
        train(CONFIG, tmp_path, data=from_array(DATA.values[:39] + 0, levels=5))
    with pytest.raises(ConfigError, match="must divide the batch"):
        train(replace_train(CONFIG, accumulate=5), tmp_path)


def test_starting_from_other_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(Watch, "finish", just_save)
    first = train(replace_train(CONFIG, steps=3), tmp_path / "first")
    still = replace_train(CONFIG, steps=1, lr=1e-12, seed=7)
    for name, init in {"by folder": first, "by file": str(first / "model.safetensors")}.items():
        second = train(still, tmp_path / name, init=init)
        for name, tensor in load(first).network.state_dict().items():
            torch.testing.assert_close(load(second).network.state_dict()[name], tensor, rtol=0, atol=1e-9)
    wider = replace(CONFIG, model=replace(CONFIG.model, network=NET | {"widths": (16,)}))
    with pytest.raises(CheckpointError, match="has the shape"):
        train(wider, tmp_path / "wider", init=first)
    with pytest.raises(CheckpointError, match="no such file"):
        train(CONFIG, tmp_path / "none", init=tmp_path / "nowhere")
    assert not (tmp_path / "wider").exists()


def test_continuous_vectors_for_a_fraction_of_a_minute(tmp_path, monkeypatch):
    """The clock, here a step a second, plans the end of the run; the codec knows the training part alone."""
    data = from_array(np.random.default_rng(1).normal(5, 2, (60, 2)).astype(np.float32), name="vectors")
    ticks = iter(range(10**6))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    config = Config(
        ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, steps=5),
        TrainConfig(batch=8, minutes=0.5, warmup=2, precision="float32", previews=2),
    )
    model = load(train(config, tmp_path, data))
    assert isinstance(model.codec, Standardised)
    assert (model.codec.mean, model.codec.std) == data.moments(data.split().train)
    assert 20 < model.info["steps"] <= 31
    assert model.nll(torch.from_numpy(data.values[:3])).total.isfinite().all()
    assert not isinstance(model.codec, Identity)


def test_progress_is_plain():
    assert state.Progress(**json.loads(json.dumps(vars(state.Progress(3, 1.5, 2, 9))))) == state.Progress(3, 1.5, 2, 9)
