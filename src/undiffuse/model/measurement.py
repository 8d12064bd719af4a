"""−log p of items by a model: one estimate, batch by batch, each item with noise of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from undiffuse.likelihood.importance_weighting import iwae_bound
from undiffuse.likelihood.nll import NLL, concatenate
from undiffuse.model import arguments
from undiffuse.model import likelihood_estimators as estimates
from undiffuse.model.latent import LatentTransform
from undiffuse.networks.condition import Condition
from undiffuse.networks.protocol import evaluation_mode
from undiffuse.process.seeded_noise import ItemNoise, generator


@torch.inference_mode(False)  # `ode` needs gradients
@torch.no_grad()
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
    """−log p of each item, or a bound on it, in nats, with its parts.

    ``values`` (n, *item_shape) are in the units of the data. ``estimate`` is a row of `ESTIMATES`: ``"discrete"``
    is the bound of the chain, from every step or from ``mc_samples`` steps and the decoder;
    ``"continuous"`` the bound of infinitely many steps, from ``mc_samples`` points; ``"ode"`` the likelihood of
    the probability flow; ``"flow_map"`` an estimate of it by few calls, of a flow map both ways; ``"openai"`` the
    chain's bound as improved-diffusion computes it [Ho20 eq. 5; VDM21 §5; Song21 eq. 39]. Item i's noise is a
    function of (seed, first + i). Discrete data get a probability, continuous data a density.
    With ``cond``, a condition for each item, the result is −log p(item given its condition). Of a latent model
    every estimate is a bound, with the parts of its autoencoder in `NLL.extra`.

    Raises `ConfigError`, and `DataError` for values that are not among the model's values, NaN or infinite.
    """
    arguments.check_predicts_mean(model.config)
    estimator, parts = estimates.get(estimate), []
    arguments.check_counts(seed=(seed, 0), mc_samples=(mc_samples, 1), batch=(batch, 1), first=(first, 0))
    arguments.check_values(values, model.item_shape, model.transform)
    arguments.check_small_image(cond, model.condition_sizes)
    cond = None if cond is None else model.prepare_condition(cond, len(values))
    if estimate == "ode":
        arguments.check_trainable(model, "the flow's likelihood")
    for start in range(0, len(values), batch):
        chunk = values[start : start + batch]
        items = range(first + start, first + start + len(chunk))
        chunk_cond = cond and cond.take(slice(start, start + batch))
        with evaluation_mode(model):
            if isinstance(model.transform, LatentTransform):
                part = _latent_nll(model, estimate, chunk, items, seed, mc_samples, chunk_cond)
            else:
                x = arguments.outside_inference_mode(model.transform.to_model(chunk, model.dtype).to(model.device))
                part = estimator(model, estimates.Batch(x, items, seed, chunk_cond), mc_samples)
                part = part._replace(decoder=part.decoder - model.transform.log_abs_det(model.item_shape))
        parts.append(part.cpu())
        if progress:
            progress(len(chunk))
    return concatenate(parts)


def _latent_nll(
    model: Any,
    estimate: str,
    values: Tensor,
    items: range,
    seed: int,
    mc_samples: int | None,
    cond: Condition | None,
) -> NLL:
    """The estimate of one z ~ q(z given x) for each item, with the parts of `LatentTransform.bound_terms`.

    Of "ode" ``mc_samples`` is the number of z, whose weights p(x given z) p(z)/q(z given x) are averaged [Burda16].
    """
    transform, estimator, samples = model.transform, estimates.get(estimate), []
    noise = ItemNoise(seed, items, transform.x_shape, "posterior", model.device)
    num_z, each = ((mc_samples or 1), None) if estimate == "ode" else (1, mc_samples)
    for k in range(num_z):
        x, extra = transform.bound_terms(arguments.outside_inference_mode(values), noise(1)[0])
        own_seed = seed if k == 0 else generator(seed, "importance sample", k).initial_seed()
        part = estimator(model, estimates.Batch(x.to(model.dtype), items, own_seed, cond), each)
        samples.append(part.with_parts(extra))
    return samples[0] if num_z == 1 else iwae_bound(samples)
