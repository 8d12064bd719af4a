"""Numbers of fixed seeds: samples, likelihoods, losses, a resumed run and a classifier.

`python tests/golden_numbers.py FILE` records them. A change of layout or names must not change any of them: on one
machine they are equal to the bit. tests/test_golden_numbers.py compares with a record.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tiny_run import data, quick_looks, recipe, stopping_at, train
from torch import Tensor

from undiffuse.data import transform as transforms
from undiffuse.data.from_array import from_array
from undiffuse.model import noisy_classifier
from undiffuse.model.checkpoint import load
from undiffuse.model.config import ModelConfig, TrainConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.restoration import Degradation, restore
from undiffuse.networks.condition import Condition
from undiffuse.runtime.tensor_file import read_tensors, write_tensors
from undiffuse.sampling.sampler import Sampler
from undiffuse.sampling.solvers import SOLVERS
from undiffuse.training.classifier_task import ClassifierRecipe, fit_classifier

UNET = {"kind": "unet", "widths": (8, 8), "blocks": 1, "attention": (1,), "heads": 2, "classes": 3}
LOG_SNR = {"name": "linear_log_snr", "high": 6.0}
MODELS = {
    "levels": (
        ModelConfig(network=UNET, schedule=LOG_SNR, chain_length=20, output="categorical"),
        transforms.IntegerLevels(5),
    ),
    "learned": (
        ModelConfig(
            network=UNET | {"norm": "layer", "fourier": (1,), "patch": 2, "learned_resampling": False},
            schedule={"name": "linear_rescaled", "T": 20},
            target={"name": "eps"},
            loss="hybrid",
            variance="learned",
            chain_length=20,
        ),
        transforms.IntegerLevels(5),
    ),
    "vdm": (
        ModelConfig(
            network=UNET | {"scale_shift": True},
            schedule={"name": "learned", "high": 6.0},
            times={"name": "uniform", "low": 0.0},
            loss="continuous",
            chain_length=20,
        ),
        transforms.IntegerLevels(5),
    ),
    "flow": (
        ModelConfig(
            network={"kind": "mlp", "width": 16, "depth": 2, "classes": 3, "vector": 2, "tokens": 4},
            schedule={"name": "flow"},
            target={"name": "flow"},
            weight={"name": "simple"},
            times={"name": "logit_normal"},
            preconditioning={"scale": "unit", "time": "thousand"},
            chain_length=20,
        ),
        transforms.Standardized((0.5, -1.0, 0.0), (1.0, 2.0, 0.5)),
    ),
}
SHAPES = {"flow": (3,)}
SKIPPED = ("annealed_langevin", "adaptive")
"""Solvers that are slow here."""
SLOW_ODE = ("learned", "vdm")
"""Models whose flow takes half of the time."""


ILL_CONDITIONED = ("learned codes", "learned ode", "pigdm")
"""Numbers that are left out, because two machines do not agree: the random weights of "learned" multiply relative
errors by 2e4 and more on the way to noise, so that of its flow only the total is compared (its parts differ by 3 % on
an Intel Xeon with AMX, the total by 3e-5); of the levels that "pigdm" restores 9 of 128 are others with AVX2."""


def model(name: str) -> Diffusion:
    """One of `MODELS` with random weights also where the initial ones are 0."""
    config, transform = MODELS[name]
    torch.manual_seed(3)
    built = Diffusion(config, SHAPES.get(name, (1, 8, 8)), transform).eval()
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in built.network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return built


def values(name: str) -> Tensor:
    g = torch.Generator().manual_seed(5)
    if name == "flow":
        return torch.randn(4, 3, generator=g)
    return torch.randint(5, (4, 1, 8, 8), generator=g, dtype=torch.uint8)


def of_models(slow: bool) -> dict[str, Tensor]:
    numbers = {}
    for name in MODELS:
        diffusion, x = model(name), values(name)
        label = Condition(label=torch.tensor([0, 1, 2, -1]))
        for solver in SOLVERS:
            if solver not in SKIPPED:
                numbers[f"{name} {solver}"] = diffusion.sample(4, 6, Sampler(solver, 6), label).double()
        for spacing in ("log_snr", "karras", "quadratic"):
            numbers[f"{name} {spacing}"] = diffusion.sample(4, 6, Sampler(num_steps=6, spacing=spacing)).double()
        guided = Sampler(num_steps=6, guidance=2.0, guidance_rescale=0.3)
        numbers[f"{name} guided"] = diffusion.sample(4, 6, guided, label).double()
        for estimate in ("discrete", "continuous", "ode"):
            if estimate == "ode" and name in SLOW_ODE and not slow:
                continue
            bound = diffusion.nll(x, seed=7, mc_samples=2, estimate=estimate, cond=label)
            if f"{name} {estimate}" in ILL_CONDITIONED:
                numbers[f"{name} {estimate} total"] = bound.total
                continue
            for part in ("prior", "steps", "decoder"):
                numbers[f"{name} {estimate} {part}"] = getattr(bound, "diffusion_nats" if part == "steps" else part)
        if f"{name} codes" not in ILL_CONDITIONED:
            numbers[f"{name} codes"] = diffusion.to_noise(x, 4).double()
        g = torch.Generator().manual_seed(8)
        u, eps = torch.rand(4, generator=g), torch.randn(x.shape, generator=g)
        loss = diffusion.loss(x, u, eps, eps.flip(0), label)
        loss.mean().backward()
        numbers[f"{name} loss"] = loss.detach()
        numbers[f"{name} gradient"] = torch.stack(
            [p.grad.double().norm() for p in diffusion.parameters() if p.grad is not None]
        )
    return numbers


def of_restoration() -> dict[str, Tensor]:
    diffusion = model("levels")
    known = torch.ones(8, 8, dtype=torch.bool)
    known[2:5] = False
    image = diffusion.transform.to_model(values("levels")[:1])[0]
    degradations = {
        "mmps": Degradation((1, 8, 8), noise_std=0.2),
        "dps": Degradation((1, 8, 8), known=known),
        "repaint": Degradation((1, 8, 8), known=known),
    }
    return {
        name: restore(diffusion, degradation, image, 2, name, num_steps=5).double()
        for name, degradation in degradations.items()
    }


def of_training() -> dict[str, Tensor]:
    """The state, samples and bound of a run that was stopped and resumed, and the weights of a classifier."""
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        run, config = Path(folder) / "run", recipe(6)
        with quick_looks(), stopping_at(3):
            train(config, run, data())
        with quick_looks():
            train(config, run, data())
        step = run / "checkpoints" / "step-00000006"
        for part, file in {"network": "network", "average": "average", "optimizer": "optimizer"}.items():
            tensors = read_tensors(step / f"{file}.safetensors")[0].values()
            for i, tensor in enumerate(sorted(tensors, key=lambda t: (t.shape, float(t.double().sum())))):
                numbers[f"run {part} {i}"] = tensor
        numbers["run samples"] = load(run).sample(8, 1, Sampler(num_steps=4))
        numbers["run bound"] = load(run).nll(torch.from_numpy(data().values[:4]), seed=2, mc_samples=4).total
        g = np.random.default_rng(0)
        images = from_array(g.integers(5, size=(40, 1, 4, 4)), np.arange(40) % 3, num_values=5, name="tiny")
        settings = TrainConfig(
            batch=12, max_steps=4, warmup=2, lr=0.01, precision="float32", held_out=0.2, previews=0, seed=4
        )
        network = {"kind": "unet", "widths": (4, 8), "blocks": 1, "attention": ()}
        config = ClassifierRecipe(noisy_classifier.NoisyClassifierConfig(network, high=6.0), settings)
        run = fit_classifier(config, images, Path(folder) / "classifier", device="cpu", quiet=True)
        for i, tensor in enumerate(noisy_classifier.load(run).state_dict().values()):
            numbers[f"classifier {i}"] = tensor
    return numbers


def numbers(slow: bool = True) -> dict[str, Tensor]:
    """All numbers by name; without the slowest if not ``slow``."""
    torch.set_num_threads(1)
    tensors = of_models(slow) | of_restoration() | of_training()
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    tensors = numbers()
    write_tensors(Path(sys.argv[1]), tensors, {"undiffuse": "golden", "torch": torch.__version__})
    print(f"{len(tensors)} numbers, {Path(sys.argv[1]).stat().st_size:,} bytes: {sys.argv[1]}")
