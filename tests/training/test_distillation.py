"""Distillation of tiny models: the run stops and resumes like any other, and its model samples with few calls."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
from tiny_run import checkpoint_hashes, global_batch, stopping_at

from undiffuse.cli.distill import _settings_of
from undiffuse.data.caption_embeddings import CaptionEmbeddings
from undiffuse.data.from_array import from_array
from undiffuse.errors import ConfigError, DataError
from undiffuse.model import checkpoint
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.consistency import few_call_sampler, level_after_gap
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.report.model_facts import model_facts
from undiffuse.training import distillation_task
from undiffuse.training import fit as loop
from undiffuse.training.diffusion_task import DiffusionTask
from undiffuse.training.distillation_task import GAPS, DistillationRecipe, DistillationTask, fit_distillation
from undiffuse.training.monitor import Monitor
from undiffuse.training.progress import Progress
from undiffuse.training.run_folder import Run

DATA = tiny_run.data()
SETTINGS = TrainConfig(
    batch=12, max_steps=6, warmup=2, lr=0.01, precision="float32", held_out=0.2, previews=2, snapshots=0, seed=4
)


@pytest.fixture(scope="module")
def teacher():
    """An untrained conditional model."""
    torch.manual_seed(0)
    config = tiny_run.recipe(conditional=True)
    config = DiffusionTask(config).adapt(DATA, config.train).config
    return DiffusionTask(config).build_model(DATA, DATA.split(0.2)).eval()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A short flow of the teacher in evaluations."""
    monkeypatch.setattr(distillation_task, "TEACHER_STEPS", 2)


def distill(teacher, folder, data=DATA, **options):
    return fit_distillation(teacher, data, folder, SETTINGS, device="cpu", quiet=True, **options)


@pytest.mark.parametrize("pairs", ["teacher", "data"])
def test_a_stopped_run_resumes_to_the_bit(pairs, teacher, tmp_path):
    for k in (2, 5):
        with stopping_at(k):
            distill(teacher, tmp_path / "stopped", pairs=pairs)
    distill(teacher, tmp_path / "stopped", pairs=pairs)
    distill(teacher, tmp_path / "straight", pairs=pairs)
    assert checkpoint_hashes(tmp_path / "stopped", 6) == checkpoint_hashes(tmp_path / "straight", 6)


def test_the_teacher_is_counted_in_the_memory(teacher, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(loop, "check_memory", lambda *arguments: counted.extend(arguments[-1]))
    with stopping_at(1):
        distill(teacher, tmp_path)
    assert counted == [teacher]


def test_the_warmup_of_the_teacher_is_cut_to_that_of_a_short_run(tmp_path):
    for warmup, expected in ((5000, TrainConfig().warmup), (3, 3)):
        folder = tmp_path / str(warmup)
        Run(folder).open(tiny_run.recipe(warmup=warmup), DATA)
        assert _settings_of(folder, max_steps=9).warmup == expected


def test_a_distillation_that_hardly_trained_advises_no_option_that_it_lacks(teacher):
    task = distillation_task.distillation_task(teacher, replace(SETTINGS, max_steps=None, minutes=1.0))
    few = SimpleNamespace(task=task, settings=task.config.train, progress=Progress(step=1), split=DATA.split(0.2))
    [line] = Monitor._hardly_trained(few)
    assert line.endswith(" training items. Distill again with more --minutes, into another --out")


def test_the_model_of_a_run(teacher, tmp_path):
    model = checkpoint.load(distill(teacher, tmp_path / "run", calls=2, guidance=1.5))
    assert model.config == replace(teacher.config, calls=2)
    assert model.info["distilled"] == {
        "teacher": checkpoint.fingerprint(teacher),
        "guidance": 1.5,
        "pairs": "teacher",
        "method": "consistency",
        "both_ways": False,
    }
    cond = Condition(label=torch.arange(4) % 3)
    samples = model.sample(4, cond=cond)
    assert model.default_sampler == few_call_sampler(model.schedule, 2)
    assert torch.equal(samples, model.sample(4, sampler=few_call_sampler(model.schedule, 2), cond=cond))
    with pytest.raises(ConfigError, match=r"DISTILLED.*samples of the data, and this needs their means"):
        model.nll(torch.from_numpy(DATA.values[:2]))
    with pytest.raises(ConfigError, match=r"DISTILLED.*already"):
        distill(model, tmp_path / "again")


def test_the_first_weights_are_those_of_the_teacher(teacher):
    task = DistillationTask(DistillationRecipe(replace(teacher.config, calls=1), SETTINGS), teacher)
    model = task.build_model(DATA, DATA.split(0.2))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_learned_schedule_of_the_teacher_is_not_trained(tmp_path):
    config = tiny_run.recipe()
    model = replace(
        config.model, schedule={"name": "learned"}, times={"name": "uniform", "low": 0.0}, loss="continuous"
    )
    task = DiffusionTask(replace(config, model=model)).adapt(DATA, config.train)
    teacher = task.build_model(DATA, DATA.split(0.2)).eval()
    learned = DistillationTask(DistillationRecipe(replace(teacher.config, calls=1), SETTINGS), teacher)
    schedule = learned.build_model(DATA, DATA.split(0.2)).schedule
    assert not any(parameter.requires_grad for parameter in schedule.parameters())
    run = distill(teacher, tmp_path / "run")
    for name, tensor in checkpoint.load(run).schedule.state_dict().items():
        assert torch.equal(tensor, teacher.schedule.state_dict()[name]), name


@pytest.mark.parametrize("pairs", ["teacher", "data"])
def test_the_loss_has_the_gap_of_the_part_of_the_run(pairs, teacher, monkeypatch):
    """The pairs of a batch are on trajectories of the teacher or of the data; each third of the run has its gap."""
    settings = replace(SETTINGS, conditional=True)
    config = DistillationRecipe(replace(teacher.config, calls=1), settings, pairs)
    task = DistillationTask(config, teacher)
    seen = []
    monkeypatch.setattr(
        distillation_task, "consistency_loss", lambda *pair: seen.append(pair) or torch.zeros(len(pair[1]))
    )
    batch = global_batch(DATA, DATA.split(0.2).train, settings, 0)
    for fraction, gap in ((0.0, GAPS[0]), (0.34, GAPS[1]), (0.99, GAPS[2])):
        task.loss(teacher, replace(batch, fraction=fraction), teacher.network)
        _, x_t, t, x_r, r, of_pair, cond = seen.pop()
        assert of_pair == gap
        expected = level_after_gap(teacher.schedule, t, gap)
        assert torch.equal(r.t, expected.t)
        assert cond is batch.cond
        eps = (x_t - t.broadcast_like(x_t).alpha * teacher.transform.to_model(batch.values)) / t.broadcast_like(
            x_t
        ).sigma
        torch.testing.assert_close(eps, batch.eps, rtol=0, atol=1e-3)
        on_data = r.broadcast_like(x_t).alpha * teacher.transform.to_model(batch.values)
        on_data = on_data + r.broadcast_like(x_t).sigma * batch.eps
        assert torch.allclose(x_r, on_data, rtol=0, atol=1e-5) == (pairs == "data")


def test_the_dropout_of_the_teacher_is_not_used(teacher):
    """A teacher that was trained in the same program is in training mode."""
    task = distillation_task.distillation_task(deepcopy(teacher).train(), SETTINGS).adapt(DATA, SETTINGS)
    batch = global_batch(DATA, DATA.split(0.2).train, task.config.train, 0)
    student = task.build_model(DATA, DATA.split(0.2)).eval()
    assert torch.equal(*(task.loss(student, batch, student.network) for _ in range(2)))


def test_the_facts_about_the_data_are_those_of_the_distillation(teacher, tmp_path, monkeypatch):
    """Those of a teacher from another library say nothing of the data."""
    monkeypatch.setattr(teacher, "info", {"num_values": 5})
    info = checkpoint.load(distill(teacher, tmp_path / "run")).info
    assert (info["fingerprint"], info["classes"], info["held_out"]) == (DATA.fingerprint, list(DATA.classes), 0.2)


def test_items_that_the_teacher_was_trained_on_are_not_held_out(teacher, monkeypatch):
    monkeypatch.setitem(teacher.info, "held_out", 0.05)
    task = distillation_task.distillation_task(teacher, SETTINGS)
    adapted, _, lines = loop.adapt_task(task, DATA, torch.device("cpu"))
    assert adapted.config.train.held_out == 0.05
    assert lines == ["note: held_out is 0.05, that of the teacher, which was trained on the other items"]


def test_conditions_that_the_teacher_does_not_accept_are_left_out(teacher, tmp_path):
    vectors = np.zeros((len(DATA), 2), np.float32)
    more = from_array(DATA.values, DATA.labels, num_values=5, cond=vectors)
    assert checkpoint.load(distill(teacher, tmp_path / "run", more)).condition_sizes == {"classes": 3}


def test_another_text_encoder_of_the_same_size_is_refused():
    def embedded(digest):
        arrays = np.ones((1, 2), np.float32), np.ones((1, 1, 2), np.float16), np.ones((1, 1), bool)
        embeddings = CaptionEmbeddings({"name": "here", "digest": digest}, ("red",), *arrays)
        data = from_array(DATA.values, num_values=5)
        return replace(data, captions=(("red",),) * len(data), embeddings=embeddings)

    settings = replace(SETTINGS, conditional=True)
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
    task = DiffusionTask(Config(ModelConfig(network=network, chain_length=5), settings)).adapt(embedded("1"), settings)
    learner = distillation_task.distillation_task(task.build_model(embedded("1"), DATA.split(0.2)), SETTINGS)
    learner.adapt(embedded("1"), SETTINGS)
    with pytest.raises(DataError, match=r"TEXT_ENCODER.*that of the teacher is here or another version"):
        learner.adapt(embedded("2"), SETTINGS)


def test_what_does_not_fit_is_refused(teacher, tmp_path):
    with pytest.raises(DataError, match=r"SHAPE.*items are 1×4×2 with 5 possible.*of the teacher 1×4×4 with 5"):
        distill(teacher, tmp_path, replace(DATA, values=DATA.values[..., :2]))
    with pytest.raises(DataError, match=r"SHAPE.*items are 1×4×4 with 7 possible.*of the teacher 1×4×4 with 5"):
        distill(teacher, tmp_path, replace(DATA, num_values=7))
    four = from_array(DATA.values, np.arange(len(DATA)) % 4, num_values=5)
    with pytest.raises(DataError, match=r"CONDITION.*their labels have the size 4, those of the teacher 3"):
        distill(teacher, tmp_path, four)
    texts = (("red",),) * len(DATA)
    for others in ({}, {"captions": texts}):
        with pytest.raises(DataError, match=r"NO_CONDITIONS.*these data have no labels, on which the teacher was"):
            distill(teacher, tmp_path, replace(DATA, labels=None, classes=(), **others))
    with pytest.raises(DataError, match=r"CONDITION.*their label 1 is '2', that of the teacher '1'"):
        distill(teacher, tmp_path, replace(DATA, classes=("0", "2", "1")))
    with pytest.raises(ConfigError, match=r"pairs = 'clouds'"):
        distill(teacher, tmp_path, pairs="clouds")
    with pytest.raises(ConfigError, match=r"only a teacher can be guided"):
        distill(teacher, tmp_path, pairs="data", guidance=2.0)
    with pytest.raises(ConfigError, match=r"method = 'magic'"):
        distill(teacher, tmp_path, method="magic")
    with pytest.raises(ConfigError, match=r"both_ways: consistency goes from noise to data only"):
        distill(teacher, tmp_path, both_ways=True)
    with pytest.raises(ConfigError, match=r"both_ways: meanflow goes.*Use the method lagrangian"):
        DistillationRecipe(teacher.config, SETTINGS, method="meanflow", both_ways=True)
    with pytest.raises(ConfigError, match=r"tiny: a flow map gets a second time.*no setting 'two_times'"):
        distill(teacher, tmp_path, method="meanflow")
    with pytest.raises(ConfigError, match=r"model.calls = 17"):
        distill(teacher, tmp_path, calls=17)
    unconditional = Diffusion(ModelConfig(teacher.config.network | {"classes": 0}), DATA.item_shape, teacher.transform)
    with pytest.raises(ConfigError, match=r"guidance = 2: the teacher has no conditions"):
        distill(unconditional, tmp_path, guidance=2.0)
    config = tiny_run.recipe()
    with pytest.raises(ConfigError, match=r"a distilled model learns from another model"):
        tiny_run.train(replace(config, model=replace(config.model, calls=1)), tmp_path, DATA)
    assert not list(tmp_path.iterdir())


def test_facts_of_the_teachers_weights_are_not_those_of_the_student(teacher, monkeypatch):
    own = {
        "imported": {"from": "openai", "weights": "a" * 64, "flags": {}},
        "init": {"weights": "f" * 64, "name": "other", "steps": 7},
        "ema": 0.2,
        "ema_error": 0.03,
    }
    task = distillation_task.distillation_task(teacher, SETTINGS).adapt(DATA, SETTINGS)
    expected = task.build_model(DATA, DATA.split(0.2))
    monkeypatch.setattr(teacher, "info", teacher.info | own)
    student = task.build_model(DATA, DATA.split(0.2))
    assert student.info == expected.info
    assert model_facts(student) == model_facts(expected) != model_facts(teacher)
    assert not own.keys() & student.info.keys()
