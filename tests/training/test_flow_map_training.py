"""Flow maps trained for a few steps: runs stop and resume, and the models do what other models do."""

from dataclasses import replace

import pytest
import tiny_run
import torch
from tiny_run import checkpoint_hashes, global_batch, stopping_at

from undiffuse.cli import main
from undiffuse.data.dataset import Dataset
from undiffuse.denoising.two_times import average_velocity, predict_to_with_slope
from undiffuse.errors import ConfigError
from undiffuse.evaluation.run_evaluation import evaluate
from undiffuse.model import checkpoint
from undiffuse.model.config import TrainConfig
from undiffuse.model.consistency import few_call_sampler
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.flow_map import OBJECTIVES
from undiffuse.model.restoration import Degradation, restore
from undiffuse.networks.condition import Condition
from undiffuse.process.gaussian import diffuse
from undiffuse.sampling.sampler import Sampler
from undiffuse.training import distillation_task
from undiffuse.training.diffusion_task import DiffusionTask
from undiffuse.training.distillation_task import fit_distillation

DATA = tiny_run.data()
NETWORK = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": (), "dropout": 0.2, "classes": 3}
SETTINGS = TrainConfig(
    batch=12, max_steps=4, warmup=2, lr=0.01, precision="float32", held_out=0.2, previews=1, snapshots=0, seed=4
)


@pytest.fixture(scope="module")
def teacher():
    """An untrained conditional U-Net with dropout, whose output is not 0."""
    torch.manual_seed(0)
    config = tiny_run.recipe(conditional=True)
    config = replace(config, model=replace(config.model, network=NETWORK))
    config = DiffusionTask(config).adapt(DATA, config.train).config
    model = DiffusionTask(config).build_model(DATA, DATA.split(0.2)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(autouse=True)
def quick(monkeypatch):

    monkeypatch.setattr(distillation_task, "TEACHER_STEPS", 2)


def distill(teacher: Diffusion, folder, data: Dataset = DATA, **options):
    return fit_distillation(teacher, data, folder, SETTINGS, device="cpu", quiet=True, **options)


def built(teacher, **options):
    task = distillation_task.distillation_task(teacher, replace(SETTINGS, conditional=True), **options)
    return task, task.build_model(DATA, DATA.split(0.2))


@pytest.mark.parametrize("method", OBJECTIVES)
def test_a_stopped_run_resumes_to_the_bit(method, teacher, tmp_path):
    pairs = {"lagrangian": "teacher", "meanflow": "data"}[method]
    with stopping_at(2):
        distill(teacher, tmp_path / "stopped", method=method, pairs=pairs)
    distill(teacher, tmp_path / "stopped", method=method, pairs=pairs)
    distill(teacher, tmp_path / "straight", method=method, pairs=pairs)
    assert checkpoint_hashes(tmp_path / "stopped", 4) == checkpoint_hashes(tmp_path / "straight", 4)


def test_the_model_of_a_run_does_what_models_do(teacher, tmp_path, capsys, monkeypatch):
    """Samples, restored images, bounds, the flow's likelihood and the estimate, all with labels; `inspect` says it."""
    options = {"calls": 2, "method": "lagrangian", "both_ways": True, "guidance": 1.5}
    model = checkpoint.load(distill(teacher, tmp_path / "run", **options))
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(tmp_path / "run")]) == 0
    said = f"for 2 network calls from the weights {checkpoint.fingerprint(teacher)[:12]}, lagrangian, with guidance 1.5"
    assert said in " ".join(capsys.readouterr().out.split())
    assert (model.config.calls, model.config.network["two_times"]) == (2, True)
    assert model.info["distilled"]["method"] == "lagrangian"
    with pytest.raises(ConfigError, match=r"DISTILLED.*already: it is a flow map between two times"):
        distill(model, tmp_path / "again")
    torch.nn.init.normal_(model.network.embed.end.fc2.weight)  # after four steps it is almost 0
    cond, sampler = Condition(label=torch.arange(4) % 3), few_call_sampler(model.schedule, 2, "flow_map")
    samples = model.sample(4, cond=cond)
    assert torch.equal(samples, model.sample(4, sampler=sampler, cond=cond))
    assert not torch.equal(samples, model.sample(4, sampler=replace(sampler, solver="ddim"), cond=cond))
    assert model.sample(4, sampler=Sampler("flow_map", guidance=2.0, num_steps=3), cond=cond).shape == samples.shape
    image = torch.zeros(1, 4, 4)
    restored = restore(model, Degradation((1, 4, 4), noise_std=0.1), image, 2, num_steps=3, cond=cond.take(slice(2)))
    assert restored.shape == (2, 1, 4, 4)
    result = evaluate(model, DATA, part="all", items=3, estimates=("discrete", "ode", "flow_map"), minutes=0.1)
    few, flow = result.nll["flow_map"], result.nll["ode"]
    assert bool(torch.isfinite(few.total).all())
    assert few.calls == 2
    torch.testing.assert_close(few.decoder, flow.decoder)  # the same dequantizing noise: paired by item
    text = " ".join(result.explanations())
    assert "flow map: an estimate and no bound" in text
    assert "flow map minus probability flow, item by item: " in text


def test_other_models_have_no_such_estimate(teacher):
    with pytest.raises(ConfigError, match=r"only a flow map both ways has it"):
        teacher.nll(torch.from_numpy(DATA.values[:2]), estimate="flow_map")
    with pytest.raises(ConfigError, match=r"ESTIMATE.*flow_map"):
        evaluate(teacher, DATA, part="all", items=3, estimates=("flow_map",))


def test_a_map_both_ways_starts_without_slope(teacher):
    """Its further outputs are 0 at first, and the others are the teacher's; one step moves both."""
    task, model = built(teacher, method="lagrangian", both_ways=True)
    x, level = torch.randn(2, 1, 4, 4), model.schedule(torch.tensor([0.9, 0.4]))
    prediction, slope = predict_to_with_slope(model.eval().denoiser(), x, level, model.schedule(torch.tensor(0.1)))
    assert torch.equal(prediction.x, teacher.denoiser()(x, level).x)
    assert slope.shape == x.shape
    assert not bool(slope.any())
    batch = global_batch(DATA, DATA.split(0.2).train, task.config.train, 0)
    task.loss(model, batch, model.network).sum().backward()
    rows = model.network.conv_out.weight.grad.flatten(1).abs().sum(1)
    assert bool((rows > 0).all())


@pytest.mark.parametrize("method", OBJECTIVES)
def test_the_first_map_has_the_velocity_of_the_teacher(method, teacher):
    """At every end; and training is never in bfloat16, whose precision is below that of a difference."""
    task, model = built(teacher, method=method)
    assert task.adapt(DATA, replace(SETTINGS, precision="bfloat16")).config.train.precision == "float32"
    x, level = torch.randn(2, 1, 4, 4), model.schedule(torch.tensor([0.9, 0.4]))
    prediction = teacher.denoiser()(x, level)
    for s in (level, model.schedule(torch.tensor([0.1, 0.0]))):
        assert torch.equal(average_velocity(model.eval().denoiser(), x, level, s), prediction.eps - prediction.x)


@pytest.mark.parametrize("pairs", ["teacher", "data"])
@pytest.mark.parametrize("method", OBJECTIVES)
def test_the_velocity_of_a_loss(method, pairs, teacher, monkeypatch):
    """The teacher's everywhere; or ε − x at x_t, where MeanFlow needs no other, and elsewhere the model's own."""
    task, model = built(teacher, method=method, pairs=pairs)
    seen = []

    def objective(*arguments):
        seen.append(arguments)
        return arguments[2]

    monkeypatch.setitem(OBJECTIVES, method, objective)
    batch = global_batch(DATA, DATA.split(0.2).train, task.config.train, 0)
    losses = task.loss(model.eval(), batch, model.network)
    assert losses.shape == (12,)
    denoise, velocity, x_t, t, s, cond = seen.pop()
    assert cond is batch.cond
    assert denoise.network is model.network
    x = model.transform.to_model(batch.values)
    torch.testing.assert_close(x_t, diffuse(x, t, batch.eps))
    diagonal = t.t == s.t
    assert 0 < int(diagonal.sum()) < 12
    found = velocity(x_t, t)
    at = teacher.sampling_denoiser() if pairs == "teacher" else model.denoiser()
    prediction = at(x_t, t, batch.cond)
    own, of_data = prediction.eps - prediction.x, batch.eps - x
    expected = own if pairs == "teacher" else torch.where(diagonal.reshape(-1, 1, 1, 1), of_data, own)
    torch.testing.assert_close(found, of_data if (method, pairs) == ("meanflow", "data") else expected)
