"""A process of several, one of which is killed once: ``python member.py RUN STEP RANK``."""

import os
import signal
import sys
from pathlib import Path

import gathering
import torch

from undiffuse.training.monitor import Monitor

run, step, rank = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
marker, real = run.parent / "killed", Monitor.record_step


def die(monitor, *numbers):
    real(monitor, *numbers)
    if monitor.progress.step == step and os.environ["RANK"] == rank and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Monitor.record_step = die
    gathering.train(run, "diffusion", {"previews": 4, "max_steps": 8}, None, False)
    torch.distributed.destroy_process_group()
