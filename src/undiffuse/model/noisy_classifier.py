"""A classifier of noisy items, p(label|x_t), for guidance by its gradient: the module and its file.

Its inputs are log-SNR and x_t/√(alpha² + sigma²), which determine p(label|x_t), so that it works with diffusion models
of any schedule. It is trained with log-SNR uniform over a range [Dhariwal21 §4: at the model's noise levels].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.data import transform as transforms
from undiffuse.data.transform import DataTransform
from undiffuse.denoising.denoiser import Preconditioning
from undiffuse.errors import ConfigError
from undiffuse.model.build import build_network
from undiffuse.model.config import Settings, from_dict
from undiffuse.model.module_file import load_module, save_module
from undiffuse.networks.classifier_head import make_classifier
from undiffuse.networks.condition import Condition
from undiffuse.networks.norm import to_fast_layout
from undiffuse.networks.protocol import weight_dtype
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.schedule import LinearLogSNR
from undiffuse.runtime.device import to_device
from undiffuse.runtime.precision import autocast
from undiffuse.runtime.side_files import check_info


@dataclass(frozen=True)
class NoisyClassifierConfig:
    """``network`` as in `ModelConfig`; ``low`` and ``high`` bound the log-SNR that it is trained on and used at.

    ``pooling`` of the network's features is ``mean`` or ``attention``, see `undiffuse.networks.classifier_head`.
    """

    network: Settings = field(default_factory=lambda: {"kind": "unet"})
    low: float = -5.0
    high: float = 13.3
    kind: str = "classifier"
    pooling: str = "mean"


class NoisyClassifier(nn.Module):
    """p(label|x_t) for items of ``item_shape`` in the units of ``transform``; ``classes`` are the names of the labels.

    ``autocast`` is the dtype of matrix products in the network, if another than the weights'. Raises `ConfigError`.
    """

    def __init__(
        self,
        config: NoisyClassifierConfig,
        item_shape: tuple[int, ...],
        transform: DataTransform,
        classes: tuple[str, ...],
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.transform, self.info = config, transform, dict(info or {})
        self.item_shape, self.classes = tuple(item_shape), tuple(classes)
        self.autocast: torch.dtype | None = None
        self.schedule = LinearLogSNR(config.high, config.low)
        self.preconditioning = Preconditioning("unit", "log_snr")
        network, labels = build_network(config.network, self.item_shape, len(classes)), len(classes)
        self.network = make_classifier(network, labels, config.pooling, self.item_shape[1:])
        self.initial_tensors = {name: tensor.to("meta") for name, tensor in self.state_dict().items()}

    def forward(self, x_t: Tensor, level: NoiseLevel, network: nn.Module | None = None) -> Tensor:
        """log p(label|x_t) of every label, (B, labels) nats; ``level`` is () or (B,), ``network`` replaces its own."""
        network = self.network if network is None else network
        scaled = broadcast_like(self.preconditioning.input_scale(level), x_t) * x_t
        time = to_device(self.preconditioning.time_input(level), x_t.device, scaled.dtype).expand(len(x_t))
        with autocast(x_t.device, self.autocast):
            logits = network(scaled.to(weight_dtype(network, scaled.dtype)), time)
        return torch.log_softmax(logits.to(scaled.dtype), 1)

    def log_prob(self, x_t: Tensor, level: NoiseLevel, cond: Condition) -> Tensor:
        """log p(cond.label|x_t), (B,) nats, for `guidance.ClassifierGuided`.

        0 for the null label, and at log-SNRs outside the trained range. Raises `ConfigError` if there is no label, and
        as `check_labels` for labels on the CPU; those on a GPU are not read, which would wait for it at each call.
        """
        if cond.label is None:
            raise ConfigError("GUIDANCE", "condition.label", "a classifier guides to labels only", "Give a label")
        if cond.label.is_cpu:
            self.check_labels(cond)
        log_p = self(x_t, level).gather(1, cond.label.clamp(min=0)[:, None])[:, 0]
        inside = (level.log_snr >= self.config.low - 1e-6) & (level.log_snr <= self.config.high + 1e-6)
        return torch.where(to_device(inside, x_t.device) & (cond.label >= 0), log_p, 0.0)

    def check_labels(self, cond: Condition) -> None:
        """Raises `ConfigError` if a label of ``cond`` is not one of the classes."""
        if cond.label is not None and (highest := int(cond.label.max())) >= len(self.classes):
            cause = f"the classifier has no label {highest}"
            raise ConfigError("GUIDANCE", "condition.label", cause, f"Labels are 0 to {len(self.classes) - 1}")


def save(classifier: NoisyClassifier, path: str | Path) -> None:
    """`save_module` of a classifier."""
    description = {
        "config": asdict(classifier.config),
        "item_shape": list(classifier.item_shape),
        "transform": transforms.to_dict(classifier.transform),
        "classes": list(classifier.classes),
        "info": classifier.info,
    }
    save_module(classifier, path, "classifier", description)


def load(path: str | Path, device: torch.device | str = "cpu") -> NoisyClassifier:
    """`load_module` of a classifier."""
    source = "Give a run of `undiffuse train-classifier`"
    classifier = load_module(path, "classifier", _from_description, device, source)
    to_fast_layout(classifier.network)
    return classifier


def _from_description(plain: Any) -> NoisyClassifier:
    config = from_dict(NoisyClassifierConfig, plain["config"], "model")
    transform, shape = transforms.from_dict(plain["transform"]), tuple(plain["item_shape"])
    return NoisyClassifier(config, shape, transform, tuple(plain["classes"]), check_info(plain.get("info")))
