"""A compact GAN to compare with: ``python benchmarks/gan/gan.py OUT --data digits|fashion-mnist --minutes M``.

The relativistic pairing loss with zero-centred gradient penalties on real and on generated images, as Huang et al. 2024
(R3GAN, arXiv 2501.05441) state them, with residual networks without normalization. The generator has about
``--parameters`` parameters, and the critic as many. OUT holds a checkpoint, from which an interrupted run goes on to
the same result, samples.npy and result.json; printed are Fréchet and kernel distance, precision and recall as of
`undiffuse compare`, and images per second. Minutes are those of the training steps alone, in processor time per thread,
which on an idle machine is that of the clock. Precision is that of `undiffuse train`: bfloat16 where the processor has
it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from undiffuse import load_data
from undiffuse.data.transform import transform_for
from undiffuse.evaluation.comparison import compare
from undiffuse.process.seeded_noise import generator
from undiffuse.training.fit import resolve_precision

LATENT, SLOPE = 64, 0.2
BATCH, EMA, SAVE_SECONDS = 64, 0.999, 60.0
BETAS = (0.0, 0.99)
METRICS = ("frechet", "kernel", "precision", "recall")


# --- the loss ---------------------------------------------------------------------------------------------------------


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(D(G(z)) − D(x)), (B,): the critic ranks each real image above the generated one of its pair."""
    return F.softplus(fake - real)


def generator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(D(x) − D(G(z))), (B,)."""
    return F.softplus(real - fake)


def gradient_penalty(critic: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(D(x), ‖∇ D(x)‖²), (B,) each, differentiable: R1 on real images, R2 on generated ones."""
    x = x.detach().requires_grad_()
    score = critic(x)
    (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return score, gradient.square().flatten(1).sum(1)


# --- the networks -----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """h + W₂ a(W₁ a(h)), a the leaky ReLU, both of 3×3; W₂ starts at 0, as there is no normalization.

    The paper's blocks have grouped convolutions, whose second derivative takes many times as long on a processor.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.second.weight)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(F.leaky_relu(self.first(F.leaky_relu(h, SLOPE)), SLOPE))


def level(width: int) -> nn.Sequential:
    return nn.Sequential(Residual(width), Residual(width))


class Generator(nn.Module):
    """(B, channels, size, size) in (−1, 1) from z (B, `LATENT`); each level has twice the size and half the width."""

    def __init__(self, width: int, levels: int, channels: int, size: int) -> None:
        super().__init__()
        self.start, widths = size >> levels, [width << i for i in reversed(range(levels + 1))]
        self.basis = nn.Parameter(torch.randn(widths[0], self.start, self.start))
        self.linear = nn.Linear(LATENT, widths[0])
        self.levels = nn.ModuleList(map(level, widths))
        self.narrow = nn.ModuleList(nn.Conv2d(2 * w, w, 1) for w in widths[1:])
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.levels[0](self.basis * self.linear(z)[:, :, None, None])
        for narrow, blocks in zip(self.narrow, self.levels[1:], strict=True):
            h = blocks(F.interpolate(narrow(h), scale_factor=2.0, mode="bilinear"))
        return torch.tanh(self.out(F.leaky_relu(h, SLOPE)))


class Critic(nn.Module):
    """A number for each image (B,): the generator in the other direction."""

    def __init__(self, width: int, levels: int, channels: int, size: int) -> None:
        super().__init__()
        widths = [width << i for i in range(levels + 1)]
        self.enter = nn.Conv2d(channels, width, 1)
        self.levels = nn.ModuleList(map(level, widths))
        self.widen = nn.ModuleList(nn.Conv2d(w, 2 * w, 1) for w in widths[:-1])
        self.linear = nn.Linear(widths[-1] * (size >> levels) ** 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.levels[0](self.enter(x))
        for widen, blocks in zip(self.widen, self.levels[1:], strict=True):
            h = blocks(widen(F.avg_pool2d(h, 2)))
        return self.linear(F.leaky_relu(h, SLOPE).flatten(1))[:, 0].float()


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def build(parameters: int, channels: int, size: int) -> tuple[Generator, Critic]:
    """The pair whose generator has the nearest number of parameters; the finest width is a multiple of 4."""
    levels = int(math.log2(size & -size))  # down to an odd number of cells, at least 4
    while levels and size >> levels < 4:
        levels -= 1
    with torch.device("meta"):
        sizes = {width: count(Generator(width, levels, channels, size)) for width in range(4, 257, 4)}
    width = min(sizes, key=lambda w: abs(sizes[w] - parameters))
    return Generator(width, levels, channels, size), Critic(width, levels, channels, size)


# --- training ---------------------------------------------------------------------------------------------------------


class Training:
    """Both networks, the average of the generator's weights, and the optimizers; every draw is a function of a step."""

    def __init__(self, parameters: int, item_shape: tuple[int, ...], seed: int, lr: float, gamma: float) -> None:
        torch.manual_seed(seed)
        self.seed, self.gamma, self.step, self.seconds = seed, gamma, 0, 0.0
        self.bfloat16 = resolve_precision("auto", torch.device("cpu")) == "bfloat16"
        self.generator, self.critic = build(parameters, item_shape[0], item_shape[-1])
        self.average = copy.deepcopy(self.generator)
        self.optimizers = [torch.optim.Adam(n.parameters(), lr, BETAS) for n in (self.generator, self.critic)]

    def parts(self) -> dict[str, Any]:
        return {"generator": self.generator, "critic": self.critic, "average": self.average} | {
            f"optimizer {i}": optimizer for i, optimizer in enumerate(self.optimizers)
        }

    def save(self, path: Path) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save(state | {"step": self.step, "seconds": self.seconds}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]

    def train_step(self, x: Tensor) -> None:
        """One step on the images ``x`` (N, ...) of the training part: the critic, then the generator."""
        began, g = time.process_time(), generator(self.seed, "gan", self.step)
        pick = torch.randint(len(x), (2, BATCH), generator=g)
        z = torch.randn(2, BATCH, LATENT, generator=g)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            self._update(x[pick[0]], x[pick[1]], z[0], z[1])
        decay = min(EMA, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.generator.parameters(), strict=True):
                mean.lerp_(p, 1 - decay)
        self.step += 1
        self.seconds += (time.process_time() - began) / torch.get_num_threads()

    def _update(self, first: Tensor, second: Tensor, z_first: Tensor, z_second: Tensor) -> None:
        """The critic on one batch of images and latents, then the generator on another."""
        penalty = self.penalty_factor() * self.gamma / 2
        with torch.no_grad():
            fake = self.generator(z_first)
        real_score, r1 = gradient_penalty(self.critic, first)
        fake_score, r2 = gradient_penalty(self.critic, fake)
        loss = critic_loss(real_score, fake_score) + penalty * (r1 + r2)
        self._apply(1, loss)
        self.critic.requires_grad_(False)
        with torch.no_grad():
            real_score = self.critic(second)
        self._apply(0, generator_loss(real_score, self.critic(self.generator(z_second))))
        self.critic.requires_grad_(True)

    def penalty_factor(self) -> float:
        """The weight of the penalties relative to ``gamma``, which falls from 10 to 1 over the first 1,000 steps."""
        return max(1.0, 10.0 ** (1 - self.step / 1000))

    def _apply(self, which: int, losses: Tensor) -> None:
        self.optimizers[which].zero_grad(set_to_none=True)
        losses.mean().backward()
        self.optimizers[which].step()

    @torch.no_grad()
    def sample(self, n: int) -> tuple[Tensor, float]:
        """n images in (−1, 1) from the averaged generator, and images per second."""
        z = torch.randn(n, LATENT, generator=generator(self.seed, "gan samples", 0))
        began = time.perf_counter()
        x = torch.cat([self.average(part) for part in z.split(256)])
        return x, n / (time.perf_counter() - began)


def run(out: Path, data: str, minutes: float | None, steps: int | None, seed: int, n: int, **settings: Any) -> dict:
    """Train for so many minutes of steps, or steps, and measure: the row that is printed."""
    dataset = load_data(data)
    split = dataset.split(0.1)
    transform = transform_for(dataset, None)
    x = transform.to_model(dataset.tensor(split.train))
    training = Training(settings["parameters"], dataset.item_shape, seed, settings["lr"], settings["gamma"])
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    saved = training.seconds
    while (training.step < steps) if steps is not None else (training.seconds < 60 * (minutes or 10)):
        training.train_step(x)
        if training.seconds - saved > SAVE_SECONDS:
            training.save(checkpoint)
            saved = training.seconds
            print(f"{training.seconds / 60:6.1f} min  step {training.step:,}", flush=True)
    training.save(checkpoint)
    images, rate = training.sample(n)
    samples = transform.to_data(images).numpy()
    np.save(out / "samples.npy", samples)
    result = compare(samples, dataset, metrics=METRICS, items=n)
    row = {
        "data": data, "seed": seed, "steps": training.step, "minutes": round(training.seconds / 60, 2),
        "parameters": [count(training.generator), count(training.critic)], "images_per_second": round(rate),
        "n": result.n, "features": result.extractor,
        **{name: [round(v, 4) for v in result.values[name]] for name in METRICS},
        "floor": {name: round(result.floors[name].value, 4) for name in METRICS},
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(row, indent=1) + "\n")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="digits", help="digits or fashion-mnist")
    parser.add_argument("--minutes", type=float, help="of training, those of teacher and distillation together")
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=2000, help="samples to compare, and the most items of each part")
    parser.add_argument(
        "--parameters", type=int, default=610_000, help="of the generator: those of the diffusion model"
    )
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--gamma", type=float, default=0.5, help="weight of both gradient penalties")
    print(json.dumps(run(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
