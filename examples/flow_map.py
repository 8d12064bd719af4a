"""Likelihood and samples of points in the plane with few network calls: ``python examples/flow_map.py FOLDER``.

Trains a small network on two moons, distills it into a flow map that goes both ways, and prints for each number of
calls the distance of samples from the flow's own samples from the same noise, and the difference of the map's
likelihood from that of the flow. FOLDER gets both runs and a picture of the samples, flow-map.png.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from undiffuse import fit, load_data
from undiffuse.model.checkpoint import load
from undiffuse.model.config import TrainConfig
from undiffuse.model.consistency import few_call_sampler
from undiffuse.model.presets import get
from undiffuse.sampling.sampler import Sampler
from undiffuse.training.distillation_task import fit_distillation


def main(folder: str, steps: int = 2000, points: int = 500) -> dict[int, tuple[float, float]]:
    data, out = load_data("two-moons"), Path(folder)
    length = {"max_steps": steps, "previews": 1, "snapshots": 0}
    recipe = get("vector")
    recipe = replace(recipe, train=replace(recipe.train, **length))
    teacher = load(fit(recipe, data, out / "flow"))
    settings = TrainConfig(batch=512, lr=1e-3, **length)
    options = {"calls": 1, "method": "lagrangian", "both_ways": True}
    student = load(fit_distillation(teacher, data, out / "flow-map", settings, **options))
    values = torch.from_numpy(data.values[data.split(0.1).test[:points]])
    flow = teacher.sample(points, sampler=Sampler("heun", 50))
    exact = teacher.nll(values, estimate="ode").bits_per_dim(2)
    found, drawn = {}, [flow]
    for calls in (1, 2, 4):
        samples = student.sample(points, sampler=few_call_sampler(student.schedule, calls, "flow_map"))
        student.config = replace(student.config, calls=calls)
        error = student.nll(values, estimate="flow_map").bits_per_dim(2) - exact
        found[calls] = float((samples - flow).square().mean().sqrt()), float(error.mean())
        print(f"{calls} calls: samples off by {found[calls][0]:.3f}, bits per dimension by {found[calls][1]:+.3f}")
        drawn.append(samples)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(drawn), figsize=(12, 3), sharex=True, sharey=True)
    for ax, samples, title in zip(axes, drawn, ["the flow, 100 calls", "1 call", "2 calls", "4 calls"], strict=True):
        ax.scatter(*samples.T, s=2)
        ax.set_title(title)
    figure.savefig(out / "flow-map.png")
    pyplot.close(figure)
    return found


if __name__ == "__main__":
    print(main(sys.argv[1]) if len(sys.argv) > 1 else __doc__)
