"""Finished parts of a long job, kept on disk so that an interrupted job resumes: samples and evaluation use it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from undiffuse.errors import CheckpointError
from undiffuse.runtime.tensor_file import read_tensors, write_tensors

Log = Callable[[str], None]
"""Receives a message, one line without a line break."""
Part = tuple[dict[str, Tensor], dict[str, str]]
"""The tensors of a part and its metadata."""
OTHER_JOB = "OTHER_JOB"
"""The code of the error for a part that another job wrote."""


class PartStore:
    """The parts of one job in ``folder``: a safetensors file each, whole or absent, with the sha256 of its contents.

    ``kind`` names the sort of job and ``key`` is the sha256 of its plan. Both stand in every part, so that a part of
    another job is recognized when it is read. The names of all parts match ``pattern``, a regular expression; files of
    other names are not ours and are left alone.
    """

    def __init__(self, folder: Path, kind: str, key: str, pattern: str) -> None:
        self.folder, self.kind, self.key, self.pattern = folder, kind, key, pattern

    def names(self) -> list[str]:
        """The names of the parts in the folder, sorted, whether or not they are whole."""
        return sorted(path.stem for path in self._files(r"\.safetensors"))

    def path(self, name: str) -> Path:
        """The file of the part ``name``."""
        return self.folder / f"{name}.safetensors"

    def write(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Writes a part durably. Raises `ResourceError`."""
        tags = {"undiffuse": self.kind, "plan": self.key, "batch": name}
        write_tensors(self.path(name), tensors, {**tags, **(metadata or {})})

    def read(self, name: str) -> Part:
        """The tensors and metadata of a part.

        Raises `CheckpointError` if the part is missing, damaged, or (with the code `OTHER_JOB`) of another job.
        """
        tensors, metadata = read_tensors(self.path(name))
        written_for = (metadata.get("undiffuse"), metadata.get("plan"), metadata.get("batch", name))
        if written_for != (self.kind, self.key, name):
            raise CheckpointError(OTHER_JOB, self.path(name), "it belongs to another job", "Remove it")
        return tensors, metadata

    def get(self, name: str, log: Log) -> Part | None:
        """The part, or None with a message to ``log`` where it cannot be used; None where it is missing."""
        if not self.path(name).exists():
            return None
        try:
            return self.read(name)
        except CheckpointError as error:
            log(f"computed again: {name}.safetensors, {error.cause}")
            return None

    def check(self, log: Log) -> list[str]:
        """The names of all usable parts; the others are removed, with a message to ``log`` for each damaged one."""
        usable = []
        for name in self.names():
            try:
                self.read(name)
                usable.append(name)
            except CheckpointError as error:
                if error.code != OTHER_JOB:
                    log(f"computed again: {name}.safetensors, {error.cause}")
                self.path(name).unlink()
        return usable

    def remove(self, keep: Collection[str] = ()) -> None:
        """Removes all parts but ``keep``, unfinished writes of parts, and the folder if nothing else is in it."""
        for path in self._files(r"\.safetensors(\.partial)?"):
            if path.name.removesuffix(".safetensors") not in keep:
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _files(self, ending: str) -> list[Path]:
        return [path for path in self.folder.glob("*") if re.fullmatch(f"({self.pattern}){ending}", path.name)]
