"""Training, sampling, likelihoods, restoration and commands on a simulated GPU, with the numbers of the CPU.

What a real GPU adds, its kernels, rounding, memory and speed, is not tested here.
"""

from dataclasses import replace

import golden_numbers
import numpy as np
import pytest
import tiny_run
import torch
from latent_models import tiny_autoencoder
from PIL import Image
from simulated_gpu import GPU, GpuTensor, simulated_gpu
from tiny_run import global_batch

from undiffuse.cli import main
from undiffuse.data.from_array import from_array
from undiffuse.data.stage_data import split_data
from undiffuse.data.transform import IntegerLevels
from undiffuse.denoising.guidance import Guide
from undiffuse.model import likelihood_estimators
from undiffuse.model.autoencoder import AutoencoderConfig
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.noisy_classifier import NoisyClassifier, NoisyClassifierConfig
from undiffuse.model.presets import PRESETS
from undiffuse.model.restoration import SOLVER_METHODS, Degradation, restore
from undiffuse.networks.condition import Condition
from undiffuse.process.ode_integrator import Integrator
from undiffuse.runtime.device import to_device
from undiffuse.runtime.tensor_file import read_tensors
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.sampling.tables import RESTORATION_METHODS
from undiffuse.sampling.trajectory import last_step
from undiffuse.training import diffusion_task, distillation_task
from undiffuse.training.autoencoder_task import AutoencoderRecipe, fit_autoencoder
from undiffuse.training.classifier_task import ClassifierRecipe, fit_classifier
from undiffuse.training.diffusion_task import DiffusionTask, fit_diffusion
from undiffuse.training.distillation_task import fit_distillation

CPU = torch.device("cpu")
DATA = tiny_run.data()
FIXED_STEPS = [solver for solver in SOLVERS if solver != "adaptive"]
"""Solvers but the one that reads the error of each step, and takes minutes here."""
LABEL = Condition(label=torch.tensor([0, 1, 2, -1]))
SLOW = [pytest.param(name, marks=pytest.mark.release) for name in ("levels", "learned", "vdm")]
"""Models of `golden_numbers` other than the small network of vectors."""


def on_both(compute):
    """The tensors ``compute(device)``, which must be on the CPU, computed on the CPU and on the simulated GPU."""
    expected = compute(CPU)
    with simulated_gpu() as counts:
        result = compute(GPU)
    assert not any(isinstance(tensor, GpuTensor) for tensor in result)
    assert counts["operation"] > 0
    return expected, result


def test_the_simulation():
    """It computes, in place and in views too, counts reads and copies, and refuses tensors of two devices."""
    with simulated_gpu() as counts:
        x = torch.arange(3.0).to(GPU)
        x[1:].mul_(2)
        weight = torch.nn.Parameter(torch.ones(3, device=GPU))
        (weight * x).sum().backward()
        assert (x.tolist(), weight.grad.tolist(), float(x.sum())) == ([0, 2, 4], [0, 2, 4], 6)
        assert torch.equal(torch.tensor([1.0, 2.0], device=GPU).cpu(), x.new_tensor([1.0, 2.0]).cpu())
        assert (counts["read"], counts["copy"], counts["waiting copy"]) == (5, 3, 3)  # a list is copied, then read
        to_device(torch.ones(3), GPU)
        assert (counts["copy"], counts["waiting copy"]) == (4, 3)
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: torch.ones(3)[x.long()],
            lambda: torch.cat([x, torch.ones(3)]),
        ):
            with pytest.raises(RuntimeError, match="two devices"):
                mixed()
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()


def sampler(solver):
    settings = {"updates_per_level": 2} if solver == "annealed_langevin" else {}
    return Sampler(solver, 4, settings=settings, guidance=2.0, guidance_rescale=0.3)


@pytest.mark.parametrize("name", ["flow", *SLOW])
@pytest.mark.parametrize("solver", FIXED_STEPS)
def test_samples(solver, name):
    name = "vdm" if (solver, name) == ("annealed_langevin", "flow") else name  # it needs some signal at the start

    def sample(device):
        return [golden_numbers.model(name).to(device).sample(4, 6, sampler(solver), LABEL)]

    (expected,), (samples,) = on_both(sample)
    torch.testing.assert_close(samples.double(), expected.double(), rtol=1e-5, atol=1e-5 if name == "flow" else 1.0)


def test_a_negative_condition_may_have_other_fields():
    network = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": (), "classes": 3, "vector": 2}
    torch.manual_seed(0)
    model = Diffusion(ModelConfig(network, chain_length=5), (1, 4, 4), IntegerLevels(5)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    guide = Guide(negative=Condition(vector=torch.ones(1, 2)))

    def sample(device):
        model.to(device)
        return [model.sample(4, 1, Sampler("ddim", 3, guidance=3.0), LABEL, guide=guide)]

    (expected,), (samples,) = on_both(sample)
    torch.testing.assert_close(samples, expected)


@pytest.mark.parametrize("solver", FIXED_STEPS)
def test_a_step_of_sampling_does_not_wait(solver):
    with simulated_gpu() as counts:
        model = golden_numbers.model("vdm" if solver == "annealed_langevin" else "flow").to(GPU)
        steps = model.trajectory(range(4), 6, sampler(solver), LABEL)
        counts.clear()
        assert last_step(steps).done > 0
    assert counts["copy"] > 0
    assert (counts["waiting copy"], counts["read"]) == (0, 0)


def test_a_step_with_a_classifier_does_not_wait():
    config = NoisyClassifierConfig({"kind": "mlp", "width": 8, "depth": 1}, high=6.0)
    model = golden_numbers.model("flow")
    classifier = NoisyClassifier(config, model.item_shape, model.transform, ("a", "b", "c"))
    with simulated_gpu() as counts:
        guide = Guide(classifier.to(GPU).log_prob)
        steps = model.to(GPU).trajectory(range(4), 6, sampler("ddim"), LABEL, guide)
        counts.clear()
        assert last_step(steps).done > 0
    assert (counts["waiting copy"], counts["read"]) == (0, 0)


@pytest.mark.parametrize(
    ("preset", "coefficients"), [("digits", 7), ("ddpm-cifar10", 6), ("sohl-dickstein", 8), ("adm", 8)]
)
def test_a_step_of_training_does_not_wait(preset, coefficients):
    """The values are copied, and once in a run the two constants of the noise; the numbers of the noise levels are
    copied together, not one by one. The noise is made on the GPU."""
    recipe = PRESETS[preset]
    train = replace(recipe.train, max_steps=1, batch=8, precision="float32")
    task, split = DiffusionTask(replace(recipe, train=train)).adapt(DATA, train), DATA.split(0.1)
    model, batch = task.build_model(DATA, split), global_batch(DATA, split.train, task.config.train, 0)
    with simulated_gpu() as counts:
        model.to(GPU)
        counts.clear()
        task.loss(model, batch.take(slice(8), GPU), model.network).mean().backward()
    assert (counts["waiting copy"], counts["read"]) == (0, 0)
    assert 0 < counts["copy"] <= 1 + 2 + coefficients


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_copy_converts_before(dtype):
    x = torch.tensor([1 / 3, 2.0], dtype=torch.float64)
    with simulated_gpu():
        for device in (CPU, GPU):
            assert torch.equal(to_device(x, device, dtype).cpu(), x if dtype is None else x.float())


@pytest.mark.parametrize("estimate", ["discrete", "continuous", "ode"])
@pytest.mark.parametrize("name", ["flow", *SLOW])
def test_likelihoods(estimate, name, monkeypatch):
    """The flow in equal steps: adaptive ones amplify rounding, and random weights make them many.

    With three of them the weights of "learned" amplify float32's rounding to 2e-5 of −log p.
    """
    for integrator in ("TIGHT_TOLERANCE", "LOOSE_TOLERANCE"):
        monkeypatch.setattr(likelihood_estimators, integrator, Integrator("heun", num_steps=3))
    values = golden_numbers.values(name)

    def measure(device):
        nll = golden_numbers.model(name).to(device).nll(values, seed=7, mc_samples=2, estimate=estimate, cond=LABEL)
        return [nll.prior, nll.diffusion_nats, nll.decoder, nll.stderr]

    expected, result = on_both(measure)
    torch.testing.assert_close(result, expected, rtol=1e-4 if name == "learned" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("method", list(RESTORATION_METHODS))
def test_restoration(method):
    known = torch.ones(8, 8, dtype=torch.bool)
    known[2:5] = False
    image = golden_numbers.model("levels").transform.to_model(golden_numbers.values("levels")[:1])[0]
    degradations = [Degradation((1, 8, 8), known=known, noise_std=0.0 if method == "repaint" else 0.1)]
    if method not in SOLVER_METHODS:  # they take a mask alone
        degradations.append(Degradation((1, 8, 8), blur=1.0, noise_std=0.1))

    def restored(device):
        model = golden_numbers.model("levels").to(device)
        return [restore(model, degradation, image, 2, method, num_steps=3) for degradation in degradations]

    expected, result = on_both(restored)
    torch.testing.assert_close(result, expected, rtol=0, atol=1)


IMAGES = from_array(np.random.default_rng(0).integers(17, size=(40, 1, 8, 8)), num_values=17, name="tiny")
UNET = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": (0,), "heads": 1}
SHORT = {
    "batch": 8,
    "max_steps": 2,
    "warmup": 1,
    "precision": "float32",
    "held_out": 0.2,
    "previews": 1,
    "snapshots": 0,
}


def diffusion(model=None, data=DATA, autoencoder=None, **settings):
    """A function that trains a diffusion model into a folder on a device."""
    config = tiny_run.recipe(2, **settings)
    config = replace(config, model=replace(config.model, **(model or {})))
    return lambda folder, device: fit_diffusion(
        config, data, folder, device=device, quiet=True, autoencoder=autoencoder and autoencoder()
    )


def distilled(network=None, **options):
    config = tiny_run.recipe(conditional=network is None)
    config = replace(config, model=replace(config.model, network=network or config.model.network))
    config = DiffusionTask(config).adapt(DATA, config.train).config

    def train(folder, device):
        torch.manual_seed(0)
        teacher = DiffusionTask(config).build_model(DATA, DATA.split(0.2)).eval()
        fit_distillation(teacher, DATA, folder, TrainConfig(**SHORT), device=device, quiet=True, **options)

    return train


RUNS = {
    "conditional": diffusion(),
    "skipping": diffusion(on_nonfinite="skip"),
    "accumulated": diffusion(accumulate=3, crop=1),
    "muon": diffusion({"network": UNET, "output": "categorical"}, optimizer="muon", conditional=False),
    "learned-schedule": diffusion(
        {
            "schedule": {"name": "learned", "high": 6.0},
            "times": {"name": "uniform", "low": 0.0},
            "loss": "continuous",
        }
    ),
    "latents": diffusion({"network": UNET}, IMAGES, tiny_autoencoder, conditional=False),
    "super-resolution": lambda folder, device: fit_diffusion(
        Config(ModelConfig({**UNET, "attention": ()}, chain_length=5), TrainConfig(**SHORT)),
        split_data(DATA, 2),
        folder,
        device=device,
        quiet=True,
    ),
    "autoencoder": lambda folder, device: fit_autoencoder(
        AutoencoderRecipe(
            AutoencoderConfig({"kind": "kl", "widths": [4, 8], "latent_channels": 2}), TrainConfig(**SHORT)
        ),
        IMAGES,
        folder,
        device=device,
        quiet=True,
    ),
    "classifier": lambda folder, device: fit_classifier(
        ClassifierRecipe(NoisyClassifierConfig({**UNET, "attention": ()}, high=6.0), TrainConfig(**SHORT)),
        DATA,
        folder,
        device=device,
        quiet=True,
    ),
    "consistency": distilled(),
    "flow-map": distilled(UNET, method="lagrangian"),
}


@pytest.fixture
def short(monkeypatch):
    """Evaluations of four items, and teachers of two steps."""
    for name in ("HELD_OUT_ITEMS", "FINAL_ITEMS", "PREVIEW_ITEMS", "FINAL_MC_SAMPLES"):
        monkeypatch.setattr(diffusion_task, name, 4)
    monkeypatch.setattr(distillation_task, "TEACHER_STEPS", 2)


@pytest.mark.parametrize("name", RUNS)
def test_training(name, short, tmp_path):

    def weights(device):
        RUNS[name](tmp_path / device.type, device)
        tensors, _ = read_tensors(tmp_path / device.type / "model.safetensors")
        return [tensors[key] for key in sorted(tensors)]

    expected, result = on_both(weights)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


RECIPE = """
[model]
chain_length = 6
network = {kind = "unet", widths = [4], blocks = 1, attention = []}

[train]
batch = 8
warmup = 1
precision = "float32"
previews = 1
"""
COMMANDS = (
    "train data.npz --config tiny.toml --conditional --steps 2 --out RUN",
    "train data.npz --extend --steps 2 --out RUN",
    "sample RUN --n 4 --steps 3 --guidance 2 --label 1 --out SAMPLES",
    "evaluate RUN --estimate discrete --mc-samples 2 --items 4",
    "restore RUN image.png --blur 1 --steps 3 --out RESTORED",
    "restore RUN image.png --method sdedit --strength 0.5 --steps 3 --out EDITED",
    "interpolate RUN image.png other.png --n 3 --steps 3 --out path.png",
    "ema RUN --length 0.08",
    "distill RUN --calls 1 --steps 2 --out DISTILLED",
    "sample DISTILLED --n 4 --out FEW",
    "train-classifier data.npz --config classifier.toml --steps 2 --out CLASSIFIER",
    "sample RUN --n 4 --steps 3 --classifier CLASSIFIER --label 1 --out GUIDED",
)


def test_the_commands(short, tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    values = random.integers(256, size=(40, 1, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=values, labels=np.arange(40) % 3)
    for name, item in zip(("image.png", "other.png"), values, strict=False):
        Image.fromarray(item[0]).save(tmp_path / name)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "classifier.toml").write_text(RECIPE.replace("chain_length = 6\n", ""))
    monkeypatch.chdir(tmp_path)
    with simulated_gpu():
        for command in COMMANDS:
            code = main([*command.split(), "--device", str(GPU)])
            out, err = capsys.readouterr()
            assert (code, err) == (0, ""), f"{command}\n{out}{err}"
