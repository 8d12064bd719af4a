"""Training a classifier of noisy items: all that the training loop gives it, and the posterior that it learns."""

import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import LabelledMixture
from tiny_run import SlowMachine, checkpoint_hashes, global_batch, stopping_at

from undiffuse.data.from_array import from_array
from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.denoiser import ConditionedDenoiser
from undiffuse.denoising.guidance import ClassifierGuided
from undiffuse.errors import ConfigError, DataError, NonFiniteError
from undiffuse.model.config import TrainConfig
from undiffuse.model.noisy_classifier import NoisyClassifier, NoisyClassifierConfig, load
from undiffuse.networks.condition import Condition
from undiffuse.process import schedule as S
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.sampling.solvers.ddim import DDIM
from undiffuse.sampling.time_grids import time_grid
from undiffuse.sampling.trajectory import trajectory
from undiffuse.training import classifier_task, memory_estimate
from undiffuse.training.classifier_task import ClassifierRecipe, ClassifierTask, fit_classifier, measure_accuracy
from undiffuse.training.extend import extend
from undiffuse.training.fit import fit
from undiffuse.training.monitor import Monitor
from undiffuse.training.optimizer import make_optimizer
from undiffuse.training.run_folder import Run

UNET = {"kind": "unet", "widths": (4, 8), "blocks": 1, "attention": ()}
MLP = {"kind": "mlp", "width": 32, "depth": 2}
IMAGES = from_array(
    np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), np.arange(40) % 3, num_values=5, name="tiny"
)
CONFIG = ClassifierRecipe(
    NoisyClassifierConfig(UNET, high=6.0),
    TrainConfig(batch=12, max_steps=4, warmup=2, lr=0.01, precision="float32", held_out=0.2, previews=2, seed=4),
)


def config(**settings):
    return replace(CONFIG, train=replace(CONFIG.train, **settings))


def train(recipe, folder, data=IMAGES, **options):
    return fit_classifier(recipe, data, folder, device="cpu", quiet=True, **options)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rough", [False, True], ids=["plain", "accumulated-dropout-flip-bfloat16"])
def test_a_stopped_run_resumes_to_the_bit(rough, tmp_path):
    recipe = config(accumulate=3, flip=True, precision="bfloat16") if rough else CONFIG
    if rough:
        recipe = replace(recipe, model=replace(CONFIG.model, network={**UNET, "dropout": 0.5}))
    for k in range(1, 5):
        with stopping_at(k):
            train(recipe, tmp_path / "stopped")
    train(recipe, tmp_path / "stopped")
    train(recipe, tmp_path / "straight")
    assert checkpoint_hashes(tmp_path / "stopped", 4) == checkpoint_hashes(tmp_path / "straight", 4)
    one, other = (load(tmp_path / name) for name in ("stopped", "straight"))
    assert all(torch.equal(one.state_dict()[name], tensor) for name, tensor in other.state_dict().items())
    assert one.info | {"seconds": 0} == other.info | {"seconds": 0}
    average, _ = read_tensors(tmp_path / "straight" / "checkpoints" / "step-00000004" / "average.safetensors")
    assert all(torch.equal(average[name], tensor) for name, tensor in other.state_dict().items())


def test_an_extended_run_is_the_longer_run(tmp_path):
    train(config(previews=4, decay=0.5), tmp_path / "run")
    longer, step = extend(tmp_path / "run", IMAGES, steps=2, config_type=ClassifierRecipe)
    assert (longer.train.max_steps, step) == (6, 2)
    train(longer, tmp_path / "run")
    train(config(previews=4, decay=0.5, max_steps=6), tmp_path / "straight")
    assert checkpoint_hashes(tmp_path / "run", 6) == checkpoint_hashes(tmp_path / "straight", 6)


def test_a_run_folder_with_figures(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Monitor, "log", lambda monitor, line: lines.append(line))
    folder = train(CONFIG, tmp_path / "run")
    assert Run(folder).finished
    assert lines[0].startswith("training on ")
    assert "held-out accuracy 0." in lines[1]
    assert lines[-1].strip().startswith("final, on ")
    records = Run(folder).read_metrics()
    assert [r["step"] for r in records if "accuracy" in r] == [2, 4]
    assert [set(r) - {"step", "seconds"} for r in records if "final_accuracy" in r] == [
        {"accuracy", "final_accuracy", "items"}
    ]
    assert not list((folder / "pictures").iterdir())
    classifier = load(folder)
    assert classifier.classes == ("0", "1", "2")
    assert (classifier.info["steps"], classifier.info["seed"], classifier.info["name"]) == (4, 4, "tiny")
    rows = classifier.info["accuracy"]
    assert rows == measure_accuracy(classifier, IMAGES, IMAGES.split(0.2).test)
    assert [row["log_snr"] for row in rows] == pytest.approx(np.linspace(-5, 6, 9))
    before = (folder / "model.safetensors").read_bytes()
    assert train(CONFIG, folder) == folder  # a finished run stays as it is
    assert (folder / "model.safetensors").read_bytes() == before
    Run(folder)._write({**Run(folder).record, "finished": False})
    with pytest.raises(ConfigError, match=r"model\.high was 6\.0, now 5\.0"):
        train(replace(CONFIG, model=NoisyClassifierConfig(UNET, high=5.0)), folder)


def test_micro_batches_make_up_the_batch_each_with_its_own_dropout(tmp_path, monkeypatch):
    seeds, real = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
    one, three = (load(train(config(accumulate=n, warmup=0, previews=0), tmp_path / str(n))) for n in (1, 3))
    assert len(seeds) == 2 + 4 + 12  # for the first weights, and for each micro-batch of four steps
    assert len(set(seeds)) == 1 + 12
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(three.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_weights_decay(tmp_path):
    """AdamW subtracts lr · weight_decay · weight, in addition to the step by the gradient."""
    models = []
    for decay in (0.0, 0.9):
        recipe = config(weight_decay=decay, max_steps=1, warmup=0, decay=0.0, previews=0)
        models.append(load(train(recipe, tmp_path / str(decay))).state_dict())
    torch.manual_seed(CONFIG.train.seed)
    first = NoisyClassifier(CONFIG.model, (1, 4, 4), IntegerLevels(5), IMAGES.classes).state_dict()
    for name, start in first.items():
        torch.testing.assert_close(models[0][name] - models[1][name], 0.01 * 0.9 * start, rtol=1e-3, atol=1e-6)


def test_the_optimizer_is_fused():
    classifier = NoisyClassifier(CONFIG.model, (1, 4, 4), IntegerLevels(5), ("a", "b"))
    groups = ClassifierTask(CONFIG).parameter_groups(classifier)
    optimizer = make_optimizer(groups, classifier.network, CONFIG.train)
    assert [group["fused"] for group in optimizer.param_groups] == [True]


def test_data_without_classes_and_runs_without_length_are_refused(tmp_path):
    unlabelled = from_array(np.zeros((9, 1, 4, 4), np.uint8), name="plain")
    one_class = from_array(np.arange(144, dtype=np.uint8).reshape(9, 1, 4, 4), np.zeros(9, int), name="one")
    for data in (unlabelled, one_class):
        with pytest.raises(DataError, match=rf"error\[LABELS\] {data.name}: a classifier needs items of two classes"):
            train(CONFIG, tmp_path / "run", data)
    with pytest.raises(ConfigError, match=r"train\.minutes, train\.max_steps: neither is given"):
        train(config(max_steps=None), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_by_the_clock(tmp_path, monkeypatch):
    task, clock = ClassifierTask(config(max_steps=None, minutes=0.5, batch=4)), SlowMachine(monkeypatch, step=0.2)
    assert Run(fit(task, IMAGES, Run(tmp_path / "clock"), device="cpu", quiet=True, clock=clock)).finished


def test_training_from_other_weights(tmp_path):
    first = train(config(max_steps=2, previews=0), tmp_path / "first")
    second = train(config(max_steps=1, lr=1e-12, seed=7, previews=0), tmp_path / "second", init=first)
    for name, tensor in load(first).state_dict().items():
        torch.testing.assert_close(load(second).state_dict()[name], tensor, rtol=0, atol=1e-9)


# --- what the loop gives to every task --------------------------------------------------------------------------------


@pytest.fixture
def nan_at_step_2(monkeypatch):
    real = ClassifierTask.loss

    def loss(task, model, batch, network):
        losses = real(task, model, batch, network)
        nan = torch.tensor([math.nan] + [0.0] * (len(losses) - 1))
        return losses + nan if len(losses) == 12 and torch.equal(batch.values, poisoned.values) else losses

    poisoned = global_batch(IMAGES, IMAGES.split(0.2).train, replace(CONFIG.train, conditional=True), step=1)
    monkeypatch.setattr(ClassifierTask, "loss", loss)


def test_a_nan_stops_the_run(tmp_path, nan_at_step_2):
    with pytest.raises(NonFiniteError, match=r"the loss of step 2 is not finite, for 1 of its 12 items: \d+\. "):
        train(config(previews=4), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_nan_is_skipped(tmp_path, nan_at_step_2):
    recipe = config(previews=4, on_nonfinite="skip")
    with stopping_at(2):
        train(recipe, tmp_path)
    assert checkpoint_hashes(tmp_path, 1) == checkpoint_hashes(tmp_path, 2)
    train(recipe, tmp_path)
    assert {"step": 2, "skipped": 1} in Run(tmp_path).read_metrics()


def test_too_little_memory_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: 100_000)
    with pytest.raises(ConfigError, match="training needs at least"):
        train(CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_signal_during_an_evaluation_stops_at_once(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(classifier_task, "measure_accuracy", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(BaseException) as stopped:  # noqa: PT011, Interrupted is no Exception
            train(CONFIG, tmp_path / "run")
    assert stopped.value.exit_code == 143
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


# --- accuracy ---------------------------------------------------------------------------------------------------------


class Constant:
    """A classifier that always gives label 1 the largest log-probability, −0.5."""

    schedule = S.LinearLogSNR(4.0, -4.0)
    item_shape, transform = (1, 4, 4), IntegerLevels(5)

    def eval(self):
        return self

    def parameters(self):
        yield torch.zeros(1)

    def __call__(self, x_t, level):
        return torch.tensor([-2.0, -0.5, -1.0]).expand(len(x_t), 3)


def test_accuracy_by_hand():
    items = np.arange(7)  # labels 0 1 2 0 1 2 0
    accuracy = 2 / 7
    assert measure_accuracy(Constant(), IMAGES, items, num_levels=3, batch=4) == [
        {
            "log_snr": pytest.approx(log_snr),
            "accuracy": pytest.approx(accuracy),
            "stderr": pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 7)),
            "log_prob": pytest.approx((3 * -2.0 + 2 * -0.5 + 2 * -1.0) / 7),
            "items": 7,
        }
        for log_snr in (-4.0, 0.0, 4.0)
    ]


@pytest.mark.parametrize("failing", [1, 3, 5])
def test_accuracy_counts_no_item_twice_where_memory_is_too_small(failing):
    """The part is measured again, with the same noise, in halves."""

    class ByNoise(Constant):
        calls = 0

        def __call__(self, x_t, level):
            self.calls += 1
            if self.calls == failing:
                raise torch.OutOfMemoryError
            return x_t.flatten(1)[:, :3].log_softmax(1)

    large = ByNoise()
    large.calls = -100
    rows = [measure_accuracy(model, IMAGES, np.arange(8), num_levels=3, batch=4) for model in (large, ByNoise())]
    assert rows[0] == rows[1]


def test_accuracy_of_no_items_and_of_many():
    assert measure_accuracy(Constant(), IMAGES, np.arange(0)) == []
    assert measure_accuracy(Constant(), IMAGES, np.arange(5000) % 40, num_levels=2)[0]["items"] == 2048


# --- the posterior ----------------------------------------------------------------------------------------------------

MIXTURE = LabelledMixture(
    torch.tensor([0.5, 0.3, 0.2]),
    torch.tensor([[-1.0, 0.0], [1.0, 1.0], [1.0, -1.2]]),
    torch.full((3, 2), 0.04),
    torch.tensor([0, 1, 0]),
)


def test_training_learns_the_posterior_and_guides_samples_by_it(tmp_path):
    """Seconds of training on a mixture: −log p within 0.06 nats of the exact posterior's at every log-SNR.

    Samples of the exact unconditional denoiser follow its gradient. The exact posterior tells their class: without
    guidance each of 200 items has class 1 with probability 0.3, so that 170 would be 17 standard deviations off.
    """
    x, label = MIXTURE.sample_labelled(3000, torch.Generator().manual_seed(0))
    data = from_array(x.float().numpy(), label.numpy(), name="mixture")
    settings = TrainConfig(batch=256, max_steps=150, lr=5e-3, warmup=10, precision="float32", previews=0, snapshots=0)
    classifier = load(train(ClassifierRecipe(NoisyClassifierConfig(MLP, high=8.0), settings), tmp_path / "run", data))
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (classifier.transform.mean, classifier.transform.std))
    mixture = LabelledMixture(  # in the units of the model
        MIXTURE.weights, (MIXTURE.means - mean) / std, MIXTURE.values / std**2, MIXTURE.labels
    )
    test = data.split().test
    inside = classifier.transform.to_model(torch.from_numpy(data.values[test])).double()
    gaps = []
    for k, row in enumerate(measure_accuracy(classifier, data, test, num_levels=5)):
        level = classifier.schedule(1 - k / 4)
        g = torch.Generator().manual_seed(k)
        x_t = level.alpha * inside + level.sigma * torch.randn(inside.shape, generator=g, dtype=torch.float64)
        exact = mixture.log_posterior(x_t, level).gather(1, torch.from_numpy(data.labels[test])[:, None])
        gaps.append(float(exact.mean()) - row["log_prob"])
    assert max(map(abs, gaps)) < 0.06
    assert row["accuracy"] > 0.99

    schedule = S.LinearLogSNR(8.0, -5.0)
    guided = ClassifierGuided(ConditionedDenoiser(mixture.denoiser(schedule), None), classifier.log_prob)
    denoise = ConditionedDenoiser(guided, Condition(label=torch.ones(200, dtype=torch.int64)))
    with torch.no_grad():
        *_, last = trajectory(denoise, DDIM(), time_grid(schedule, 40), noise(200, 2), lambda draws: torch.empty(0))
    labels = mixture.log_posterior(last.x.double(), last.level).argmax(1)
    assert int(labels.sum()) > 170
