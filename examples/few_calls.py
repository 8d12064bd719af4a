"""Distills a run into a model that draws samples with one network call: ``python examples/few_calls.py RUN [DATA]``.

RUN is a folder that `undiffuse train` made, DATA what it was trained on (by default the built-in set of that name).
The model goes into RUN-1-call. In its pictures, few-calls.png has samples from the same noise: the flow of RUN by 50
calls of Heun's method, one and two calls of the distilled model, and one call of RUN itself, the mean of the data.
"""

import sys
from pathlib import Path

import torch

from undiffuse import load_data
from undiffuse.model.checkpoint import load
from undiffuse.model.config import TrainConfig
from undiffuse.model.consistency import few_call_sampler
from undiffuse.report import figures
from undiffuse.sampling.sampler import Sampler
from undiffuse.training.distillation_task import fit_distillation


def main(run: str, source: str | None = None, images: int = 12, **settings) -> Path:
    teacher = load(run)
    data = load_data(source or teacher.info["name"])
    length = settings or {"minutes": 3.0}
    student = load(fit_distillation(teacher, data, f"{run}-1-call", TrainConfig(lr=5e-4, snapshots=0, **length)))
    one, two = (few_call_sampler(teacher.schedule, calls) for calls in (1, 2))
    rows = [
        teacher.sample(images, sampler=Sampler("heun", 25)),
        student.sample(images, sampler=one),
        student.sample(images, sampler=two),
        teacher.sample(images, sampler=one),
    ]
    picture = figures.image_grid(torch.cat(rows).numpy(), data.num_values, columns=images)
    path = Path(f"{run}-1-call") / "pictures" / "few-calls.png"
    picture.save(path)
    return path


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None) if len(sys.argv) > 1 else __doc__)
