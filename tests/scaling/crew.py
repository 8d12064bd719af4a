"""One process of several, or the only one: trains tiny networks as a plan says and writes down every step's numbers.

``python crew.py PLAN.json FOLDER``: the plan is a list of [name, folder of the run, settings of training, the
step to be stopped after or null, whether numbers are float64]; the numbers of the first process go to FOLDER/NAME.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from undiffuse.checkpoint import save
from undiffuse.config import Config, ModelConfig, TrainConfig, replace_train
from undiffuse.data import from_array
from undiffuse.train import Interrupted, fit, loop
from undiffuse.train.watch import Watch

DATA = from_array(
    np.random.default_rng(0).integers(5, size=(40, 1, 4, 4)), labels=np.arange(40) % 3, levels=5, name="tiny"
)
CONFIG = Config(
    ModelConfig(
        network={"kind": "unet", "widths": (8, 12), "blocks": 1, "attention": (1,)},
        schedule={"name": "linear_log_snr", "high": 6.0},
        steps=5,
    ),
    TrainConfig(
        batch=12, steps=4, warmup=2, lr=0.01, precision="float32", held_out=0.2, previews=0, snapshots=2, seed=4,
        conditional=True, clip=0.05,
    ),
)  # fmt: skip


def end(watch):
    save(watch.smooth, watch.run.model)
    watch.run.finish()


def train(folder, settings, stop=None, wide=False):
    """The numbers of every step: loss, norm of the gradient, learning rate."""
    told, real, share = [], Watch.step, loop.share_gradient
    replicated = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not settings.get("shard")

    def shared(accelerator, diffusion):
        share(accelerator, diffusion)
        gradients = [p.grad for p in diffusion.network.parameters()]
        assert not replicated or all(g.untyped_storage().nbytes() > g.nbytes for g in gradients)  # in DDP's buckets

    def step(watch, loss, norm, lr, *more):
        real(watch, loss, norm, lr, *more)
        told.append((loss, norm, lr))
        if watch.progress.step == stop and os.environ.get("RANK", "0") == "0":  # a signal to one is one to all
            signal.raise_signal(signal.SIGTERM)

    torch.set_default_dtype(torch.float64 if wide else torch.float32)
    Watch.step, Watch.look, Watch.finish = step, lambda *_: None, end
    loop.share_gradient = shared
    try:
        fit(replace_train(CONFIG, **settings), DATA, folder, device="cpu", quiet=True)
    except Interrupted:
        assert stop is not None
    finally:
        Watch.step, loop.share_gradient = real, share
        torch.set_default_dtype(torch.float32)
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, folder, settings, stop, wide in json.loads(Path(sys.argv[1]).read_text()):
        numbers = train(folder, settings, stop, wide)
        if os.environ.get("RANK", "0") == "0":
            (Path(sys.argv[2]) / f"{name}.json").write_text(json.dumps(numbers))
    torch.distributed.destroy_process_group()
