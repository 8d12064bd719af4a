"""Training and sampling of each package for the part `clock`, in a process of its own: ``clock_packages.py STAGE JOB``.

JOB is the file of a `Job`; the stage writes ``train.json`` with its ``model``, or ``sample-D.json`` with
``samples-D.npy`` (D is `Job.drawn`), into the job's folder. A stage without its JSON file is not done, and starts
afresh (that of undiffuse resumes its run).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "src")]

import numpy as np  # noqa: E402, after the paths
from peer_packages import hide_operators, import_denoising_diffusion  # noqa: E402

from undiffuse.runtime.atomic_file import write_atomic  # noqa: E402
from undiffuse.runtime.precision import cpu_multiplies_bfloat16  # noqa: E402

SIDE, HELD_OUT = 28, 0.1
"""Fashion-MNIST; the fraction of its training part that is held out from all packages, as from ours by default."""
MAX_WARMUP = 0.1
"""Of the time of a training of diffusers: 500 steps can be all that there are."""

SETTINGS: dict[str, dict[str, Any]] = {
    # The default recipe and sampler. ``options`` are more options of `undiffuse train`.
    "undiffuse": {"options": "", "sampler": "dpm++2m_sde", "calls": 25},
    # Its Trainer with the defaults of the process (pred_v, sigmoid schedule), Adam, EMA. dim 64 with the multiples
    # 1, 2, 4, 8 of the README has 36 M parameters and is too slow for minutes of a processor. DDIM as in the README, in
    # 50 calls and not in its 250, because 1,000 images in 250 calls are 50 minutes of a core. bf16: Trainer's ``amp``,
    # where the processor multiplies in it. ema_decay: with its default, 0.995 for each tenth step, the average would be
    # over most of a run of minutes; with 0.9 it is over some 100 steps.
    "denoising-diffusion-pytorch": {
        "dim": 32,
        "dim_mults": [1, 2, 4],
        "batch": 16,
        "lr": 3e-4,
        "ema_decay": 0.9,
        "sampler": "ddim",
        "calls": 50,
        "bf16": True,
    },
    # The loop of examples/unconditional_image_generation: AdamW, EMAModel, cosine decay, 500 warm-up steps, eps. Its
    # network of 114 M parameters is too large here. "ddim" in 50 calls is the default of DDIMPipeline; the example's
    # own 1,000 (sampler "ddpm") take twenty times as long; "dpm++2m_sde" is DPMSolverMultistepScheduler. bf16: the
    # example's --mixed_precision bf16.
    "diffusers": {
        "widths": [32, 64, 128],
        "layers": 1,
        "batch": 16,
        "lr": 1e-3,
        "warmup": 500,
        "sampler": "dpm++2m_sde",
        "calls": 25,
        "bf16": True,
    },
}
"""The settings of each package; ``sampler`` and ``calls`` (of the network for an image) are those of sampling, the
others those of training. `TRIED` lists what else was tried; ``run clock --set NAME.KEY=VALUE`` tries more."""

SAMPLING = ("sampler", "calls")
TRIED: list[str] = [
    "Tried for diffusers (2026-11-29, five minutes of one core, Fréchet distance of 500 samples, floor 7.0): batch 32 "
    "at 3e-4 313, at 1e-3 269, at 2e-3 299, batch 16 at 1e-3 213, all by DDIM in 50 calls; batch 32 at 1e-3 by "
    "DPM-Solver++ 2M SDE in 25 calls 158, in 50 calls 484.",
    "Tried for denoising-diffusion-pytorch (the same, DDIM in 50 calls): batch 32 at 3e-4 66, at 1e-3 88, at 2e-3 80, "
    "batch 16 at 1e-3 61, at 3e-4 45.",
]
"""What was tried, a line each. To try learning rates, each with a training and a folder of its own:
``for lr in 0.0001 0.0003 0.001; do benchmarks/bench/run clock --packages diffusers --set diffusers.lr=$lr; done``."""


@dataclass(frozen=True)
class Job:
    """One training of ``package`` for ``minutes``. ``data`` is the folder of Fashion-MNIST, "" for the system's."""

    package: str
    minutes: float
    seed: int
    settings: dict[str, Any]
    data: str
    out: str

    @property
    def folder(self) -> Path:
        """Its own, also of its settings of training: the result of others is in another folder."""
        training = {name: value for name, value in self.settings.items() if name not in SAMPLING}
        digest = hashlib.sha256(json.dumps([training, self.data], sort_keys=True).encode()).hexdigest()[:6]
        return Path(self.out) / f"{self.package}-{self.minutes:g}min-seed{self.seed}-{digest}"

    def drawn(self, n: int) -> str:
        """A part of the names of files about ``n`` samples of the sampler of the settings."""
        return f"{n}-{self.settings['sampler']}-{self.settings['calls']}"


class Package(NamedTuple):
    """``train(job)`` writes a model into ``job.folder`` and returns facts, ``sample(job, n)`` returns (N, 1, 28, 28).

    ``module`` is the import name, ``model`` the name of what it writes there, with the options of `undiffuse import`;
    None for ours.
    """

    module: str
    train: Callable[[Job], dict[str, Any]]
    sample: Callable[[Job, int], np.ndarray]
    model: tuple[str, list[str]] | None


def undiffuse(*arguments: object) -> str:
    """The standard output of a command of undiffuse with this Python. Raises CalledProcessError."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "undiffuse", *map(str, arguments)]
    return subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout


def data_options(job: Job) -> list[str]:
    return ["--folder", job.data] if job.data else []


def training_images(job: Job) -> np.ndarray:
    """(N, 1, 28, 28) uint8, the items on which ours trains too."""
    from undiffuse import load_data

    data = load_data("fashion-mnist", **({"folder": job.data} if job.data else {}))
    return np.asarray(data.values[data.split(HELD_OUT).train])


# --- undiffuse -------------------------------------------------------------------------------------------------------


def train_undiffuse(job: Job) -> dict[str, Any]:
    run, options = job.folder / "run", job.settings["options"].split()
    length = ["--minutes", job.minutes, "--seed", job.seed, "--out", run, "--json"]
    records = json.loads(undiffuse("train", "fashion-mnist", *data_options(job), *length, *options))["records"]
    batch = json.loads((run / "run.json").read_bytes())["config"]["train"]["batch"]
    last = records[-1]
    return {"steps": last["step"], "images": last["step"] * batch, "seconds": last["seconds"]}


def sample_undiffuse(job: Job, n: int) -> np.ndarray:
    out, settings = job.folder / f"drawn-{job.drawn(n)}", job.settings
    sampler = ["--solver", settings["sampler"], "--steps", settings["calls"]]
    undiffuse("sample", job.folder / "run", "--n", n, "--seed", job.seed, *sampler, "--out", out)
    with np.load(out / "samples.npz") as content:
        return content[content.files[0]]


# --- denoising-diffusion-pytorch -------------------------------------------------------------------------------------


def build_denoising_diffusion(settings: Mapping[str, Any]) -> Any:
    package = import_denoising_diffusion()
    network = package.Unet(dim=settings["dim"], dim_mults=tuple(settings["dim_mults"]), channels=1)
    return package.GaussianDiffusion(network, image_size=SIDE, sampling_timesteps=settings["calls"])


def write_pictures(job: Job) -> Path:
    """A folder of PNG files, which its Trainer reads; shared by all jobs with the same images."""
    from PIL import Image

    images = training_images(job)[:, 0]
    folder = Path(job.out) / f"pictures-{hashlib.sha256(images.tobytes()).hexdigest()[:12]}"
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{number:05d}.png")
        (folder / "complete").touch()
    return folder


def train_denoising_diffusion(job: Job) -> dict[str, Any]:
    import torch

    settings, pictures = job.settings, write_pictures(job)

    class TimedTrainer(import_denoising_diffusion().Trainer):
        """The Trainer, which has no clock: there is one step more to do as long as there is time."""

        end = math.inf

        @property
        def train_num_steps(self) -> int:
            return self.step + (time.perf_counter() < self.end)

        @train_num_steps.setter
        def train_num_steps(self, value: int) -> None:
            pass

    began = time.perf_counter()
    torch.manual_seed(job.seed)
    trainer = TimedTrainer(
        build_denoising_diffusion(settings),
        str(pictures),
        train_batch_size=settings["batch"],
        train_lr=settings["lr"],
        ema_decay=settings["ema_decay"],
        augment_horizontal_flip=False,
        amp=settings["bf16"] and cpu_multiplies_bfloat16(),
        mixed_precision_type="bf16",
        calculate_fid=False,
        save_and_sample_every=10**9,
        results_folder=str(job.folder),
    )
    trainer.end = began + 60 * job.minutes
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save(1)
    return {"steps": trainer.step, "images": trainer.step * settings["batch"], "seconds": seconds}


def sample_denoising_diffusion(job: Job, n: int) -> np.ndarray:
    import torch
    from ema_pytorch import EMA

    model = build_denoising_diffusion(job.settings)
    average = EMA(model, beta=job.settings["ema_decay"], update_every=10)
    average.load_state_dict(torch.load(job.folder / "model-1.pt", weights_only=True)["ema"])
    average.ema_model.eval()
    torch.manual_seed(job.seed)
    with torch.inference_mode():
        parts = [average.ema_model.sample(batch_size=min(100, n - i)) for i in range(0, n, 100)]
    return (torch.cat(parts) * 255).round().clamp(0, 255).to(torch.uint8).numpy()


# --- diffusers -------------------------------------------------------------------------------------------------------


def train_diffusers(job: Job) -> dict[str, Any]:
    import torch

    hide_operators()
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    settings = job.settings
    images = torch.from_numpy(training_images(job))
    began = time.perf_counter()
    torch.manual_seed(job.seed)
    plain, attending = ["DownBlock2D"] * (len(settings["widths"]) - 1), "AttnDownBlock2D"
    network = UNet2DModel(
        sample_size=SIDE,
        in_channels=1,
        out_channels=1,
        layers_per_block=settings["layers"],
        norm_num_groups=16,
        block_out_channels=tuple(settings["widths"]),
        down_block_types=(*plain, attending),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * len(plain)),
    )
    chain = DDPMScheduler(num_train_timesteps=1000)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings["lr"], betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    steps, batch, mixed = 0, settings["batch"], settings["bf16"] and cpu_multiplies_bfloat16()
    while (fraction := (time.perf_counter() - began) / (60 * job.minutes)) < 1:
        decay = 0.5 * (1 + math.cos(math.pi * fraction))  # the example's cosine, over time
        warm_up = min(1.0, max((steps + 1) / settings["warmup"], fraction / MAX_WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * warm_up * decay
        clean = images[torch.randint(len(images), (batch,))].float() / 127.5 - 1
        noise, at = torch.randn_like(clean), torch.randint(1000, (batch,))
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            output = network(chain.add_noise(clean, noise, at), at).sample
        torch.nn.functional.mse_loss(output.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        steps += 1
    seconds = time.perf_counter() - began
    average.copy_to(network.parameters())
    DDPMPipeline(network, chain).save_pretrained(job.folder / "pipeline")
    return {"steps": steps, "images": steps * batch, "seconds": seconds}


def sample_diffusers(job: Job, n: int) -> np.ndarray:
    import torch

    hide_operators()
    from diffusers import DDIMPipeline, DDPMPipeline, DPMSolverMultistepScheduler

    kind = DDIMPipeline if job.settings["sampler"] == "ddim" else DDPMPipeline
    pipeline = kind.from_pretrained(job.folder / "pipeline")
    if job.settings["sampler"] == "dpm++2m_sde":
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            pipeline.scheduler.config,
            algorithm_type="sde-dpmsolver++",
            timestep_spacing="trailing",
            thresholding=True,  # at 1, its sample_max_value: clips x as its DDIMScheduler does
        )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(job.seed)
    parts = [
        pipeline(
            batch_size=min(100, n - i),
            generator=generator,
            num_inference_steps=job.settings["calls"],
            output_type="numpy",
        ).images
        for i in range(0, n, 100)
    ]
    return np.moveaxis((np.concatenate(parts) * 255).round().clip(0, 255).astype(np.uint8), -1, 1)


PACKAGES: dict[str, Package] = {
    "undiffuse": Package("undiffuse", train_undiffuse, sample_undiffuse, None),
    "denoising-diffusion-pytorch": Package(
        "denoising_diffusion_pytorch",
        train_denoising_diffusion,
        sample_denoising_diffusion,
        ("model-1.pt", ["--size", str(SIDE), "--unpickle"]),
    ),
    "diffusers": Package("diffusers", train_diffusers, sample_diffusers, ("pipeline", [])),
}
"""k-diffusion and azula have no training loop in the package, so a comparison would be of a loop written here."""


def train_stage(job: Job, package: Package) -> None:
    before = os.getloadavg()[0]
    facts = package.train(job)
    facts |= {"load": [before, os.getloadavg()[0]], "job": asdict(job)}
    write_atomic(job.folder / "train.json", json.dumps(facts, indent=1).encode())


def sample_stage(job: Job, package: Package, n: int) -> None:
    began = time.perf_counter()
    samples = package.sample(job, n)
    seconds = time.perf_counter() - began
    np.save(job.folder / f"samples-{job.drawn(n)}.npy", samples)
    write_atomic(job.folder / f"sample-{job.drawn(n)}.json", json.dumps({"seconds": seconds, "n": n}).encode())


if __name__ == "__main__":
    stage, place, *numbers = sys.argv[1:]
    chosen = Job(**json.loads(Path(place).read_bytes()))
    {"train": train_stage, "sample": sample_stage}[stage](chosen, PACKAGES[chosen.package], *map(int, numbers))
