"""How long one optimizer step of a recipe takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from undiffuse.data.transform import IntegerLevels
from undiffuse.model.config import Config
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.norm import to_fast_layout
from undiffuse.runtime.device import kept_random_state
from undiffuse.runtime.precision import autocast_dtype, resolve_precision
from undiffuse.training.optimizer import make_optimizer

TIMED_STEPS = 3


def seconds_per_step(
    recipe: Config,
    item_shape: tuple[int, ...],
    num_values: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The median seconds of `TIMED_STEPS` optimizer steps on random integers (batch, *item_shape), after one more.

    Without the averages of the weights, which cost less than a tenth of a step.
    """
    settings, dims = recipe.train, len(item_shape) - 1
    with kept_random_state():
        model = Diffusion(recipe.model, item_shape, IntegerLevels(num_values)).to(device)
        settings = replace(settings, precision=resolve_precision(settings.precision, device, dims))
        model.autocast = autocast_dtype(settings.precision)
        group = {"params": list(model.parameters()), "weight_decay": settings.weight_decay}
        to_fast_layout(model.network)
        optimizer = make_optimizer([group], model.network, settings)
        values = torch.randint(num_values, (settings.batch, *item_shape), dtype=torch.int32)
        u, eps = torch.rand(settings.batch, dtype=torch.float64), torch.randn(values.shape, device=device)
        seconds = []
        for _ in range(TIMED_STEPS + 1):
            began = clock()
            for part in torch.arange(settings.batch).chunk(settings.accumulate):
                (model.loss(values[part], u[part], eps[part]).mean() / settings.accumulate).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds.append(clock() - began)
    return statistics.median(seconds[1:])
