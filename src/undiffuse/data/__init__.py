"""Data sets: a built-in name, an array file, a table or a folder of images becomes one packed, documented array."""

from __future__ import annotations

import difflib
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from undiffuse.data.array_files import PICKLES, SUFFIXES, load_array, load_conditions
from undiffuse.data.arrays import from_array
from undiffuse.data.builtin import BUILTIN, TOYS, digits, fashion_mnist, toy
from undiffuse.data.dataset import Dataset, Split, observed
from undiffuse.data.folder import Place, in_memory, load_folder
from undiffuse.data.hub import is_saved, load_saved
from undiffuse.data.image import Prepare
from undiffuse.data.pack import load_packed, told
from undiffuse.data.problems import BadFiles, Problem, Refused
from undiffuse.data.shards import load_shards, shards_of
from undiffuse.data.table import SUFFIXES as TABLES
from undiffuse.data.table import load_table
from undiffuse.errors import ConfigError

__all__ = ["BUILTIN", "BadFiles", "Dataset", "Prepare", "Problem", "Split", "from_array", "load", "load_array"]
__all__ += ["load_conditions", "load_folder", "load_saved", "load_shards", "load_table"]

FOLDER_OPTIONS = (*(f.name for f in fields(Prepare)), "on_bad")
ARRAY_OPTIONS = ("layout", "levels", "value_range")


def load(source: str | Path, *, folder: str | Path | None = None, place: Place = in_memory, **options: Any) -> Dataset:
    """The data set that ``source`` names: a built-in set, an array file, a table or a folder of images on this machine.

    ``folder`` is where fashion-mnist's files lie; ``place`` makes room for decoded images. ``options`` are those of
    ``Prepare`` and ``on_bad`` for folders, and of ``from_array`` for arrays (layout, levels, value_range); None and
    False mean not given. ConfigError for a name that is nothing and for an option that the source has no use for;
    DataError for what is wrong with the data; ResourceError where they do not fit into memory. No network is asked.
    """
    given = {key: value for key, value in options.items() if value is not None and value is not False}
    name, path = str(source), Path(source)
    if isinstance(source, str) and source in BUILTIN:
        _only(given, (), source)
        if folder is not None and source != "fashion-mnist":
            raise ConfigError("OPTION", "folder", f"{source} needs no folder", "Leave it out")
        data = observed(_builtin(source, folder))
        shadowed = f"a folder called {source} is here too; ./{source} would mean that one"
        return data.noted(shadowed) if os.path.exists(source) else data
    if folder is not None:
        raise ConfigError("OPTION", "folder", "only fashion-mnist is looked for in a folder", "Leave it out")
    if len(os.fsencode(name)) > 4096:
        raise Refused("PATH_TOO_LONG", "more than 4096 bytes").at(name[:40] + "...")
    if path.suffix.lower() in (*SUFFIXES, *PICKLES) and os.path.lexists(name) and not os.path.isdir(name):
        if path.suffix.lower() == ".npy" and told(path).is_file():
            _only(given, (), "a packed array")
            return load_packed(path)
        _only(given, ARRAY_OPTIONS, "an array file")
        return observed(load_array(path, **given))
    if path.suffix.lower() in TABLES and os.path.lexists(name) and not os.path.isdir(name):
        _only(given, (), "a table")
        return observed(load_table(path))
    if os.path.lexists(name) or os.sep in name or path.suffix:
        _only(given, FOLDER_OPTIONS, "a folder of images")
        on_bad = given.pop("on_bad", "stop")
        if is_saved(path):
            return observed(load_saved(path, Prepare(**given), on_bad))
        if shards_of(path):
            return observed(load_shards(path, Prepare(**given), on_bad))
        return observed(load_folder(path, Prepare(**given), on_bad, place))
    close = difflib.get_close_matches(name.lower(), BUILTIN, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? B" if close else "B"
    fix = f"{hint}uilt in are {', '.join(BUILTIN)}; or give a folder of images, an array file or a table"
    raise ConfigError("UNKNOWN_DATA", name, "is no built-in set, and no file or folder of that name is here", fix)


def _builtin(name: str, folder: str | Path | None) -> Dataset:
    if name in TOYS:
        return toy(name)
    if name == "digits":
        return digits()
    return fashion_mnist() if folder is None else fashion_mnist(folder)


def _only(given: dict[str, Any], known: tuple[str, ...], what: str) -> None:
    for key in given:
        if key not in known:
            fix = f"It takes {', '.join(known)}" if known else "Leave it out: it is taken as it is"
            raise ConfigError("OPTION", key, f"{what} has no use for it", fix)
