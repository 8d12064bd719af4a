"""The same network with the same weights in another package and here: times of a training step and of a sampling step.

The other package's file is imported by `undiffuse.interop`, so that outputs are equal to 1e-5 (in the table). Both run
in turn in this process, in processor time. Each takes the step of its own loop: the loss, backward, the norm of the
gradient, the optimizer, the averages of weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peer_packages import hide_operators
from peer_packages import import_denoising_diffusion as import_package
from torch import Tensor, nn

from bench.measure import alternate, paired_ratio, spread
from bench.record import Result, Table
from undiffuse.interop.denoising_diffusion import import_denoising_diffusion
from undiffuse.interop.diffusers import import_diffusers
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.norm import to_fast_layout
from undiffuse.process.seeded_noise import ItemNoise
from undiffuse.runtime.precision import cpu_multiplies_bfloat16
from undiffuse.sampling.sampler import Sampler
from undiffuse.training.distributed import clip_gradient
from undiffuse.training.ema import PowerEMA
from undiffuse.training.nonfinite import find_nonfinite, reading_waits, weights_norm
from undiffuse.training.posthoc_ema import SNAPSHOT_LENGTHS

CPU, CHAIN = torch.device("cpu"), 1000
ROUNDS = 9


class Size(NamedTuple):
    """Batches of ``channels`` × ``side`` × ``side``; a U-Net's ``widths``, ``layers`` a level, levels of attention."""

    batch: int
    channels: int
    side: int
    widths: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]
    groups: int = 32


SMALL = Size(32, 1, 28, (32, 64, 96), 1, (2,), 16)
"""1.2 to 1.6 M parameters, as many as the preset ``cpu-small`` (1.7 M)."""
EXAMPLE = Size(16, 3, 64, (128, 128, 256, 256, 512, 512), 2, (4,))
"""The example of unconditional generation of diffusers."""
TINY = Size(4, 3, 8, (8, 16), 1, (1,), 8)
BATCH, SIDE, WIDTHS = SMALL.batch, SMALL.side, SMALL.widths
BF16 = torch.bfloat16
Step = Callable[[], object]
DEFAULTS = "theirs in float32, ours in bfloat16 (the defaults)"
WHO = ("theirs", "ours")


class Pair(NamedTuple):
    """Steps of another ``package`` and of ours, whose ``model`` it is, with the ``difference`` of the outputs."""

    package: str
    model: Diffusion
    parameters: int
    difference: float
    training: dict[str, tuple[Step, Step]]
    sampling: dict[str, tuple[Step, Step]]


def our_training_step(
    model: Diffusion, values: Tensor, autocast: torch.dtype | None, network: nn.Module | None = None
) -> Step:
    """A step as `undiffuse.training` takes it: loss, gradient's norm, checks, AdamW, the two averages of the weights.

    On a GPU nothing is read, as between the records of a run. ``network``: a compiled form of the model's.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)
    averages, count = [PowerEMA(model, length) for length in SNAPSHOT_LENGTHS], itertools.count(1)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        model.autocast = autocast
        model.train()
        u = torch.rand(len(values), dtype=torch.float64, generator=generator)
        number = next(count)
        items = range(number * len(values), (number + 1) * len(values))
        eps = ItemNoise(0, items, model.x_shape, "train", values.device)(1)[0]
        losses = model.loss(values, u, eps, network=network)
        losses.mean().backward()
        norm = clip_gradient(model.parameters(), 1.0)
        assert reading_waits(values.device) or find_nonfinite(losses.detach(), [norm]) is None
        optimizer.step()
        weights = weights_norm(model)  # also where it is not read: `UnreadSteps` keeps it
        assert reading_waits(values.device) or math.isfinite(float(weights))
        for average in averages:
            average.update(model, number)
        optimizer.zero_grad()

    return step


def our_sampling_step(model: Diffusion, solver: str, autocast: torch.dtype | None) -> Step:
    """Steps of a walk of all levels, one at each call; from the middle of the chain on."""
    sampler = Sampler(solver, CHAIN)
    built, levels = model.build_solver(sampler), model.noise_levels(sampler)
    model.autocast = autocast  # which the denoiser takes with it
    denoise, noise = model.sampling_denoiser(sampler), ItemNoise(0, range(BATCH), model.x_shape)
    state, place = [noise(1)[0], built.init(noise(1)[0], levels)], itertools.count(CHAIN // 2)

    @torch.no_grad()
    def step() -> None:
        model.eval()
        at = next(place)
        drawn = noise(built.noises_per_step)
        state[:] = built.step(denoise, state[0], levels[at], levels[at + 1], state[1], drawn)

    return step


def of_diffusers(size: Size = SMALL, device: torch.device = CPU) -> Pair:
    """UNet2DModel with the loop of diffusers' example of unconditional generation: EMAModel, AdamW, a norm of 1."""
    hide_operators()
    from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    torch.manual_seed(0)
    down = ["AttnDownBlock2D" if level in size.attention else "DownBlock2D" for level in range(len(size.widths))]
    network = UNet2DModel(
        sample_size=size.side,
        in_channels=size.channels,
        out_channels=size.channels,
        layers_per_block=size.layers,
        norm_num_groups=size.groups,
        block_out_channels=size.widths,
        down_block_types=tuple(down),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
    )
    chain = DDPMScheduler(num_train_timesteps=CHAIN)
    with tempfile.TemporaryDirectory() as folder:
        DDPMPipeline(network, chain).save_pretrained(folder)
        imported = import_diffusers(folder)
    network.to(device)
    imported.model.to(device)
    values = random_values(size).to(device)
    clean = values.float() / 127.5 - 1
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def train(autocast: bool = False) -> Step:
        def step() -> None:
            network.train()
            noise, at = torch.randn_like(clean), torch.randint(CHAIN, (size.batch,), device=device)
            with torch.autocast(device.type, BF16, enabled=autocast):
                output = network(chain.add_noise(clean, noise, at), at).sample
            nn.functional.mse_loss(output.float(), noise).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(network.parameters())

        return step

    def sample(kind: Any) -> Step:
        scheduler = kind(num_train_timesteps=CHAIN)
        scheduler.set_timesteps(CHAIN)
        state, place = [torch.randn(clean.shape, device=device)], itertools.count(CHAIN // 2)

        @torch.no_grad()
        def step() -> None:
            network.eval()
            t = scheduler.timesteps[next(place)]
            state[0] = scheduler.step(network(state[0], t).sample, t, state[0]).prev_sample

        return step

    return pair(
        "diffusers",
        imported,
        values,
        {"float32": train(), **({"bfloat16": train(True)} if multiplies_bfloat16(device) else {})},
        {"ancestral": sample(DDPMScheduler), "ddim": sample(DDIMScheduler)},
    )


def of_denoising_diffusion() -> Pair:
    """Unet of denoising-diffusion-pytorch with the step of its Trainer: Adam, a norm of 1, EMA every ten steps."""
    from ema_pytorch import EMA
    from safetensors.torch import save_file

    package = import_package()
    torch.manual_seed(0)
    model = package.GaussianDiffusion(
        package.Unet(dim=WIDTHS[0], dim_mults=tuple(width // WIDTHS[0] for width in WIDTHS), channels=1),
        image_size=SIDE,
        timesteps=CHAIN,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({f"model/{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
        imported = import_denoising_diffusion(path, size=SIDE, setting={"ema": False})
    values = random_values()
    clean = values.float() / 255
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(model, beta=0.995, update_every=10)

    def train(autocast: bool = False) -> Step:
        def step() -> None:
            model.train()
            with torch.autocast("cpu", BF16, enabled=autocast):
                loss = model(clean)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update()

        return step

    state, place = [torch.randn(BATCH, 1, SIDE, SIDE)], itertools.count(CHAIN // 2)

    @torch.inference_mode()
    def sample() -> None:
        model.eval()
        state[0] = model.p_sample(state[0], CHAIN - 1 - next(place))[0]

    return pair(
        "denoising-diffusion-pytorch",
        imported,
        values,
        {"float32": train(), **({"bfloat16": train(True)} if cpu_multiplies_bfloat16() else {})},
        {"ancestral": sample},
    )


def pair(package: str, imported: Any, values: Tensor, training: dict[str, Step], sampling: dict[str, Step]) -> Pair:
    """Their steps with ours of the imported model. Raises `RuntimeError` where outputs were not compared or differ."""
    check = next(check for check in imported.checks if check.what == "outputs of the network")
    if check.difference is None or not check.holds:
        raise RuntimeError(f"{package}: outputs differ by {check.difference}, limit {check.limit}")
    model = imported.model
    to_fast_layout(model.network)  # of its device, as `fit` and `load` do
    walks = {name: (step, our_sampling_step(model, name, None)) for name, step in sampling.items()}
    if cpu_multiplies_bfloat16():
        walks[f"ancestral, {DEFAULTS}"] = sampling["ancestral"], our_sampling_step(model, "ancestral", BF16)
    return Pair(
        package,
        model,
        sum(p.numel() for p in model.network.parameters()),
        check.difference,
        {
            name: (step, our_training_step(model, values, BF16 if name == "bfloat16" else None))
            for name, step in training.items()
        },
        walks,
    )


def measure(steps: dict[str, tuple[Step, Step]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of theirs and ours by the name of the step; all of them alternate."""
    rows = {(what, who): step for what, pair in steps.items() for who, step in zip(WHO, pair, strict=True)}
    seconds = alternate(rows, rounds, warm_up=2)
    return {what: {who: seconds[what, who] for who in WHO} for what in steps}


def multiplies_bfloat16(device: torch.device) -> bool:
    return device.type != "cpu" or cpu_multiplies_bfloat16()


def random_values(size: Size = SMALL) -> Tensor:
    shape = (size.batch, size.channels, size.side, size.side)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1))


PACKAGES: dict[str, Callable[[], Pair]] = {
    "diffusers": of_diffusers,
    "denoising-diffusion-pytorch": of_denoising_diffusion,
}
LEFT_OUT = (
    "k-diffusion and azula are left out: no import of their networks exists here, so the network would not be the "
    "same, and neither package has a training loop of its own."
)


def run(options: argparse.Namespace) -> Result:
    torch.set_num_threads(options.threads or 1)
    rounds = options.rounds or ROUNDS
    rows, raw, notes = [], {}, [LEFT_OUT]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, build in PACKAGES.items():
            try:
                found = build()
            except ImportError as error:
                notes.append(f"{name} was not measured: {error}.")
                continue
            times: dict[str, dict[str, list[float]]] = {}
            for kind, steps in (("training", found.training), ("sampling", found.sampling)):
                measured = measure(steps, rounds)
                for what in steps:
                    times[f"{kind} step, {what}"] = measured[what]
                if {"float32", "bfloat16"} <= measured.keys():
                    defaults = {"theirs": measured["float32"]["theirs"], "ours": measured["bfloat16"]["ours"]}
                    times[f"{kind} step, {DEFAULTS}"] = defaults
                print(f"  {name}: {kind} steps measured", file=sys.stderr, flush=True)
            raw[name] = {"parameters": found.parameters, "difference": found.difference, "seconds": times}
            for what, seconds in times.items():
                ratio = paired_ratio(seconds["ours"], seconds["theirs"])
                rows.append(
                    {
                        "package": name,
                        "parameters": f"{found.parameters:,}",
                        "outputs differ by": f"{found.difference:.1e}",
                        "measured": what,
                        "theirs (ms)": f"{1e3 * spread(seconds['theirs']).median:.1f}",
                        "ours (ms)": f"{1e3 * spread(seconds['ours']).median:.1f}",
                        "theirs/ours": f"{ratio:.2f}",
                    }
                )
    if not rows:
        raise SystemExit("No other package is installed. Run: scripts/venv report,data,peers")
    title = f"Batches of {BATCH}, 1×{SIDE}×{SIDE}, processor time; medians of {rounds} rounds; the ratio with quartiles"
    return Result("The same network in other packages", [Table(title, rows)], raw, notes=notes)
