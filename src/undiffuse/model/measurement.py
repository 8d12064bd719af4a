"""−log p of items by a model: one estimate, batch by batch, each item with noise of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from undiffuse.likelihood.nll import NLL, concatenate
from undiffuse.model import arguments
from undiffuse.model import likelihood_estimators as estimates
from undiffuse.model.latent import LatentTransform
from undiffuse.networks.condition import Condition
from undiffuse.process.seeded_noise import ItemNoise


def measure(
    model: Any,
    values: Tensor,
    seed: int = 0,
    mc_samples: int | None = None,
    batch: int = 256,
    progress: Callable[[int], None] | None = None,
    first: int = 0,
    estimate: str = "discrete",
    cond: Condition | None = None,
) -> NLL:
    """`Diffusion.nll`."""
    arguments.check_has_likelihood(model.config)
    estimator, parts = estimates.get(estimate), []
    arguments.check_counts(seed=(seed, 0), mc_samples=(mc_samples, 1), batch=(batch, 1), first=(first, 0))
    arguments.check_values(values, model.item_shape, model.transform)
    cond = None if cond is None else model.prepare_condition(cond, len(values))
    if estimate == "ode":
        arguments.check_trainable(model, "the flow's likelihood")
    model.eval()
    for start in range(0, len(values), batch):
        chunk = values[start : start + batch]
        items = range(first + start, first + start + len(chunk))
        x, extra = _encode(model, chunk, items, seed)
        chunk_cond = cond and cond.take(slice(start, start + batch))
        part = estimator(model, estimates.Batch(x, items, seed, chunk_cond), mc_samples)
        decoder = part.decoder - model.transform.log_abs_det(model.item_shape)
        part = part._replace(decoder=decoder)
        parts.append((part.with_parts(extra) if extra else part).cpu())
        if progress:
            progress(len(chunk))
    return concatenate(parts)


def _encode(model: Any, values: Tensor, items: range, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """x, and the parts that the bound adds to that of x: none, or those of an autoencoder, from the items' noise."""
    transform = model.transform
    if not isinstance(transform, LatentTransform):
        x = transform.to_model(values, model.dtype).to(model.device)
        return arguments.outside_inference_mode(x), {}
    eps = ItemNoise(seed, items, transform.x_shape, "posterior", model.device)(1)[0]
    x, extra = transform.bound_terms(arguments.outside_inference_mode(values), eps)
    return x.to(model.dtype), extra
