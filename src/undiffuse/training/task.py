"""What `fit` trains: a `Task` brings the model, its loss, and what is evaluated, drawn and saved.

The loop brings the rest: batches and noise, optimizer, averages of weights, checkpoints, several processes, signals,
the memory check and the handling of NaN. The model is an ``nn.Module`` with three more attributes:

``network``
    the part that is replicated or sharded over processes, and compiled. Several networks go into one module (such as
    an encoder and a decoder), each with a parameter group of its own where its learning rate, weight decay or betas
    differ. Parameters of the model outside it (such as a learned schedule's) are few and held by every process.
``item_shape``
    the shape of a data item, (C, ...) or (D,).
``info``
    a dict, stored in the model's file.

Networks that do not learn, such as a teacher, belong to the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from torch import Tensor, nn

from undiffuse.data.dataset import Dataset, Split
from undiffuse.evaluation.time_limit import TimeLimit
from undiffuse.model.config import TrainConfig
from undiffuse.runtime.tensor_file import check_tensors
from undiffuse.training.batches import Batch, Reader, values_of


class Evaluation(NamedTuple):
    """``numbers`` for the run's records, a ``summary`` for the line that is printed, ``details`` for lines below it."""

    numbers: dict[str, Any]
    summary: str
    details: Sequence[str] = ()


class Task(Protocol):
    """A kind of training. It holds its configuration and no state: the model is an argument everywhere."""

    config: Any
    """The recipe, a frozen dataclass with a field ``train`` (`TrainConfig`); stored in ``run.json``."""
    train_longer: ClassVar = "Give more --minutes (--extend continues this run), a smaller network or smaller items"
    """What to do about a run that has hardly trained."""

    def adapt(self, data: Dataset, settings: TrainConfig) -> Self:
        """The task with ``settings``, adapted to ``data``. Raises `ConfigError` or `DataError` if they do not fit."""
        ...

    def start_from(self, start: Any, path: Path) -> Self:
        """The task of a run that starts from the weights of the model ``start`` in ``path``; by default the same."""
        return self

    def load_initial_weights(self, model: Any, start: Any, path: Path) -> Sequence[str]:
        """Write the weights of ``start`` into ``model``, by default all; return notes. Raises `CheckpointError`."""
        weights = start.state_dict()
        check_tensors(path, model.state_dict(), weights)
        model.load_state_dict(weights)
        return ()

    def other_models(self) -> dict[str, Any]:
        """The models that training uses and does not train, by what they are; none by default."""
        return {}

    def notes(self) -> Sequence[str]:
        """Sentences about unusual settings, for the log and the model's notes; none by default."""
        return ()

    def build_model(self, data: Dataset, split: Split) -> Any:
        """The untrained model on the CPU; random weights come from torch's global generator, seeded by the loop."""
        ...

    def parameter_groups(self, model: Any) -> list[dict[str, Any]]:
        """The optimizer's groups: ``params``, ``lr_factor`` (a factor of ``train.lr``) and options of AdamW."""
        return [{"params": list(model.parameters()), "lr_factor": 1.0, "weight_decay": self.config.train.weight_decay}]

    def reader(self, model: Any, data: Dataset, split: Split, folder: Path | None) -> Reader:
        """What the batches of ``data`` are made of; ``folder`` is the run's, locked, or None for a trial of the memory.

        It may write into the folder what is computed once and read in every step. With several processes the first one
        calls it before the others.
        """
        return values_of(data)

    def loss(self, model: Any, batch: Batch, network: nn.Module) -> Tensor:
        """The loss of each item of ``batch``, (B,); ``network`` is called in place of ``model.network``."""
        ...

    def after_step(self, model: Any, batch: Batch, losses: Tensor) -> None:
        """Update state that is not learned by gradient, from the whole ``batch`` and its ``losses``, (B,)."""

    def extra_state(self, model: Any) -> dict[str, Tensor]:
        """The tensors that `after_step` updates; checkpoints store them and load into them; none by default."""
        return {}

    def evaluate(self, model: Any, data: Dataset, split: Split, final: bool, limit: TimeLimit) -> Evaluation:
        """Measure the averaged model with the same noise every time; ``final`` at the end of the run.

        ``limit`` decides how many items and noise levels are measured, which ``numbers`` and ``summary`` state if a run
        by the clock lacks the time for all. The model is in evaluation mode, and no gradients are recorded, here and in
        `draw`.
        """
        ...

    def draw(self, model: Any, data: Dataset, split: Split, folder: Path, step: int | None, limit: TimeLimit) -> None:
        """Write pictures of the averaged model at ``step`` into ``folder``, None at the end, within ``limit``."""
        ...

    def save(self, model: Any, path: Path) -> None:
        """Write the model's file."""
        ...

    def load(self, path: Path) -> Any:
        """The model of a file or run folder. Raises `CheckpointError`."""
        ...
