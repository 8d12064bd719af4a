"""The numbers of an evaluation as plain data and their meaning as sentences, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.data.transform import IntegerLevels, is_latent, values_transform
from undiffuse.errors import counted
from undiffuse.likelihood.nll import NLL
from undiffuse.model.cascade import AnyModel, Cascade
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.likelihood_estimators import MAX_EXACT_TRACE_DIMS, TIGHT_TOLERANCE, integral_ends
from undiffuse.process.statistics import mean_with_stderr

NAMES = {
    "discrete": "bound of the chain",
    "continuous": "continuous bound",
    "ode": "probability flow",
    "openai": "improved-diffusion's script",
    "flow_map": "flow map",
}
"""The names of estimates in messages."""
MAX_INTERVALS = 40
"""Most intervals of log-SNR in a curve of bits."""


def mean_bits(model: AnyModel, nats: Tensor) -> tuple[float, float]:
    """The mean of ``nats`` (B,) in bits per dimension and its standard error over the items, NaN for one item."""
    return mean_with_stderr(nats / (model.dims * math.log(2)))


def parts(nll: NLL) -> dict[str, Tensor]:
    """The parts of an estimate by name, (B,) nats: those of the density, those of an autoencoder, and the total."""
    of_density = {"prior": nll.prior, "diffusion": nll.diffusion_nats, "decoder": nll.decoder}
    return of_density | dict(nll.extra) | {"total": nll.total}


def summarize(model: AnyModel, name: str, nll: NLL, seconds: float, mc_samples: int | None) -> dict[str, Any]:
    """An estimate as plain data: each part as [mean, standard error], and what it cost; calls are for each item."""
    return {
        "title": title(model, name, mc_samples),
        "is_bound": is_bound(model, name, mc_samples),
        "bits_per_dim": {part: list(mean_bits(model, nats)) for part, nats in parts(nll).items()},
        "items": len(nll.total),
        "calls": nll.calls,
        "iw_samples" if name == "ode" else "mc_samples": mc_samples,
        "seconds": round(seconds, 1),
    }


def title(model: AnyModel, name: str, mc_samples: int | None) -> str:
    """An estimate's name in a table; ``mc_samples`` of "ode" are its importance samples."""
    number = "all" if mc_samples is None else f"{mc_samples:,} of"
    return {
        "discrete": f"bound of the chain, {number} {counted(model.chain_length, 'step')}",
        "continuous": f"continuous bound, {counted(mc_samples or 0, 'point')}",
        "ode": "probability flow" + (f", {mc_samples} importance samples" if mc_samples and mc_samples > 1 else ""),
        "openai": "as improved-diffusion's script",
        "flow_map": f"flow map, {counted(flow_map_calls(model), 'call')}",
    }[name]


def flow_map_calls(model: AnyModel) -> int:
    """The network calls of the estimate "flow_map"; 0 of a model that does not have it."""
    return model.config.calls if isinstance(model, Diffusion) and model.config.divergence else 0


def is_bound(model: AnyModel, name: str, mc_samples: int | None) -> bool:
    """Whether an estimate's expectation is at least −log p of the model.

    "ode" is a bound for latents and integer data, unless several importance samples have an estimated divergence: the
    mean of exp(noise) is above 1. "openai" is not: a clamp makes values more likely than they are. "flow_map" is not:
    the learned map is not the flow's.
    """
    if name != "ode":
        return name not in ("openai", "flow_map")
    is_dequantized = is_latent(model.transform) or isinstance(model.transform, IntegerLevels)
    return is_dequantized and (mc_samples == 1 or math.prod(model.x_shape) <= MAX_EXACT_TRACE_DIMS)


def explanations(model: AnyModel, names: Iterable[str], iw_samples: int) -> list[str]:
    """What the numbers of the estimates ``names`` mean, as sentences."""
    lines, names, latent = [], list(names), is_latent(model.transform)
    integers, exact = (
        isinstance(values_transform(model.transform), IntegerLevels),
        math.prod(model.x_shape) <= MAX_EXACT_TRACE_DIMS,
    )
    if any(is_bound(model, name, iw_samples) for name in names):
        lines.append("≤: an upper bound on −log₂ p per dimension, in expectation")
    if latent:
        lines.append(
            "a latent model: prior, diffusion and decoder are of z; reconstruction is -log₂ p(x given z), posterior "
            "log₂ q(z given x), minus the entropy of q in the mean"
        )
    if not integers:
        lines.append("a density: it depends on the units of the data, and may be negative")
    if "ode" in names:
        trace = "its divergence is exact" if exact else "its divergence is estimated by random signs, without bias"
        if latent and is_bound(model, "ode", iw_samples):
            meaning = f"a bound, because q(z given x) is not the exact posterior; {trace}"
        elif integers and is_bound(model, "ode", iw_samples):
            meaning = f"a bound, because integer data are dequantized; {trace}"
        elif latent or integers:
            meaning = f"no bound: noise in the estimated divergence biases the mean of {iw_samples} importance weights"
        elif exact:
            meaning = f"exact, to the integrator's tolerance {TIGHT_TOLERANCE.rtol:g}"
        else:
            meaning = f"no bound but the likelihood itself, up to noise: {trace}"
        lines.append(f"probability flow: {meaning}")
        lines.append(
            "the flow's prior term is at most that of the bounds if the denoiser is exact; a larger one shows errors "
            "of the model"
        )
        if {"discrete", "continuous"} & {*names}:
            lines.append(
                "unless the denoiser is exact, the flow is another model than the chain: its total may be above the "
                "bounds"
            )
    if "flow_map" in names:
        lines.append("flow map: an estimate and no bound, wrong by as much as the learned map differs from the flow")
    return lines


def few_call_error(model: AnyModel, nll: Mapping[str, NLL]) -> list[str]:
    """A sentence about the estimate "flow_map" minus "ode" of the same items and noise, if both are there."""
    if not {"flow_map", "ode"} <= nll.keys():
        return []
    few, flow = nll["flow_map"].total, nll["ode"].total
    n = min(len(few), len(flow))
    (mean, stderr), (size, _) = mean_bits(model, few[:n] - flow[:n]), mean_bits(model, (few[:n] - flow[:n]).abs())
    return [
        f"flow map minus probability flow, item by item: {mean:+.3f} ± {stderr:.3f} bits/dim, mean size {size:.3f} "
        f"(n = {n:,})"
    ]


def stage_lines(cascade: Cascade, nll: NLL) -> str:
    """What each stage adds to the mean bound, in bits per dimension of x."""
    bits = nll.per_step.mean(0) / (cascade.dims * math.log(2))
    lines = (f"{shape} {float(share):.4f}" for shape, share in zip(cascade.shapes, bits, strict=True))
    return f"{', '.join(lines)} bits per dimension of x"


def differences(model: AnyModel, nll: Mapping[str, NLL]) -> dict[str, dict[str, list[float]]]:
    """Each estimate minus the chain's bound in bits per dimension: [mean, standard error] of paired items, by part."""
    if "discrete" not in nll:
        return {}
    chain, paired = parts(nll["discrete"]), {}
    for name, other in nll.items():
        n = min(len(other.total), len(chain["total"]))
        if name != "discrete":
            paired[name] = {
                part: list(mean_bits(model, nats[:n] - chain[part][:n])) for part, nats in parts(other).items()
            }
    return paired


def bits_by_log_snr(model: Diffusion, nll: Mapping[str, NLL]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each bound among ``nll``: rising edges of log-SNR (N + 1,), and the bits per dimension (N,) between them.

    Prior and decoder are not included, nor a step from pure noise.
    """
    curves = {"discrete": _chain_bits, "continuous": _continuous_bits}
    found = {name: bits(model, nll[name]) for name, bits in curves.items() if name in nll}
    return {name: _merge_intervals(*curve) for name, curve in found.items() if len(curve[1])}


def _chain_bits(model: Diffusion, nll: NLL) -> tuple[np.ndarray, np.ndarray]:
    """Falling edges of log-SNR (N + 1,), and the bits per dimension (N,) of the chain's steps between them.

    Steps that no item sampled are interpolated, and then all are scaled to add up to the bound's own estimate.
    """
    log_snr = torch.stack([level.log_snr for level in reversed(model.chain)]).numpy()
    nats = torch.nanmean(nll.per_step, 0).numpy()
    if np.isinf(log_snr[0]):
        log_snr, nats = log_snr[1:], nats[1:]
    sampled = np.flatnonzero(np.isfinite(nats))
    if len(sampled) and bool(nll.per_step.isnan().any()):
        nats = np.interp(np.arange(len(nats)), sampled, nats[sampled])
        nats *= float(nll.diffusion_nats.mean()) / nats.sum()
    finite = np.isfinite(log_snr)
    return log_snr[finite], nats[: finite.sum() - 1] / (model.dims * math.log(2))


def _continuous_bits(model: Diffusion, nll: NLL) -> tuple[np.ndarray, np.ndarray]:
    """The same of the continuous bound, whose points are spread evenly over log-SNR."""
    lowest, highest = (float(level.log_snr) for level in integral_ends(model))
    bits = nll.per_step.mean(0).numpy() / (model.dims * math.log(2))
    return np.linspace(highest, lowest, len(bits) + 1), bits


def _merge_intervals(edges: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of neighbouring ``bits`` so that at most about `MAX_INTERVALS` remain; from falling edges to rising ones."""
    group = np.floor(MAX_INTERVALS * (edges[0] - edges) / (edges[0] - edges[-1]) + 1e-9)
    starts = np.flatnonzero(np.diff(group, prepend=-1.0))
    starts = starts[starts < len(bits)]
    return np.append(edges[starts], edges[-1])[::-1], np.add.reduceat(bits, starts)[::-1]
