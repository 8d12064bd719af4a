"""A classifier of noisy items, p(label|x_t), for guidance by its gradient: the object and its file.

It is told log-SNR and x_t/√(alpha² + sigma²), on which alone p(label|x_t) depends, so that it goes with a model of
any schedule. It is trained with log-SNR uniform over a range [Dhariwal21 §4: at the model's noise levels].
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse import codec as codecs
from undiffuse.checkpoint import FORMAT, fit_tensors, read_tensors, write_tensors
from undiffuse.codec import Codec
from undiffuse.conditioning import Condition
from undiffuse.config import Settings, build_part, from_dict
from undiffuse.denoiser import Preconditioning
from undiffuse.errors import CheckpointError, ConfigError
from undiffuse.networks import classifier as networks
from undiffuse.networks.norm import in_fast_layout
from undiffuse.process.level import NoiseLevel, like
from undiffuse.process.schedule import LinearLogSNR


@dataclass(frozen=True)
class ClassifierConfig:
    """``network`` as a model's; the range of log-SNR that it is trained on, outside of which it says nothing."""

    network: Settings = field(default_factory=lambda: {"kind": "unet"})
    low: float = -5.0
    high: float = 13.3
    kind: str = "classifier"


class Classifier(nn.Module):
    """p(label|x_t) over items of ``item_shape`` in the units of ``codec``; ``classes`` are the names of the labels.

    Raises `ConfigError`.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        item_shape: tuple[int, ...],
        codec: Codec,
        classes: tuple[str, ...],
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.item_shape, self.codec, self.classes = config, tuple(item_shape), codec, tuple(classes)
        self.info, self.autocast = dict(info or {}), False
        self.schedule = LinearLogSNR(config.high, config.low)
        self.told = Preconditioning("unit", "log_snr")
        channels, dims = self.item_shape[0], len(self.item_shape) - 1
        given = {"labels": len(classes), "channels": channels, **({"dims": dims} if dims else {})}
        self.network = build_part("network", networks.build, config.network, **given)

    def forward(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """log p(label|x_t) of every label, (B, labels) nats; ``level`` is () or (B,)."""
        scaled = like(self.told.input_scale(level), x_t) * x_t
        told = self.told.time_input(level).to(device=x_t.device, dtype=scaled.dtype).expand(len(x_t))
        fast = torch.autocast(x_t.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()
        with fast:
            said = self.network(scaled, told)
        return torch.log_softmax(said.to(scaled.dtype), 1)

    def log_prob(self, x_t: Tensor, level: NoiseLevel, cond: Condition) -> Tensor:
        """log p(cond.label|x_t), (B,) nats, for `guidance.ClassifierGuided`.

        0 for the null label, and where log-SNR is outside of the range that was trained on. Raises `ConfigError`.
        """
        if cond.label is None:
            cause = "a classifier guides to labels, and none is told"
            raise ConfigError("GUIDANCE", "condition.label", cause, "Give a label")
        each = self(x_t, level).gather(1, cond.label.clamp(min=0)[:, None])[:, 0]
        inside = (level.log_snr >= self.config.low - 1e-6) & (level.log_snr <= self.config.high + 1e-6)
        return torch.where(inside.to(x_t.device) & (cond.label >= 0), each, 0.0)


def save(classifier: Classifier, path: str | Path) -> None:
    """Writes weights and description to ``path``, whole or not at all."""
    described = {
        "config": asdict(classifier.config),
        "item_shape": list(classifier.item_shape),
        "codec": codecs.to_dict(classifier.codec),
        "classes": list(classifier.classes),
        "info": classifier.info,
    }
    text = json.dumps(described, sort_keys=True)
    write_tensors(Path(path), classifier.state_dict(), {"undiffuse": str(FORMAT), "classifier": text})


def load(path: str | Path, device: torch.device | str = "cpu") -> Classifier:
    """The classifier of a file or of a run folder, ready to use. Raises `CheckpointError`."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    tensors, metadata = read_tensors(path)
    if "classifier" not in metadata:
        fix = "Give a run of `undiffuse train-classifier`"
        raise CheckpointError("KIND", path, "this is no classifier", fix)
    try:
        d = json.loads(metadata["classifier"])
        config, codec = from_dict(ClassifierConfig, d["config"], "model"), codecs.from_dict(d["codec"])
        classifier = Classifier(config, tuple(d["item_shape"]), codec, tuple(d["classes"]), d["info"])
    except (ConfigError, LookupError, TypeError, ValueError, AttributeError) as error:
        cause = f"its description is not one that this version understands ({error})"
        raise CheckpointError("DESCRIPTION", path, cause[:300], "Use the version that wrote it") from None
    fit_tensors(path, classifier.state_dict(), tensors)
    classifier.load_state_dict(tensors)
    in_fast_layout(classifier.to(device).network)
    return classifier.eval()
