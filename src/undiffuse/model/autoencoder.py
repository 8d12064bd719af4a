"""An autoencoder: a network, the data transform of its items, and the distribution of x given z; and its file."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.data import transform as transforms
from undiffuse.data.transform import DataTransform
from undiffuse.errors import ConfigError
from undiffuse.model.build import check_item_shape
from undiffuse.model.config import Settings, from_dict
from undiffuse.model.module_file import load_module, save_module
from undiffuse.networks.autoencoder import AUTOENCODERS
from undiffuse.networks.registry import accepted, construct
from undiffuse.process.gaussian import Gaussian
from undiffuse.process.laplace import Laplace
from undiffuse.process.statistics import item_sum
from undiffuse.runtime.precision import autocast
from undiffuse.runtime.side_files import check_info
from undiffuse.runtime.tensor_file import FORMAT, digest

DISTRIBUTIONS = ("laplace", "gaussian", "none")
RECONSTRUCTIONS = ("l1", "nll")
MIN_SCALE = 1e-4
"""The least scale that is fitted to an autoencoder, in the units of x."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """``network``: its ``kind``, a row of `AUTOENCODERS`, and settings. ``distribution`` is that of x given z.

    ``reconstruction`` and ``kl_weight`` are those of the training loss, see `Autoencoder.loss`. Raises `ConfigError`.
    """

    network: Settings = field(default_factory=lambda: {"kind": "kl"})
    distribution: str = "laplace"
    reconstruction: str = "l1"
    kl_weight: float = 0.02

    def __post_init__(self) -> None:
        for name, choices in (("distribution", DISTRIBUTIONS), ("reconstruction", RECONSTRUCTIONS)):
            if (chosen := getattr(self, name)) not in choices:
                fix = f"Use {', '.join(choices[:-1])} or {choices[-1]}"
                raise ConfigError("CONFIG", f"model.{name} = {chosen!r}", "unknown", fix)
        if not 0 <= self.kl_weight <= 1e6:
            raise ConfigError("CONFIG", f"model.kl_weight = {self.kl_weight!r}", "out of range", "Give 0 or more")


class Autoencoder(nn.Module):
    """q(z given x) and p(x given z) of items of ``item_shape``, x in the units of ``transform``.

    q = N(mean, exp(log_var)) of the encoder. p(x given z) is a Laplace or a Gaussian distribution around the decoder's
    output with one scale a channel, exp(``log_scale``): of discrete data the mass of the bin of each value, which sums
    to 1 over the values, of continuous data a density. ``network`` is a network of your own, see
    `undiffuse.networks.autoencoder`. ``info`` is what else the file records. Raises `ConfigError`.
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        item_shape: tuple[int, ...],
        transform: DataTransform,
        info: dict[str, Any] | None = None,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_item_shape(item_shape)
        self.config, self.transform, self.info = config, transform, dict(info or {})
        self.item_shape = tuple(item_shape)
        self.network: Any = _build_network(config.network, self.item_shape) if network is None else network
        self.latent_shape: tuple[int, ...] = self.network.latent_shape(self.item_shape)
        self.log_scale = nn.Parameter(torch.full((self.item_shape[0],), -2.0))
        self.autocast: torch.dtype | None = None
        self.initial_tensors = {name: tensor.to("meta") for name, tensor in self.state_dict().items()}

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    @property
    def is_deterministic(self) -> bool:
        """Whether the encoder has no variance, so that there is no q and no likelihood."""
        return bool(self.network.is_deterministic)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of q(z given x), (B, *latent_shape); None if the encoder is deterministic."""
        return self.network.encode(x.to(self.dtype))

    def decode(self, z: Tensor) -> Tensor:
        """x̂(z), (B, *item_shape)."""
        return self.network.decode(z.to(self.dtype))

    def log_prob(self, values: Tensor, x_hat: Tensor) -> Tensor:
        """log p(x given z) of ``values`` (B, *item_shape) in the units of the data, (B,) nats, float64.

        ``x_hat`` is `decode` of z. Of continuous data it is a density in the units of the data. Raises `ConfigError` if
        the scale was not fitted.
        """
        if self.config.distribution == "none":
            cause = "it has no distribution of x given z, because its scale was not fitted"
            raise ConfigError("NO_DECODER", "the autoencoder", cause, "Train with it, or use with_fitted_scale()")
        x = self.transform.to_model(values.to(x_hat.device), torch.float64)
        edges = self.transform.edges(values.to(x_hat.device) if self.transform.edges(x) is not None else x)
        log_scale = self.log_scale.double().view(-1, *[1] * (x.ndim - 2))
        x_hat = x_hat.double()
        if self.config.distribution == "gaussian":
            p: Gaussian | Laplace = Gaussian(x_hat, (2 * log_scale).expand(x_hat.shape))
        else:
            p = Laplace(x_hat, log_scale.expand(x_hat.shape))
        elements = p.log_prob(x) if edges is None else p.bin_log_prob(edges)
        return item_sum(elements) + self.transform.log_abs_det(self.item_shape)

    def loss(self, values: Tensor, eps: Tensor, network: Any = None) -> Tensor:
        """(reconstruction + kl_weight KL(q(z given x) to N(0, I)))/dims of each item, (B,), with z = mean + std eps.

        ``nll`` is the reconstruction −log p(x given z) in nats, with the scale; ``l1`` is Σ |x − x̂|, and the scale is
        fitted beside it by −log p(x given z), which adds nothing to the loss. With ``nll`` and kl_weight = 1 this is
        the bound −log p(x) ≤ ... with the prior N(0, I).
        """
        x = self.transform.to_model(values, self.dtype).to(eps.device)
        with autocast(x.device, self.autocast):
            x_hat, mean, log_var = (self.network if network is None else network)(x, eps)
        x_hat, mean, log_var = (part.to(x.dtype) for part in (x_hat, mean, log_var))
        kl = item_sum(Gaussian(mean, log_var).kl(Gaussian(torch.zeros_like(mean), torch.zeros_like(log_var))))
        if self.config.reconstruction == "nll":
            reconstruction = -self.log_prob(values, x_hat)
        else:
            scale_nll = -self.log_prob(values, x_hat.detach())
            reconstruction = item_sum((x - x_hat).abs()) + scale_nll - scale_nll.detach()
        return ((reconstruction + self.config.kl_weight * kl) / x[0].numel()).to(x.dtype)

    @torch.no_grad()
    def with_fitted_scale(self, values: Tensor, batch: int = 64) -> Autoencoder:
        """A copy with the scale of maximal likelihood of x around x̂(mean of q), of ``values`` (n, *item_shape).

        That is the mean of |x − x̂| of each channel for a Laplace distribution (which one without becomes), and the root
        mean square for a Gaussian; at least `MIN_SCALE`.
        """
        gaussian, total, count = self.config.distribution == "gaussian", torch.zeros(len(self.log_scale)).double(), 0
        for part in values.split(batch):
            x = self.transform.to_model(part, self.dtype).to(self.log_scale.device)
            error = (x - self.decode(self.encode(x)[0])).double().flatten(2 if x.ndim > 2 else 1)
            error = error if x.ndim > 2 else error[..., None]
            total += (error**2 if gaussian else error.abs()).sum((0, 2)).cpu()
            count += error[:, 0].numel()
        scale = (total / count).sqrt() if gaussian else total / count
        fitted = copy.deepcopy(self)
        fitted.config = replace(self.config, distribution="gaussian" if gaussian else "laplace")
        fitted.log_scale.copy_(scale.clamp(min=MIN_SCALE).log())
        return fitted


def _build_network(settings: Settings, item_shape: tuple[int, ...]) -> nn.Module:
    kind = settings.get("kind")
    if not isinstance(kind, str) or kind not in AUTOENCODERS:
        fix = f"Use {' or '.join(AUTOENCODERS)}"
        raise ConfigError("NETWORK", "network.kind", f"there is no autoencoder {kind!r}", fix)
    supplied = {"channels": item_shape[0], "dims": len(item_shape) - 1}
    given = {name: value for name, value in settings.items() if name != "kind"}
    cls = AUTOENCODERS[kind]
    if supplied["dims"] == 0:
        cause = "vectors have no sides that could be halved"
        raise ConfigError("SHAPE", "autoencoder", cause, "Give sequences, images or volumes")
    return construct(cls, kind, {**given, **{name: supplied[name] for name in accepted(cls, supplied)}})


def describe(autoencoder: Autoencoder) -> dict[str, Any]:
    """All that is needed to build the autoencoder again except its weights, as plain data."""
    return {
        "config": asdict(autoencoder.config),
        "item_shape": list(autoencoder.item_shape),
        "transform": transforms.to_dict(autoencoder.transform),
        "info": autoencoder.info,
    }


def from_description(plain: Any) -> Autoencoder:
    """The untrained autoencoder that `describe` described. Raises `ConfigError`, LookupError, TypeError, ValueError."""
    config = from_dict(AutoencoderConfig, plain["config"], "model")
    transform, shape = transforms.from_dict(plain["transform"]), tuple(plain["item_shape"])
    return Autoencoder(config, shape, transform, check_info(plain.get("info")))


def fingerprint(autoencoder: Autoencoder) -> str:
    """sha256 of weights, transform and configuration; what else is known of it does not count."""
    plain = {name: part for name, part in describe(autoencoder).items() if name != "info"}
    tensors = {name: tensor.detach().cpu() for name, tensor in autoencoder.state_dict().items()}
    return digest(tensors, {"undiffuse": str(FORMAT), "autoencoder": json.dumps(plain, sort_keys=True)})


def save(autoencoder: Autoencoder, path: str | Path) -> None:
    """`save_module` of an autoencoder."""
    save_module(autoencoder, path, "autoencoder", describe(autoencoder))


def load(path: str | Path, device: torch.device | str = "cpu") -> Autoencoder:
    """`load_module` of an autoencoder."""
    source = "Give a run of `undiffuse train-autoencoder`, or another autoencoder that docs/latent.md lists"
    return load_module(path, "autoencoder", from_description, device, source)
