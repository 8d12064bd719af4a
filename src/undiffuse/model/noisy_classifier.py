"""A classifier of noisy items, p(label|x_t), for guidance by its gradient: the module and its file.

Its inputs are log-SNR and x_t/√(alpha² + sigma²), which determine p(label|x_t), so that it works with diffusion models
of any schedule. It is trained with log-SNR uniform over a range [Dhariwal21 §4: at the model's noise levels].
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.data import transform as transforms
from undiffuse.data.transform import DataTransform
from undiffuse.denoising.denoiser import Preconditioning
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.model.build import build_network
from undiffuse.model.config import Settings, from_dict
from undiffuse.networks.classifier_head import make_classifier
from undiffuse.networks.condition import Condition
from undiffuse.networks.norm import to_fast_layout
from undiffuse.networks.protocol import weight_dtype
from undiffuse.process.noise_level import NoiseLevel, broadcast_like
from undiffuse.process.schedule import LinearLogSNR
from undiffuse.runtime.device import kept_random_state, resolve_device
from undiffuse.runtime.side_files import check_info
from undiffuse.runtime.tensor_file import FORMAT, check_tensors, read_tensors, write_tensors


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
        time = self.preconditioning.time_input(level).to(device=x_t.device, dtype=scaled.dtype).expand(len(x_t))
        autocast = torch.autocast(x_t.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with autocast:
            logits = network(scaled.to(weight_dtype(network, scaled.dtype)), time)
        return torch.log_softmax(logits.to(scaled.dtype), 1)

    def log_prob(self, x_t: Tensor, level: NoiseLevel, cond: Condition) -> Tensor:
        """log p(cond.label|x_t), (B,) nats, for `guidance.ClassifierGuided`.

        0 for the null label, and at log-SNRs outside the trained range. Raises `ConfigError` if there is no label.
        """
        if cond.label is None:
            raise ConfigError("GUIDANCE", "condition.label", "a classifier guides to labels only", "Give a label")
        if (highest := int(cond.label.max())) >= len(self.classes):
            cause = f"the classifier has no label {highest}"
            raise ConfigError("GUIDANCE", "condition.label", cause, f"Labels are 0 to {len(self.classes) - 1}")
        log_p = self(x_t, level).gather(1, cond.label.clamp(min=0)[:, None])[:, 0]
        inside = (level.log_snr >= self.config.low - 1e-6) & (level.log_snr <= self.config.high + 1e-6)
        return torch.where(inside.to(x_t.device) & (cond.label >= 0), log_p, 0.0)


def save(classifier: NoisyClassifier, path: str | Path) -> None:
    """Write weights and description to ``path``, atomically.

    Raises `CheckpointError`, and writes nothing, for weights that `load` would refuse; `ResourceError`.
    """
    description = {
        "config": asdict(classifier.config),
        "item_shape": list(classifier.item_shape),
        "transform": transforms.to_dict(classifier.transform),
        "classes": list(classifier.classes),
        "info": classifier.info,
    }
    path, text = Path(path), json.dumps(description, sort_keys=True)
    check_tensors(path, classifier.initial_tensors, classifier.state_dict(), "Save a classifier as it was built")
    write_tensors(path, classifier.state_dict(), {"undiffuse": str(FORMAT), "classifier": text})


def load(path: str | Path, device: torch.device | str = "cpu") -> NoisyClassifier:
    """The classifier of a file or run folder, in evaluation mode on ``device``, a name of `resolve_device`.

    The global generator stays as it is. Raises `CheckpointError`, and `ConfigError` for a device that is not here.
    """
    path, device = Path(path), resolve_device(device)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, metadata = read_tensors(path)
    if "classifier" not in metadata:
        fix = "Give a run of `undiffuse train-classifier`"
        raise CheckpointError("KIND", path, "this is not a classifier", fix)
    try:
        d = json.loads(metadata["classifier"])
        config, transform = from_dict(NoisyClassifierConfig, d["config"], "model"), transforms.from_dict(d["transform"])
        info = check_info(d.get("info"))
        with kept_random_state():
            classifier = NoisyClassifier(config, tuple(d["item_shape"]), transform, tuple(d["classes"]), info)
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        cause = f"this version cannot read its description ({error})"
        raise CheckpointError("DESCRIPTION", path, cause[:300], "Use the version that wrote it") from None
    check_tensors(path, classifier.state_dict(), tensors)
    classifier.load_state_dict(tensors)
    to_fast_layout(classifier.to(device).network)
    return classifier.eval()
