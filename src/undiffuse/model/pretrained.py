"""The methods of a model that the ecosystem around the Hugging Face hub expects.

What they do is in `undiffuse.training.pretrained`: a model card has the results of a run, which are above this layer.
Its functions are rows of a table, imported when they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from undiffuse.runtime.lazy_table import LazyTable, row

if TYPE_CHECKING:
    from typing import Self

    import torch

FUNCTIONS = LazyTable({name: row("training.pretrained", name) for name in ("load", "save", "push")})


class Pretrained:
    """A model that is read from and written to folders and the hub."""

    read_from: Path | None = None
    """The file that the model was read from; the results of its run, for the model card, are beside it."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: torch.device | str = "cpu",
        network: nn.Module | type[nn.Module] | None = None,
        precision: str = "float32",
    ) -> Self:
        """The model of a folder, a file, or a repository ``"hf:OWNER/NAME"`` or ``"hf:OWNER/NAME@REVISION"``.

        Only a string that begins with ``hf:`` reaches the network: the file is downloaded once, into the cache of
        huggingface_hub. ``device``, ``network`` and ``precision`` as in `undiffuse.load`. Raises `CheckpointError`,
        also for a path or a repository that does not exist; `ConfigError`; `ResourceError` if the hub is not reached.
        """
        return cast("Self", FUNCTIONS["load"](source, device, network, precision))

    def save_pretrained(self, folder: str | Path, license: str | None = None) -> Path:
        """Write model.safetensors and a model card, README.md, into ``folder``, which is returned.

        The card has the likelihood that `undiffuse evaluate` measured, if the model was read from a run and has its
        weights. ``license``: the hub's name of one, such as "mit". The folder may be new, empty, or one that this
        method wrote, and then its files are replaced unless they were edited. Raises `ConfigError` for another,
        `CheckpointError` for a model that cannot be loaded again, `ResourceError`.
        """
        return FUNCTIONS["save"](self, folder, license)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        message: str | None = None,
        license: str | None = None,
        card: str | None = None,
    ) -> str:
        """Write the files of `save_pretrained` to the repository ``OWNER/NAME``; the address of the commit.

        The repository is created if there is none, ``private`` if so; ``OWNER/NAME@BRANCH`` names a branch. Log in
        before: ``hf auth login``. ``message`` of the commit. ``card``: "keep" or "replace", for a card there that was
        edited; without it such a card is an error. Raises `ConfigError`, `CheckpointError`, and `ResourceError` where
        the hub is not reached or does not permit it.
        """
        return FUNCTIONS["push"](self, name, private, message, license, card)
