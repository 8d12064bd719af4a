"""A process of a run that is launched with several, one of which is killed once: ``python member.py RUN STEP RANK``."""

import os
import signal
import sys
from pathlib import Path

import crew
import torch

from undiffuse.train.watch import Watch

run, step, rank = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
marker, real = run.parent / "killed", Watch.step


def die(watch, *numbers):
    real(watch, *numbers)
    if watch.progress.step == step and os.environ["RANK"] == rank and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Watch.step = die
    crew.train(run, {"previews": 4, "steps": 8}, None, False)
    torch.distributed.destroy_process_group()
