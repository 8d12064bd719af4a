"""One process of several, or the only one: trains tiny networks by a plan and writes the numbers of every step.

``python gathering.py PLAN.json FOLDER``: the plan is a list of [name, folder of the run, kind, settings of training,
step to stop after or null, whether numbers are float64]; a run of the kind "started" starts from the run
one-diffusion-64 beside it; the first process writes its numbers to FOLDER/NAME.json. The kind "cascade" draws samples
with `sample --then` instead, the settings being its options.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from undiffuse.cli import main
from undiffuse.data.from_array import from_array
from undiffuse.data.stage_data import reduce_data, split_data
from undiffuse.data.transform import IntegerLevels
from undiffuse.model import checkpoint
from undiffuse.model.autoencoder import Autoencoder, AutoencoderConfig
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.noisy_classifier import NoisyClassifierConfig
from undiffuse.process.seeded_noise import generator
from undiffuse.runtime.signals import Interrupted
from undiffuse.training import fit as loop
from undiffuse.training.classifier_task import ClassifierRecipe, fit_classifier
from undiffuse.training.diffusion_task import DiffusionTask, fit_diffusion
from undiffuse.training.monitor import Monitor

DATA = from_array(
    np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), labels=np.arange(40) % 3, num_values=5, name="tiny"
)
NETWORK = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": (0,)}
TRAIN = TrainConfig(
    batch=12, max_steps=4, warmup=2, lr=0.01, precision="float32", held_out=0.2, previews=0, snapshots=2, seed=4,
    conditional=True, clip=0.05,
)  # fmt: skip
CONFIG = Config(
    ModelConfig(network=NETWORK, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=5),
    TRAIN,
)
CAPTIONED = replace(DATA, labels=None, classes=(), captions=tuple((f"item {i}", f"{i}") for i in range(40)))
PLAIN = replace(CONFIG, train=replace(TRAIN, conditional=False, flip=True))


def fit_latents(config, data, folder, **options):
    torch.manual_seed(0)
    network = {"kind": "kl", "widths": (8, 8), "latent_channels": 2, "blocks": 1}
    autoencoder = Autoencoder(AutoencoderConfig(network), data.item_shape, IntegerLevels(5)).eval()
    return fit_diffusion(config, data, folder, autoencoder=autoencoder, **options)


KINDS = {
    "diffusion": (fit_diffusion, CONFIG, DATA),
    "started": (fit_diffusion, CONFIG, DATA),
    "muon": (fit_diffusion, replace(CONFIG, train=replace(TRAIN, optimizer="muon")), DATA),
    "classifier": (fit_classifier, ClassifierRecipe(NoisyClassifierConfig(NETWORK, high=6.0), TRAIN), DATA),
    "latents": (fit_latents, PLAIN, DATA),
    "captions": (fit_diffusion, CONFIG, CAPTIONED),
}


def save_stages(place):
    """Write the base and the super-resolution model of a cascade with random weights, BASE and TOP."""
    for name, data in (("BASE", reduce_data(DATA, 2)), ("TOP", split_data(DATA, 2))):
        task = DiffusionTask(PLAIN).adapt(data, PLAIN.train)
        model = task.build_model(data, data.split(0.2))
        for i, parameter in enumerate(model.parameters()):
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator(0, name, i)))
        checkpoint.save(model, place / f"{name}.safetensors")


def draw_cascade(folder, options):
    """`sample` with the stages beside ``folder``, into it."""
    base, top = (str(Path(folder).parent / f"{name}.safetensors") for name in ("BASE", "TOP"))
    words = [word for option in options.items() for word in option]
    assert (
        main(["sample", base, "--then", top, *words, "--out", str(folder), "--device", "cpu", "--precision", "float32"])
        == 0
    )


def finish_only(monitor):
    """A finish that writes the model but measures and draws nothing."""
    monitor.task.save(monitor.ema_model, monitor.run.model)
    monitor.run.finish()


def train(folder, kind, settings, stop=None, wide=False):
    """(loss, gradient norm, learning rate) of every step."""
    steps, real, average = [], Monitor.record_step, loop.average_other_gradients
    replicated = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not settings.get("shard")

    def checked(accelerator, model):
        average(accelerator, model)
        gradients = [p.grad for p in model.network.parameters()]
        assert not replicated or all(g.untyped_storage().nbytes() > g.nbytes for g in gradients)  # in DDP's buckets

    def step(monitor, loss, norm, lr, *more):
        real(monitor, loss, norm, lr, *more)
        steps.append((loss, norm, lr))
        if monitor.progress.step == stop and os.environ.get("RANK", "0") == "0":  # a signal to one process stops all
            signal.raise_signal(signal.SIGTERM)

    fit, config, data = KINDS[kind]
    options = {"init": Path(folder).with_name("one-diffusion-64")} if kind == "started" else {}
    torch.set_default_dtype(torch.float64 if wide else torch.float32)
    Monitor.record_step, Monitor.evaluate_now, Monitor.finish = step, lambda *_: None, finish_only
    loop.average_other_gradients = checked
    try:
        fit(replace(config, train=replace(config.train, **settings)), data, folder, device="cpu", quiet=True, **options)
    except Interrupted:
        assert stop is not None
    finally:
        Monitor.record_step, loop.average_other_gradients = real, average
        torch.set_default_dtype(torch.float32)
    return steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, folder, kind, settings, stop, wide in json.loads(Path(sys.argv[1]).read_text()):
        print("begins:", name, flush=True)
        if kind == "cascade":
            draw_cascade(folder, settings)
            continue
        numbers = train(folder, kind, settings, stop, wide)
        if os.environ.get("RANK", "0") == "0":
            (Path(sys.argv[2]) / f"{name}.json").write_text(json.dumps(numbers))
    torch.distributed.destroy_process_group()
