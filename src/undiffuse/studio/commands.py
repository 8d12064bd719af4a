"""The command, or the lines of Python where there is no command, that computes what the page shows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from undiffuse.runtime.terminal import as_argument


def command(name: str, run: Path, arguments: tuple[str, ...] = (), options: Mapping[str, Any] | None = None) -> str:
    """``undiffuse name RUN ...`` as one line for a shell, options in their order, in the float32 of the page."""
    words = list(arguments)
    if name in ("sample", "restore"):
        options = {**(options or {}), "--precision": "float32"}
    for flag, value in (options or {}).items():
        words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return " ".join(["undiffuse", name, as_argument(run), *map(shlex.quote, words)])


LOAD = """import torch

import undiffuse
from undiffuse.data.single import load_image
from undiffuse.data.transform import IntegerLevels, values_transform
{more}
model = undiffuse.load({run!r})
pixels = torch.tensor(load_image("image.png", {channels}).pixels)[None]
values = values_transform(model.transform).to_data(IntegerLevels(256).to_model(pixels))
"""

CONDITION = {
    "label": "cond = undiffuse.Condition(label=torch.full(({n},), {label}))\n",
    "prompt": "cond = model.text_condition([{prompt!r}] * {n})\n",
    "both": "cond = dataclasses.replace(model.text_condition([{prompt!r}] * {n}), label=torch.full(({n},), {label}))\n",
}

LIKELIHOOD = """nll = model.nll(values.expand({n}, *values.shape[1:]), {seed}, {points}, estimate="continuous"{cond})
bits = nll.bits_per_dim(model.dims)
print(f"at most {{bits.mean():.3f}} bits per dimension")
"""

FORWARD = """levels = model.noise_levels(undiffuse.Sampler(num_steps={steps}))
noise = ItemNoise({seed}, [0], model.x_shape, "forward")
for state in undiffuse.forward_trajectory(model.transform.to_model(values), levels, noise):
    print(f"log-SNR {{float(state.level.log_snr):.2f}}: x_t from {{state.x.min():.2f}} to {{state.x.max():.2f}}")
"""


def likelihood(run: Path, channels: int, n: int, seed: int, points: int, label: int | None, prompt: str) -> str:
    """Python for the bound of the saved image."""
    given = "both" if prompt and label is not None else "prompt" if prompt else "label" if label is not None else None
    head = ("import dataclasses\n\n" if given == "both" else "") + LOAD.format(run=str(run), channels=channels, more="")
    cond = CONDITION[given].format(n=n, label=label, prompt=prompt) if given else ""
    body = LIKELIHOOD.format(n=n, seed=seed, points=points, cond=", cond=cond" if given else "")
    return head + cond + body


def forward(run: Path, channels: int, seed: int, steps: int) -> str:
    """Python for the forward process of the saved image."""
    more = "from undiffuse.process.seeded_noise import ItemNoise\n"
    return LOAD.format(run=str(run), channels=channels, more=more) + FORWARD.format(seed=seed, steps=steps)
