"""Linear-Gaussian autoencoders and exact diffusion priors: their likelihood has a closed form. Tiny autoencoders."""

from __future__ import annotations

import math

import torch
from oracles import gaussian_log_prob
from torch import Tensor, nn

from undiffuse.data.transform import DataTransform, Identity, IntegerLevels
from undiffuse.model.autoencoder import Autoencoder, AutoencoderConfig
from undiffuse.model.config import ModelConfig
from undiffuse.model.diffusion import Diffusion
from undiffuse.model.latent import LatentTransform

f64 = torch.float64
KL = {"kind": "kl", "widths": [8, 16], "latent_channels": 2}
CENTRE, VARIANCES = torch.tensor([0.4, -0.7], dtype=f64), torch.tensor([1.5, 0.3], dtype=f64)
"""p(z) = N(CENTRE, diag(VARIANCES)) of the linear model."""


class Linear(nn.Module):
    """x = W z + b + noise of standard deviation ``std``, W with orthogonal columns, and its exact q(z given x).

    q has a diagonal covariance because the columns are orthogonal. ``shift`` is added to its mean and ``factor``
    multiplies its variance, so that KL(q to the posterior) is known.
    """

    is_deterministic = False

    def __init__(self, dims: int = 3, std: float = 0.5, shift: float = 0.0, factor: float = 1.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        columns = torch.linalg.qr(torch.randn(dims, len(CENTRE), generator=g, dtype=f64))[0]
        self.W = nn.Parameter(columns * torch.tensor([1.3, 0.8], dtype=f64))
        self.b = nn.Parameter(torch.randn(dims, generator=g, dtype=f64))
        self.std, self.shift, self.factor = std, shift, factor

    def latent_shape(self, item_shape):
        return (len(CENTRE),)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        precision = 1 / VARIANCES + (self.W**2).sum(0) / self.std**2
        return ((x - self.b) @ self.W / self.std**2 + CENTRE / VARIANCES) / precision, 1 / precision

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = self.posterior(x)
        return mean + self.shift, torch.log(self.factor * var).expand(mean.shape)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W.T + self.b

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; W CENTRE + b, W diag(VARIANCES) W' + std² I)."""
        cov = self.W @ torch.diag(VARIANCES) @ self.W.T + self.std**2 * torch.eye(len(self.b), dtype=f64)
        return torch.distributions.MultivariateNormal(self.decode(CENTRE), cov).log_prob(x)


class ExactPrior(nn.Module):
    """E[x given x_t] for x ~ N(mean, var), of the log-SNR of a variance-preserving process."""

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.mean, self.var = nn.Parameter(mean), nn.Parameter(var)

    def forward(self, x: Tensor, time: Tensor, cond: object = None) -> Tensor:
        alpha2 = torch.sigmoid(time.to(x))[:, None]
        gain = alpha2.sqrt() * self.var / (alpha2 * self.var + 1 - alpha2)
        return self.mean + gain * (x - alpha2.sqrt() * self.mean)


def linear_autoencoder(transform: DataTransform | None = None, **settings) -> Autoencoder:
    """The autoencoder of `Linear` in float64, p(x given z) Gaussian with the ``std`` of its noise."""
    network = Linear(**settings)
    config = AutoencoderConfig(distribution="gaussian")
    autoencoder = Autoencoder(config, (len(network.b),), transform or Identity(), network=network).double()
    nn.init.constant_(autoencoder.log_scale, math.log(network.std))
    return autoencoder


def linear_transform(mean=(0.5, -2.0), std=(3.0, 0.2), transform: DataTransform | None = None, **settings):
    return LatentTransform(linear_autoencoder(transform, **settings), mean, std)


def prior_nll(transform: LatentTransform, x: Tensor) -> Tensor:
    """−log p of the standardized z, (B,): the bound of an exact density."""
    mean, std = (torch.tensor(n, dtype=f64) for n in (transform.mean, transform.std))
    return -gaussian_log_prob(x, (CENTRE - mean) / std, VARIANCES / std**2).sum(1)


def exact_model(transform: LatentTransform) -> Diffusion:
    """A diffusion model of the standardized z whose denoiser is exact."""
    mean, std = (torch.tensor(n, dtype=f64) for n in (transform.mean, transform.std))
    schedule = {"name": "linear_log_snr", "high": 18.0, "low": -26.0}
    config = ModelConfig(target={"name": "x"}, schedule=schedule, weight={"name": "simple"}, chain_length=200)
    network = ExactPrior((CENTRE - mean) / std, VARIANCES / std**2)
    return Diffusion(config, transform.autoencoder.item_shape, transform, network=network).double().eval()


def tiny_autoencoder(item_shape=(1, 8, 8), num_values=17, seed=0, **settings) -> Autoencoder:
    """A small KL autoencoder of images with random weights."""
    torch.manual_seed(seed)
    config = AutoencoderConfig(KL, **settings)
    return Autoencoder(config, item_shape, IntegerLevels(num_values)).eval()


def tiny_latent_model(steps=10, **settings) -> Diffusion:
    """A diffusion model of the latents of `tiny_autoencoder`, with random weights."""
    transform = LatentTransform(tiny_autoencoder(**settings), (0.1, -0.2), (0.8, 1.2))
    torch.manual_seed(1)
    network = {"kind": "unet", "widths": (8,), "blocks": 1, "attention": ()}
    schedule = {"name": "linear_log_snr", "high": 8.0}
    config = ModelConfig(network=network, schedule=schedule, chain_length=steps)
    model = Diffusion(config, transform.autoencoder.item_shape, transform, {"num_values": 17})
    for parameter in model.network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()
