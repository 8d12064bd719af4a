"""The training loop with diffusion models: forty 4×4 images and a network of a few hundred weights."""

import csv
import json
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import SlowMachine, finish_early, global_batch

from undiffuse.data.from_array import from_array
from undiffuse.data.transform import Identity, IntegerLevels, Standardized
from undiffuse.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from undiffuse.model.checkpoint import load
from undiffuse.model.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.presets import PRESETS, adapt_to_data
from undiffuse.networks.condition import Condition
from undiffuse.runtime.signals import Interrupted, StoppedImmediately, collect_stop_signals
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.sampling.sampler import Sampler
from undiffuse.training import distributed
from undiffuse.training import fit as loop
from undiffuse.training.batches import Batch
from undiffuse.training.diffusion_task import SCHEDULE_LR_FACTOR, DiffusionTask, fit_diffusion
from undiffuse.training.distributed import average_other_gradients
from undiffuse.training.monitor import Monitor
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import Run

DATA = from_array(np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), num_values=5, name="tiny")
NET = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
STEPS = 8
CONFIG = Config(
    ModelConfig(network=NET, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=5),
    TrainConfig(batch=12, max_steps=STEPS, warmup=3, lr=0.01, precision="float32", held_out=0.2, previews=1, seed=4),
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
LABELLED = from_array(DATA.values, np.arange(40) % 3, num_values=5, name="labelled", cond=VECTORS)
CONDITIONAL = replace_train(CONFIG, conditional=True, condition_dropout=0.3, accumulate=2)


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Few sampler steps for pictures, which would take half of the time."""
    monkeypatch.setattr("undiffuse.training.diffusion_task.FINAL_STEPS", 5)


def train(config, out, data=DATA, **settings):
    return fit_diffusion(config, data, out, device="cpu", quiet=True, **settings)


@pytest.fixture
def stop(monkeypatch):
    """stop(k) raises SIGTERM (or another signal) after step k; stop(None) no more."""
    at, kind, real = [None], [signal.SIGTERM], Monitor.record_step

    def step(monitor, *numbers):
        real(monitor, *numbers)
        if monitor.progress.step == at[0]:
            signal.raise_signal(kind[0])

    monkeypatch.setattr(Monitor, "record_step", step)

    def ask(k, number=signal.SIGTERM):
        at[0], kind[0] = k, number

    return ask


def checkpoint_tensors(folder, step=STEPS):
    """All tensors of a checkpoint of training: weights, average and moments."""
    place = folder / "checkpoints" / f"step-{step:08d}"
    return {
        f"{name} {key}": tensor
        for name in ("network", "average", "optimizer")
        for key, tensor in read_tensors(place / f"{name}.safetensors")[0].items()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("config", "data"),
    [(CONFIG, DATA), (ROUGH, DATA), (LEARNED, DATA), (CONDITIONAL, LABELLED)],
    ids=["plain", "accumulated-dropout-flip-bfloat16", "learned-schedule", "conditional"],
)
def test_a_stopped_run_resumes_to_the_bit(config, data, tmp_path, stop):
    def until(k, folder):
        stop(k)
        with pytest.raises(Interrupted) as stopped:
            train(config, folder, data)
        assert stopped.value.exit_code == 143
        return folder

    whole = checkpoint_tensors(until(STEPS, tmp_path / "whole"))
    for k in (1, 2, 5, STEPS):
        until(k, tmp_path / "chain")
    assert equal(checkpoint_tensors(tmp_path / "chain"), whole)
    stop(None)
    for name in ("whole", "chain"):  # only the end is left
        train(config, tmp_path / name, data)
    straight = train(config, tmp_path / "straight", data)
    models = [load(folder) for folder in (straight, tmp_path / "whole", tmp_path / "chain")]
    for other in models[1:]:
        assert equal(other.state_dict(), models[0].state_dict())
        assert torch.equal(*(m.sample(8, seed=1, sampler=Sampler(num_steps=5)) for m in (other, models[0])))
        values = torch.from_numpy(DATA.values[:4])
        assert torch.equal(other.nll(values).total, models[0].nll(values).total)
    pictures = [(folder / "pictures" / "samples.png").read_bytes() for folder in (straight, tmp_path / "chain")]
    assert pictures[0] == pictures[1]
    average = {k.removeprefix("average "): v for k, v in whole.items() if k.startswith("average ")}
    assert equal(models[0].state_dict(), average)  # the model is the average


def test_each_step_has_its_own_dropout(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(Monitor, "record_step", lambda *_: seeds.append(torch.initial_seed()))
    monkeypatch.setattr(Monitor, "finish", finish_early)
    train(CONFIG, tmp_path / "a")
    train(replace_train(CONFIG, seed=5), tmp_path / "b")
    assert len(set(seeds)) == len(seeds) == 2 * STEPS


def test_the_first_signal_saves_and_the_second_stops_at_once(tmp_path, stop, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    stop(2, signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        train(CONFIG, tmp_path / "a")
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [c.name for c in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-00000002"]
    with pytest.raises(CheckpointError, match="resume it"):
        load(tmp_path / "a")  # there is no model yet
    with collect_stop_signals() as stop_requests:
        signal.raise_signal(signal.SIGTERM)
        assert stop_requests == [signal.SIGTERM]
        with pytest.raises(StoppedImmediately) as now:
            signal.raise_signal(signal.SIGINT)
        assert now.value.exit_code == 130
        with pytest.raises(Interrupted) as stopped, stop_requests.safe_to_exit():
            raise AssertionError("a stop was requested")
        assert type(stopped.value) is Interrupted
        assert stopped.value.exit_code == 143


def test_a_signal_during_an_evaluation_stops_at_once(tmp_path, monkeypatch):
    """An evaluation may take a minute and starts after a checkpoint, so nothing is lost; the end is the same."""
    straight = load(train(CONFIG, tmp_path / "straight")).state_dict()
    for part in ("evaluate_now", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(Monitor, part, lambda *_: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Interrupted) as stopped:
                train(replace_train(CONFIG, previews=2), tmp_path / part)
        assert stopped.value.exit_code == 143
        (last, *_) = sorted((tmp_path / part / "checkpoints").iterdir(), reverse=True)
        assert last.name == ("step-00000004" if part == "evaluate_now" else "step-00000008")
        assert equal(load(train(replace_train(CONFIG, previews=2), tmp_path / part)).state_dict(), straight)


def test_evaluations_do_not_change_training(tmp_path, monkeypatch):
    rough = replace_train(ROUGH, precision="float32", accumulate=1)
    weights = []
    for previews in (0, STEPS):
        folder = train(replace_train(rough, previews=previews), tmp_path / str(previews))
        weights.append(load(folder).network.state_dict())
        assert len(list((folder / "pictures").glob("samples-*.png"))) == max(previews, 1)
        assert equal(weights[0], weights[-1]), previews
    monkeypatch.setattr(Monitor, "evaluate_now", lambda monitor, *_: torch.randn(1000))  # any random numbers
    monkeypatch.setattr(Monitor, "finish", finish_early)
    assert equal(weights[0], load(train(replace_train(rough, previews=3), tmp_path / "x")).network.state_dict())
    other = load(train(replace_train(rough, seed=5), tmp_path / "z")).network.state_dict()
    assert not equal(weights[0], other)  # power: a seed does


def test_labels_do_not_change_an_unconditional_run(tmp_path, monkeypatch):
    """A run on data with labels equals the run without labels to the bit, whatever ``condition_dropout`` is."""
    monkeypatch.setattr(Monitor, "finish", finish_early)
    runs = [
        load(train(replace_train(CONFIG, condition_dropout=share), tmp_path / data.name, data)).state_dict()
        for data, share in ((DATA, 0.1), (LABELLED, 0.9))
    ]
    assert equal(*runs)


def test_a_conditional_run_gives_conditions_to_evaluations(tmp_path, monkeypatch):
    measured, drawn = [], []
    real_nll, real_sample = Diffusion.nll, Diffusion.sample
    monkeypatch.setattr(Diffusion, "nll", lambda m, *a, **k: measured.append(k["cond"]) or real_nll(m, *a, **k))
    monkeypatch.setattr(Diffusion, "sample", lambda m, *a, **k: drawn.append(k["cond"]) or real_sample(m, *a, **k))
    split = LABELLED.split(0.2)
    model = load(train(CONDITIONAL, tmp_path / "both", LABELLED))
    assert {k: model.config.network[k] for k in ("classes", "vector")} == {"classes": 3, "vector": 2}
    assert model.info["classes"] == ["0", "1", "2"]
    vector = torch.from_numpy(LABELLED.cond[split.train]).double()
    torch.testing.assert_close(model.network.embed.vector.mean.double(), vector.mean(0), rtol=1e-6, atol=1e-6)
    std = torch.stack([vector[:, 0].std(correction=0), torch.ones(()).double()])
    torch.testing.assert_close(model.network.embed.vector.std.double(), std, rtol=1e-6, atol=1e-6)
    held_out, training, final = (sorted(cond.label.tolist()) for cond in measured[-3:])
    assert held_out == final == sorted(LABELLED.labels[split.validation].tolist())
    assert len(training) == len(held_out)
    assert drawn[-1].vector.tolist() == LABELLED.cond[np.resize(split.validation, 64)].tolist()
    labelled = from_array(DATA.values, np.arange(40) % 3, num_values=5)
    train(replace_train(CONDITIONAL, max_steps=1), tmp_path / "labels", labelled)
    assert drawn[-1].label.tolist() == (torch.arange(64) % 3).tolist()  # each label in turn
    train(replace_train(CONDITIONAL, max_steps=1, held_out=0.0), tmp_path / "all", LABELLED)
    assert drawn[-1].label.tolist() == LABELLED.labels[np.resize(np.arange(40), 64)].tolist()


def test_conditions_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"error\[NO_CONDITIONS\] tiny: these data have no labels"):
        train(CONDITIONAL, tmp_path / "a")
    other = replace(CONDITIONAL, model=replace(CONFIG.model, network=NET | {"classes": 4}))
    with pytest.raises(ConfigError, match=r"model.network.classes = 4: the data make it 3"):
        train(other, tmp_path / "b", LABELLED)
    agreeing = replace(CONDITIONAL, model=replace(CONFIG.model, network=NET | {"classes": 3}))
    assert adapt_to_data(agreeing, 5, LABELLED.condition_sizes).model.network == NET | {"classes": 3, "vector": 2}
    assert adapt_to_data(agreeing, 5, {}).model.network == NET | {"classes": 3}
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("kind", ["label", "vector"])
def test_training_learns_to_follow_the_condition(kind, tmp_path, monkeypatch):
    """Two clusters at −2 and 2 with a label or a vector each: samples are in the cluster of the condition, or in both.

    Seconds of a small network: a test of conditions, not of the quality of samples.
    """
    monkeypatch.setattr(Monitor, "finish", finish_early)
    side = np.arange(400) % 2
    values = (np.random.default_rng(0).normal(size=(400, 1)) * 0.3 + 4.0 * side[:, None] - 2.0).astype(np.float32)
    more = {"labels": side} if kind == "label" else {"cond": 1000.0 + 50.0 * side[:, None]}
    config = Config(
        ModelConfig(network={"kind": "mlp", "width": 32, "depth": 2}, schedule={"name": "linear_log_snr", "high": 8.0}),
        TrainConfig(batch=128, max_steps=150, lr=5e-3, warmup=20, precision="float32", previews=0, conditional=True),
    )
    model = load(train(config, tmp_path / "run", from_array(values, **more)))
    for goal in (0, 1):
        value = torch.full((50,), goal) if kind == "label" else torch.full((50, 1), 1000.0 + 50.0 * goal)
        x = model.sample(50, sampler=Sampler(num_steps=20), cond=Condition(**{kind: value}))
        assert ((x - (4.0 * goal - 2.0)).abs() < 2).float().mean() > 0.95
    unconditional = model.sample(200, sampler=Sampler(num_steps=20))
    assert 0.25 < (unconditional > 0).float().mean() < 0.75
    assert (unconditional.abs() > 1).float().mean() > 0.5


def plain_descent(monkeypatch):
    """(loss, gradient norm, learning rate) of each step of a run with gradient descent in place of AdamW."""
    steps, real = [], Monitor.record_step

    def step(monitor, *numbers):
        steps.append(numbers[:3])
        real(monitor, *numbers)

    def descent(parameters, lr, **_):
        return torch.optim.SGD(parameters, lr=lr)

    monkeypatch.setattr(torch.optim, "AdamW", descent)
    monkeypatch.setattr(Monitor, "record_step", step)
    monkeypatch.setattr(Monitor, "finish", finish_early)
    return steps


def test_accumulation_is_the_whole_batch(tmp_path, monkeypatch):
    steps = plain_descent(monkeypatch)
    runs = []
    for accumulate in (1, 3, 12):
        del steps[:]
        folder = train(replace_train(CONFIG, accumulate=accumulate, max_steps=4, lr=1.0), tmp_path / str(accumulate))
        runs.append((torch.tensor(steps), load(folder).network.state_dict()))
    for numbers, weights in runs[1:]:
        torch.testing.assert_close(numbers, runs[0][0], rtol=1e-5, atol=1e-6)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, runs[0][1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_one_step_by_hand(tmp_path, monkeypatch, clip):
    """w − lr (1/warmup) g min(1, clip/‖g‖), with g the gradient of the mean loss of the step's own batch."""
    steps = plain_descent(monkeypatch)
    config = replace_train(CONFIG, max_steps=1, lr=2.0, warmup=4, decay=0.0, clip=clip)
    trained = load(train(config, tmp_path / "run"))
    torch.manual_seed(4)
    model = Diffusion(config.model, DATA.item_shape, IntegerLevels(5)).train()
    batch = global_batch(DATA, DATA.split(0.2).train, config.train, 0)
    model.loss(batch.values, batch.u, batch.eps, cond=batch.cond).mean().backward()
    gradients = {name: p.grad for name, p in model.network.named_parameters()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert steps == [(pytest.approx(steps[0][0]), pytest.approx(float(norm), rel=1e-5), 0.5)]
    for name, weight in model.network.named_parameters():
        expected = weight.detach() - 0.5 * gradients[name] * min(1.0, clip / float(norm))
        torch.testing.assert_close(trained.network.state_dict()[name], expected, rtol=1e-4, atol=1e-7)


def test_one_step_of_a_learned_schedule_by_hand(tmp_path, monkeypatch):
    """The schedule moves at its own learning rate, by its own gradient, clipped by its own norm."""
    steps = plain_descent(monkeypatch)
    config = replace_train(LEARNED, max_steps=1, lr=1.0, warmup=4, decay=0.0, clip=1e-2)
    trained = load(train(config, tmp_path / "run"))
    torch.manual_seed(4)
    model = Diffusion(config.model, DATA.item_shape, IntegerLevels(5)).train()
    batch = global_batch(DATA, DATA.split(0.2).train, config.train, 0)
    model.loss(batch.values, batch.u, batch.eps, cond=batch.cond).mean().backward()
    for part, lr_factor in (("network", 1.0), ("schedule", SCHEDULE_LR_FACTOR)):
        gradients = {name: p.grad for name, p in getattr(model, part).named_parameters()}
        norm = float(torch.stack([g.norm().double() for g in gradients.values()]).norm())
        assert norm > 1e-2
        if part == "network":
            assert steps[0][1:] == (pytest.approx(norm, rel=1e-5), 0.25)
        for name, weight in getattr(model, part).named_parameters():
            expected = weight.detach() - 0.25 * lr_factor * gradients[name] * 1e-2 / norm
            actual = getattr(trained, part).state_dict()[name]
            torch.testing.assert_close(actual - weight, expected - weight, rtol=1e-4, atol=3e-8)
    groups = DiffusionTask(replace_train(config, weight_decay=0.5)).parameter_groups(model)
    assert [g["weight_decay"] for g in groups] == [0.5, 0.0]
    fixed = Diffusion(CONFIG.model, DATA.item_shape, IntegerLevels(5))
    assert len(DiffusionTask(CONFIG).parameter_groups(fixed)) == 1


def test_a_nan_in_the_gradient_of_a_schedule_stops_the_run(tmp_path, monkeypatch):
    def poisoned(accelerator, model):
        model.schedule.low.grad.fill_(float("nan"))

    monkeypatch.setattr(loop, "average_other_gradients", poisoned)
    with pytest.raises(NonFiniteError, match="the gradient of step 1 is not finite"):
        train(LEARNED, tmp_path / "run")


def test_processes_average_the_gradient_of_a_schedule():
    class Two:
        num_processes, device = 2, "cpu"

        def reduce(self, tensor, how):
            assert how == "mean"
            return (tensor + 3) / 2

    model = Diffusion(LEARNED.model, DATA.item_shape, IntegerLevels(5))
    for parameter in model.schedule.parameters():
        parameter.grad = torch.ones_like(parameter)
    average_other_gradients(Two(), model)
    assert all(bool((p.grad == 2).all()) for p in model.schedule.parameters())
    average_other_gradients(Two(), Diffusion(CONFIG.model, DATA.item_shape, IntegerLevels(5)))  # has none


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_have_the_clock_and_the_plan_of_the_first(monkeypatch, processes):
    first = torch.tensor([7.25, 30, float("nan")], dtype=torch.float64)
    monkeypatch.setattr(distributed, "host_group", lambda: None)
    monkeypatch.setattr(distributed.dist, "broadcast", lambda numbers, source, group: numbers.copy_(first))
    progress = Progress(seconds=9.5, decay_from=20, last_step=40)
    distributed.broadcast_progress(SimpleNamespace(num_processes=processes, device="cpu"), progress)
    expected = (9.5, 20, 40) if processes == 1 else (7.25, 30, None)
    assert (progress.seconds, progress.decay_from, progress.last_step) == expected


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The weights of an undisturbed run."""
    return load(train(CONFIG, tmp_path_factory.mktemp("straight"))).network.state_dict()


@pytest.mark.parametrize(("at", "bad"), [(1, float("nan")), (5, float("inf")), (STEPS, float("nan"))])
def test_a_nan_or_infinity_stops_the_run(tmp_path, monkeypatch, straight, bad, at):
    config, real = replace_train(CONFIG, previews=4), Batch.eps

    def poisoned(batch):
        eps = real.func(batch)
        if batch.numbers == range(12 * (at - 1), 12 * at):  # not the items that measure the memory
            eps[3, 0, 1, 2] = bad
        return eps

    monkeypatch.setattr(Batch, "eps", property(poisoned))
    with pytest.raises(
        NonFiniteError, match=rf"the loss of step {at} is not finite, for 1 of its 12 items: \d+\. "
    ) as caught:
        train(config, tmp_path / "run")
    assert caught.value.exit_code == 5
    monkeypatch.setattr(Batch, "eps", real)
    written = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [int(c.name[5:]) for c in written] == [k for k in (2, 4, 6) if k < at][-2:]
    for place in written:
        tensors = checkpoint_tensors(tmp_path / "run", int(place.name[5:]))
        assert all(torch.isfinite(t).all() for t in tensors.values())
    assert equal(load(train(config, tmp_path / "run")).network.state_dict(), straight)


def test_a_damaged_checkpoint_costs_one_interval(tmp_path, stop):
    config = replace_train(CONFIG, previews=4)
    stop(STEPS)
    for name in ("whole", "damaged"):
        with pytest.raises(Interrupted):
            train(config, tmp_path / name)
    (tmp_path / "damaged" / "checkpoints" / f"step-{STEPS:08d}" / "network.safetensors").write_bytes(b"x")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
        with pytest.raises(Interrupted):
            train(config, tmp_path / "damaged")
    assert sum("An older checkpoint is used" in line for line in lines) == 1
    assert any(line.startswith("training resumes") for line in lines)
    assert equal(checkpoint_tensors(tmp_path / "damaged"), checkpoint_tensors(tmp_path / "whole"))


def test_the_files_of_a_run(tmp_path):
    folder = train(replace_train(CONFIG, previews=3), tmp_path / "run")
    assert Run(folder).finished
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "bits_per_dim" in r] == [3, 6, 8]
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [r["step"] for r in records]
    (last,) = (r for r in records if "loss" in r)
    assert last["step"] == STEPS
    assert last["lr"] == pytest.approx(0.01 / 3)  # a third of the decay is left at the last step
    assert last["gradient_norm"] > 0
    model = load(folder)
    assert (model.info["steps"], model.info["seed"], model.info["batch"]) == (STEPS, 4, 12)
    assert (model.info["precision"], model.info["held_out"], model.info["num_values"]) == ("float32", 0.2, 5)
    assert model.info["fingerprint"] == DATA.fingerprint
    assert model.transform == IntegerLevels(5)
    assert (folder / "pictures" / "samples.png").is_file()
    assert not list(folder.rglob("*.partial"))
    before = {f: f.stat().st_mtime_ns for f in (folder / "checkpoints").rglob("*")}
    again = train(replace_train(CONFIG, previews=3), folder)  # nothing is left to train
    assert equal(load(again).network.state_dict(), model.network.state_dict())
    assert before == {f: f.stat().st_mtime_ns for f in (folder / "checkpoints").rglob("*")}


def test_measurements_and_pictures_fit_into_the_memory_of_the_training(tmp_path, monkeypatch):
    """Simulated, five items at once: what is measured is the same to rounding, and only the report is left out."""
    config, lines = replace_train(CONFIG, max_steps=2), []
    whole = train(config, tmp_path / "whole")

    def limited(real):
        def small(model, items, *rest, **options):
            if (items if type(items) is int else len(items)) > 5:
                raise torch.OutOfMemoryError
            return real(model, items, *rest, **options)

        return small

    def no_report(*_):
        raise torch.OutOfMemoryError

    for name in ("nll", "sample"):
        monkeypatch.setattr(Diffusion, name, limited(getattr(Diffusion, name)))
    monkeypatch.setattr("undiffuse.training.monitor.collect", no_report)
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
    run = train(config, tmp_path / "run")
    one, other = ([r for r in Run(folder).read_metrics() if "bits_per_dim" in r] for folder in (whole, run))
    for name in ("bits_per_dim", "final_bits_per_dim", "gap"):
        assert [r[name] for r in one] == pytest.approx([r[name] for r in other], rel=1e-4)
    assert (run / "pictures" / "samples.png").is_file()
    assert "no report: the GPU has too little memory for its pictures" in lines
    assert Run(run).finished


def test_a_stopped_run_has_its_records(tmp_path, stop, monkeypatch):
    """Fifty steps make a record, which is on disk after a signal."""
    stop(51)
    with pytest.raises(Interrupted):
        train(replace_train(CONFIG, max_steps=80, batch=2), tmp_path / "run")
    assert [r["step"] for r in Run(tmp_path / "run").read_metrics()] == [50]


def test_records_of_an_attempt_without_a_checkpoint_are_removed(tmp_path, monkeypatch):
    """When the next attempt begins, which `watch` shows, and not at its first evaluation."""
    seen, real = [], Monitor.record_step

    def record_step(monitor, *numbers):
        real(monitor, *numbers)
        seen.append([r["step"] for r in monitor.run.read_metrics()])
        if len(seen) in (2, 3):
            raise KeyError("killed")

    monkeypatch.setattr(Monitor, "record_step", record_step)
    monkeypatch.setattr("undiffuse.training.monitor.STEPS_PER_RECORD", 1)
    for _ in range(2):
        with pytest.raises(KeyError):
            train(CONFIG, tmp_path / "run")
    assert seen == [[1], [1, 2], [1]]


def test_changed_recipes_and_data_are_refused(tmp_path, stop):
    stop(1)
    with pytest.raises(Interrupted):
        train(CONFIG, tmp_path)
    stop(None)
    with pytest.raises(ConfigError, match=r"train.lr was 0.01, now 0.02"):
        train(replace_train(CONFIG, lr=0.02), tmp_path)
    with pytest.raises(ConfigError, match=r"data\.fingerprint was"):
        train(CONFIG, tmp_path, data=from_array(DATA.values[:39] + 0, num_values=5))
    with pytest.raises(ConfigError, match="must divide the batch"):
        train(replace_train(CONFIG, accumulate=5), tmp_path)


def test_training_from_other_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(Monitor, "finish", finish_early)
    first = train(replace_train(CONFIG, max_steps=3), tmp_path / "first")
    still = replace_train(CONFIG, max_steps=1, lr=1e-12, seed=7)
    for name, init in {"by folder": first, "by file": str(first / "model.safetensors")}.items():
        second = train(still, tmp_path / name, init=init)
        for name, tensor in load(first).network.state_dict().items():
            torch.testing.assert_close(load(second).network.state_dict()[name], tensor, rtol=0, atol=1e-9)
    wider = replace(CONFIG, model=replace(CONFIG.model, network=NET | {"widths": (16,)}))
    with pytest.raises(ConfigError, match=r"model\.network\.widths = \[16\]: the weights of .* with \[8\]"):
        train(wider, tmp_path / "wider", init=first)
    with pytest.raises(CheckpointError, match="no such file"):
        train(CONFIG, tmp_path / "none", init=tmp_path / "nowhere")
    assert not (tmp_path / "wider").exists()


def test_the_weights_that_a_run_started_from_are_not_read_when_it_is_resumed(tmp_path):
    from tiny_run import checkpoint_hashes, data, quick_looks, recipe, stopping_at
    from tiny_run import train as train_tiny

    with quick_looks():
        first = train_tiny(recipe(2, seed=9), tmp_path / "first", data())
        whole = train_tiny(recipe(4), tmp_path / "whole", data(), init=first)
        with stopping_at(2):
            train_tiny(recipe(4), tmp_path / "run", data(), init=first)
        (first / "model.safetensors").unlink()
        run = train_tiny(recipe(4), tmp_path / "run", data(), init=first)
    assert checkpoint_hashes(run, 4) == checkpoint_hashes(whole, 4)


def test_continuous_vectors_for_a_fraction_of_a_minute(tmp_path, monkeypatch):
    """The clock, here one step a second, plans the end of the run; data are scaled by moments of the training part."""
    data = from_array(np.random.default_rng(1).normal(5, 2, (60, 2)).astype(np.float32), name="vectors")
    config = Config(
        ModelConfig(network={"kind": "mlp", "width": 8, "depth": 1}, chain_length=5),
        TrainConfig(batch=8, minutes=0.5, warmup=2, precision="float32", previews=2),
    )
    clock = SlowMachine(monkeypatch, step=1.0)
    model = load(loop.fit(DiffusionTask(config), data, Run(tmp_path), device="cpu", quiet=True, clock=clock))
    assert isinstance(model.transform, Standardized)
    assert (model.transform.mean, model.transform.std) == data.moments(data.split().train)
    assert model.info["steps"] == 27  # two and a half of the thirty seconds are for the last measurement
    assert model.nll(torch.from_numpy(data.values[:3])).total.isfinite().all()
    assert not isinstance(model.transform, Identity)


def test_progress_is_plain_data():
    assert Progress(**json.loads(json.dumps(vars(Progress(3, 1.5, 2, 9))))) == Progress(3, 1.5, 2, 9)


def test_a_table_of_beta_that_falls_is_noted_in_the_log_and_the_model():
    schedule = {"name": "tabulated", "beta": [0.1, 0.4, 0.3, 0.5, 0.9]}
    config = replace(replace_train(CONFIG, max_steps=1, previews=0), model=replace(CONFIG.model, schedule=schedule))
    task, data, lines = loop.adapt_task(DiffusionTask(config), DATA, torch.device("cpu"))
    note = "the table of beta falls in 1 of its 5 steps, first at beta[2] = 0.3 after 0.4"
    assert lines == [f"note: {note}"]
    assert task.build_model(data, data.split(0.2)).info["notes"][-1] == note
    assert loop.adapt_task(DiffusionTask(CONFIG), DATA, torch.device("cpu"))[2] == []


def test_a_weight_that_the_loss_does_not_take_is_noted():
    def notes(**model):
        return list(DiffusionTask(replace(CONFIG, model=ModelConfig(**model))).notes())

    weight = {"name": "min_snr", "limit": 1.0}
    for loss, own in (("hybrid", "simple"), ("bound", "bound"), ("full_bound", "bound"), ("continuous", "bound")):
        line = f"the weight 'min_snr' has no effect: the loss {loss!r} has its own, {own!r}"
        assert notes(loss=loss, weight=weight) == [line]
        assert notes(loss=loss) == notes(loss=loss, weight={"name": own}) == []
    assert notes(weight=weight) == []
    assert not any(DiffusionTask(preset).notes() for preset in PRESETS.values())
