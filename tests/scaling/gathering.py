"""One process of several, or the only one: trains tiny networks by a plan and writes the numbers of every step.

``python gathering.py PLAN.json FOLDER``: the plan is a list of [name, folder of the run, kind, settings of training,
step to stop after or null, whether numbers are float64]; a run of the kind "started" starts from the run
one-diffusion-64 beside it; the first process writes its numbers to FOLDER/NAME.json.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from undiffuse.data.from_array import from_array
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.model.noisy_classifier import NoisyClassifierConfig
from undiffuse.runtime.signals import Interrupted
from undiffuse.training import fit as loop
from undiffuse.training.classifier_task import ClassifierConfig, fit_classifier
from undiffuse.training.diffusion_task import fit_diffusion
from undiffuse.training.monitor import Monitor

DATA = from_array(
    np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), labels=np.arange(40) % 3, num_values=5, name="tiny"
)
NETWORK = {"kind": "unet", "widths": (8, 12), "blocks": 1, "attention": (1,)}
TRAIN = TrainConfig(
    batch=12, max_steps=4, warmup=2, lr=0.01, precision="float32", held_out=0.2, previews=0, snapshots=2, seed=4,
    conditional=True, clip=0.05,
)  # fmt: skip
CONFIG = Config(
    ModelConfig(network=NETWORK, schedule={"name": "linear_log_snr", "high": 6.0}, chain_length=5),
    TRAIN,
)
KINDS = {
    "diffusion": (fit_diffusion, CONFIG),
    "started": (fit_diffusion, CONFIG),
    "classifier": (fit_classifier, ClassifierConfig(NoisyClassifierConfig(NETWORK, high=6.0), TRAIN)),
}


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

    fit, config = KINDS[kind]
    options = {"init": Path(folder).with_name("one-diffusion-64")} if kind == "started" else {}
    torch.set_default_dtype(torch.float64 if wide else torch.float32)
    Monitor.record_step, Monitor.evaluate_now, Monitor.finish = step, lambda *_: None, finish_only
    loop.average_other_gradients = checked
    try:
        fit(replace(config, train=replace(config.train, **settings)), DATA, folder, device="cpu", quiet=True, **options)
    except Interrupted:
        assert stop is not None
    finally:
        Monitor.record_step, loop.average_other_gradients = real, average
        torch.set_default_dtype(torch.float32)
    return steps


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, folder, kind, settings, stop, wide in json.loads(Path(sys.argv[1]).read_text()):
        numbers = train(folder, kind, settings, stop, wide)
        if os.environ.get("RANK", "0") == "0":
            (Path(sys.argv[2]) / f"{name}.json").write_text(json.dumps(numbers))
    torch.distributed.destroy_process_group()
