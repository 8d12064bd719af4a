"""A model's denoiser as a graph with a dynamic batch: ONNX, or torch.export; with the levels of its chain as JSON.

The graph maps x_t (B, *item_shape), alpha, sigma and time (B,) each, and label (B,) of a model with classes (−1: none),
to x̂ (B, *item_shape), the prediction of the clean x, with x_t = alpha x̂ + sigma ε̂. ``levels.json`` has alpha, sigma and
time of each step of the chain, so that a sampler needs nothing else.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.data import transform as transforms
from undiffuse.denoising.denoiser import Preconditioning
from undiffuse.errors import ConfigError, UndiffuseError
from undiffuse.interop.parity import Check
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.condition import Condition
from undiffuse.process.noise_level import NoiseLevel
from undiffuse.runtime.atomic_file import write_atomic

LEVELS, ONNX, PROGRAM = "levels.json", "model.onnx", "model.pt2"
GRAPH_LIMIT = 1e-4
"""The largest accepted difference of x̂, as a fraction of the largest x̂, or of 1 if that is larger."""
MAX_ONNX_BYTES = 1_900_000_000
"""An ONNX file holds at most 2 GB."""
EXPORTED_BATCH, CHECKED_BATCH = 2, 3
CHECKED_TIMES = (0.05, 0.3, 0.8)
"""Times of the schedule at which the outputs are compared, in a batch of another size than the exported one."""


class DenoiserGraph(nn.Module):
    """x̂ of ``model``, from tensors alone."""

    def __init__(self, model: Diffusion) -> None:
        super().__init__()
        self.network, self.target = model.network, model.target
        self.preconditioning = Preconditioning(**{"chain_length": model.chain_length, **model.config.preconditioning})
        self.categorical, self.channels = model.config.output == "categorical", model.x_shape[0]

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        level = NoiseLevel(time, alpha, sigma, 2 * (alpha.log() - sigma.log()))
        columns = [
            v.reshape(-1, *[1] * (x_t.ndim - 1)) for v in (alpha, sigma, self.preconditioning.input_scale(level))
        ]
        cond = None if label is None else Condition(label=label)
        inputs = [columns[2] * x_t, time, cond, *([x_t, *columns[:2]] if self.categorical else [])]
        y = self.network(*inputs)[:, : self.channels]
        return y if self.categorical else self.target.solve(y, x_t, level)[0]


def export_onnx(model: Diffusion, folder: Path) -> list[Check]:
    """Write ``model.onnx`` and ``levels.json`` into ``folder``; returns the difference that onnxruntime computes.

    Raises `ConfigError` for a model that has no such graph, and without the packages onnx and onnxscript.
    """
    try:
        import onnxscript  # noqa: F401  # pyright: ignore
    except ImportError:
        cause, fix = "the packages onnx and onnxscript are missing", "Run: pip install 'undiffuse[onnx]'"
        raise ConfigError("EXPORT", "--format onnx", cause, fix) from None
    size = sum(p.numel() * p.element_size() for p in model.network.parameters())
    if size > MAX_ONNX_BYTES:
        cause = f"its weights have {size:,} bytes, and one ONNX file holds 2 GB"
        raise ConfigError("EXPORT", "--format onnx", cause, "Use the format torch")
    program = _program(model)
    with warnings.catch_warnings(), _one_error():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists operators of torchvision that are missing
        graph = torch.onnx.export(program, (), dynamo=True, verbose=False, external_data=False)
    assert graph is not None
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / ONNX, graph.model_proto.SerializeToString())
    _write_levels(model, folder)
    try:
        import onnxruntime  # pyright: ignore
    except ImportError:
        return [Check("predictions of x", "onnxruntime, which is not installed", None, GRAPH_LIMIT)]
    session = onnxruntime.InferenceSession(str(folder / ONNX), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, dict(zip(names, (i.numpy() for i in inputs), strict=True)))[0])

    return [_check(model, f"onnxruntime {onnxruntime.__version__}", run)]


def export_torch(model: Diffusion, folder: Path) -> list[Check]:
    """Write ``model.pt2``, for torch.export.load, and ``levels.json``; returns the difference of the loaded program."""
    program = _program(model)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), _one_error():
        warnings.simplefilter("ignore")
        torch.export.save(program, folder / PROGRAM)
        loaded = torch.export.load(folder / PROGRAM).module()
    _write_levels(model, folder)
    return [_check(model, f"torch.export.load, {torch.__version__}", loaded)]


def _program(model: Diffusion) -> torch.export.ExportedProgram:
    """The graph of `DenoiserGraph` with a dynamic batch. Raises `ConfigError`."""
    others = sorted(set(model.condition_sizes) - {"classes"})
    needed = {
        "transform": (not transforms.is_latent(model.transform), "a latent model, whose decoder would be missing"),
        "target": (not model.target.needs_next_level, f"{model.target.name}, which depends on the next level"),
        "calls": (not model.config.calls, "a distilled model, which draws with its own solver"),
        "network": (not others, f"a network with the conditions {', '.join(others)}"),
    }
    for name, (holds, cause) in needed.items():
        if not holds:
            fix = "docs/formats.md lists the models that can be exported"
            raise ConfigError("EXPORT", f"model.{name}", f"it is {cause}", fix)
    inputs, batch = _inputs(model, EXPORTED_BATCH), torch.export.Dim("batch", min=1, max=1 << 20)
    graph = DenoiserGraph(model.eval())
    with warnings.catch_warnings(), _one_error():
        warnings.simplefilter("ignore")
        return torch.export.export(graph, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))


@contextmanager
def _one_error() -> Iterator[None]:
    """Makes a `ConfigError` of the exceptions of many types that torch's exporters raise."""
    try:
        yield
    except (UndiffuseError, MemoryError, OSError):
        raise
    except Exception as error:
        cause = " ".join(f"its graph cannot be written ({type(error).__name__}: {error})".split())
        fix = "docs/formats.md lists the models that can be exported"
        raise ConfigError("EXPORT", "model.network", cause[:300], fix) from error


def _inputs(model: Diffusion, n: int) -> tuple[Tensor, ...]:
    """Noise, and the scales and times of ``n`` levels, and labels if the model has classes."""
    generator = torch.Generator().manual_seed(0)
    level = model.schedule(torch.tensor([CHECKED_TIMES[i % len(CHECKED_TIMES)] for i in range(n)], dtype=torch.float64))
    time = model.denoiser().preconditioning.time_input(level)
    scales = [v.detach().float() for v in (level.alpha, level.sigma, time)]
    classes = model.condition_sizes.get("classes", 0)
    labels = [torch.arange(n) % (classes + 1) - 1] if classes else []
    return torch.randn((n, *model.x_shape), generator=generator), *scales, *labels


@torch.no_grad()
def _check(model: Diffusion, against: str, run: Callable[..., Tensor]) -> Check:
    """The difference of ``run`` of other inputs than the exported ones from the model's own denoiser."""
    x_t, *scales = _inputs(model, CHECKED_BATCH)
    cond = Condition(label=scales[3]) if len(scales) > 3 else None
    level = model.schedule(torch.tensor(CHECKED_TIMES, dtype=torch.float64))
    own = model.denoiser()(x_t, level, cond).x
    difference = float((run(x_t, *scales) - own).abs().max()) / max(1.0, float(own.abs().max()))
    return Check("predictions of x", against, difference, GRAPH_LIMIT)


def _write_levels(model: Diffusion, folder: Path) -> None:
    """Write what a sampler needs beside the graph: shapes, values and the levels of the chain, from noise to data."""
    time = model.denoiser().preconditioning.time_input
    fields: dict[str, Any] = {"x_shape": list(model.x_shape), "classes": model.condition_sizes.get("classes", 0)}
    fields |= {"transform": transforms.to_dict(model.transform), "inputs": ["x_t", "alpha", "sigma", "time", "label"]}
    columns = {"t": "t", "alpha": "alpha", "sigma": "sigma"}
    fields["chain"] = [
        {name: float(getattr(level, field).detach()) for name, field in columns.items()}
        | {"time": float(time(level).detach())}
        for level in model.chain
        if level.sigma > 0
    ]
    write_atomic(folder / LEVELS, json.dumps(fields, indent=1).encode())
