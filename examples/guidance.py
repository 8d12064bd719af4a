"""Trains a model of labelled images and a classifier of noisy ones: ``python examples/guidance.py [DATA [FOLDER]]``.

DATA is a source of images with labels, by default the built-in digits. FOLDER, by default runs/guidance, gets both runs
and guidance.png, rows of samples from the same noise: without a label, with it, and guided in three ways.
"""

import sys
from pathlib import Path

import torch

from undiffuse import Guide, Sampler, fit, load, load_data, preset, replace_train
from undiffuse.model import noisy_classifier
from undiffuse.model.config import TrainConfig
from undiffuse.model.noisy_classifier import NoisyClassifierConfig
from undiffuse.networks.condition import Condition
from undiffuse.report import figures
from undiffuse.training.classifier_task import ClassifierRecipe, fit_classifier


def main(source: str = "digits", folder: str = "runs/guidance", each: int = 2, steps: int = 25, **settings) -> Path:
    data, length = load_data(source), settings or {"minutes": 2.0}
    recipe = replace_train(preset("digits"), conditional=True, **length)
    model = load(fit(recipe, data, f"{folder}/diffusion"))
    config = NoisyClassifierConfig({"kind": "unet", "widths": [32, 64], "blocks": 1})
    classifier = fit_classifier(
        ClassifierRecipe(config, TrainConfig(snapshots=0, **length)), data, f"{folder}/classifier"
    )
    guide = Guide(noisy_classifier.load(classifier).log_prob)

    labels = Condition(label=torch.arange(len(data.classes)).repeat(each))
    rows = {
        "without a label": (Sampler("ancestral", steps), None),
        "label": (Sampler("ancestral", steps), labels),
        "classifier-free": (Sampler("ancestral", steps, guidance=2.0), labels),
        "classifier in the score": (Sampler("ancestral", steps, guidance=0.0, classifier_scale=4.0), labels),
        "classifier in the mean": (
            Sampler("ancestral", steps, guidance=0.0, classifier_scale=4.0, classifier_form="mean"),
            labels,
        ),
    }
    n, samples = each * len(data.classes), []
    for name, (sampler, cond) in rows.items():
        samples.append(model.sample(n, 0, sampler, cond, guide=guide if "classifier in" in name else None))
        print(f"row {len(samples)}: {name}")
    path = Path(folder) / "guidance.png"
    figures.image_grid(torch.cat(samples).numpy(), data.num_values, columns=n).save(path)
    return path


if __name__ == "__main__":
    print(main(*sys.argv[1:3]))
