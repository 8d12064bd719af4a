"""Latent diffusion [Rombach22]: an autoencoder as a data transform, and the bound on −log p(x) that it gives.

x of the diffusion model is z, standardized: x = (z − mean)/std with one mean and std a channel of z.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from undiffuse.errors import ConfigError
from undiffuse.model import autoencoder as autoencoders
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.statistics import item_sum

if TYPE_CHECKING:
    from undiffuse.model.autoencoder import Autoencoder


class LatentTransform:
    """Values of the data ↔ standardized latents, by an ``autoencoder`` whose weights do not learn.

    ``x_shape`` is the shape of z, and ``values`` the transform of the data themselves. ``mean`` and ``std`` are those
    of z ~ q(z given x) over the training part, one number a channel: those that are given (``has_moments``), or 0 and 1
    until `standardize` sets them. Copies of a model share it, and it moves to the device of what it is given.
    """

    def __init__(self, autoencoder: Autoencoder, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()) -> None:
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.x_shape, self.values = autoencoder.latent_shape, autoencoder.transform
        channels = self.x_shape[0]
        self.has_moments = bool(mean)
        self.standardize(mean or (0.0,) * channels, std or (1.0,) * channels)

    def standardize(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Set the moments. Raises `ConfigError` unless there is a finite mean and a positive std for each channel."""
        numbers = torch.tensor([list(mean), list(std)], dtype=torch.float64) if len(mean) == len(std) else None
        if numbers is None or numbers.shape[1] != self.x_shape[0] or not bool(torch.isfinite(numbers).all()):
            cause = f"{len(mean)} means and {len(std)} standard deviations for {self.x_shape[0]} channels of z"
            raise ConfigError("LATENTS", "transform.mean", cause, "Give one finite number of each a channel")
        if min(std) <= 0:
            raise ConfigError("LATENTS", "transform.std", "not positive", "Give positive numbers")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    def moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std), each (1, C, 1, ...), of the dtype and on the device of ``like`` (B, *x_shape)."""
        shape = (1, -1) + (1,) * (like.ndim - 2)
        mean, std = (torch.tensor(n, dtype=like.dtype, device=like.device).view(shape) for n in (self.mean, self.std))
        return mean, std

    def posterior(self, values: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of q(z given x) for ``values`` (B, *item_shape), not standardized."""
        autoencoder = self._on(values.device if device is None else torch.device(device))
        x = self.values.to_model(values, autoencoder.dtype).to(autoencoder.log_scale.device)
        return autoencoder.encode(x)

    def to_model(self, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """x = (mean of q − mean)/std in ``dtype``, (B, *x_shape)."""
        z = self.posterior(values)[0].to(dtype)
        mean, std = self.moments(z)
        return (z - mean) / std

    def to_data(self, x: Tensor) -> Tensor:
        """The values nearest to x̂(mean + std x)."""
        return self.values.to_data(self.decode(x))

    def decode(self, x: Tensor) -> Tensor:
        """x̂(mean + std x), (B, *item_shape), in the units of ``values``, at least float32."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, std = self.moments(x)
        return self._on(x.device).decode(mean + std * x)

    def edges(self, x: Tensor) -> None:
        """None: latents have a density."""

    def log_abs_det(self, item_shape: tuple[int, ...]) -> float:
        """0: the decoder's distribution is that of the values themselves."""
        return 0.0

    def bound_terms(self, values: Tensor, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(x, parts): x = a standardized z ~ q(z given x) from the noise ``eps``, and what the bound adds to that of x.

        −log p(x) ≤ E_q[−log p(x given z) + log q(z given x) + bound(z)]. Here q is N((mean_q − mean)/std, var_q/std²),
        the density of the standardized z, as bound(z) is: the determinants of standardizing cancel. Parts, (B,) nats,
        float64: ``reconstruction`` −log p(x given z), and ``posterior`` log q(z given x), whose mean is −entropy.
        Raises `ConfigError` for a deterministic encoder and for a decoder without a distribution.
        """
        mean_q, log_var = self.posterior(values, eps.device)
        if log_var is None:
            kind = self.autoencoder.config.network.get("kind", type(self.autoencoder.network).__name__)
            cause = f"the encoder of its autoencoder ({kind}) is deterministic: q(z given x) has no density"
            fix = "Use an autoencoder with a variance, such as one of 'undiffuse train-autoencoder'"
            raise ConfigError("DETERMINISTIC", "likelihood", cause, fix)
        q = Gaussian(mean_q.double(), log_var.double())
        mean, std = self.moments(q.mean)
        q = Gaussian((q.mean - mean) / std, q.log_var - 2 * torch.log(std))
        x = q.sample(eps.double())
        reconstruction = -self.autoencoder.log_prob(values, self.decode(x))
        return x, {"reconstruction": reconstruction, "posterior": item_sum(q.log_prob(x))}

    def _on(self, device: torch.device) -> Autoencoder:
        return self.autoencoder.to(device)

    def __deepcopy__(self, memo: object) -> LatentTransform:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LatentTransform):
            return NotImplemented
        mine, theirs = (autoencoders.fingerprint(t.autoencoder) for t in (self, other))
        return (self.mean, self.std, mine) == (other.mean, other.std, theirs)

    def __hash__(self) -> int:
        return hash((self.mean, self.std))

    def __repr__(self) -> str:
        return f"LatentTransform(z of {'×'.join(map(str, self.x_shape))})"


def to_dict(transform: LatentTransform) -> dict[str, Any]:
    """The description of the transform without the weights, as plain data."""
    autoencoder = autoencoders.describe(transform.autoencoder)
    return {"kind": "latent", "mean": list(transform.mean), "std": list(transform.std), "autoencoder": autoencoder}


def from_dict(plain: Mapping[str, Any]) -> LatentTransform:
    """The transform of `to_dict` with untrained weights. Raises as `autoencoder.from_description` does."""
    autoencoder = autoencoders.from_description(plain["autoencoder"])
    return LatentTransform(autoencoder, tuple(plain["mean"]), tuple(plain["std"]))
