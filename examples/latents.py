"""Trains an autoencoder and a diffusion model of its latents: ``python examples/latents.py [DATA [FOLDER]]``.

DATA is a source of images, by default the built-in digits. FOLDER, by default runs/latents, gets both runs and
latents.png: held-out items, what the autoencoder makes of them, and samples of the diffusion model.
"""

import sys
from pathlib import Path

import torch

from undiffuse import fit, load, load_data, preset, replace_train
from undiffuse.model import autoencoder as autoencoders
from undiffuse.model.autoencoder import AutoencoderConfig
from undiffuse.model.config import Config, TrainConfig
from undiffuse.model.presets import of_latents
from undiffuse.report import figures
from undiffuse.training.autoencoder_task import AutoencoderRecipe, fit_autoencoder


def main(source: str = "digits", folder: str = "runs/latents", images: int = 12, **settings) -> Path:
    data, length = load_data(source), settings or {"minutes": 2.0}
    network = {"kind": "kl", "widths": [32, 64], "latent_channels": 4}
    config = AutoencoderConfig(network, reconstruction="nll", kl_weight=0.1)
    recipe = AutoencoderRecipe(config, TrainConfig(snapshots=0, **length))
    autoencoder = autoencoders.load(fit_autoencoder(recipe, data, f"{folder}/autoencoder"))

    of_z: Config = replace_train(of_latents(preset("digits")), **length)
    model = load(fit(of_z, data, f"{folder}/diffusion", autoencoder=autoencoder))
    values = torch.from_numpy(data.values[data.split().test[:images]])
    bound = model.nll(values, estimate="continuous")
    print(f"at most {bound.bits_per_dim(model.dims).mean():.3f} bits per dimension")

    decoded = model.transform.to_data(model.transform.to_model(values))
    rows = torch.cat([values, decoded, model.sample(len(values))])
    path = Path(folder) / "latents.png"
    figures.image_grid(rows.numpy(), data.num_values, columns=len(values)).save(path)
    return path


if __name__ == "__main__":
    print(main(*sys.argv[1:3]))
