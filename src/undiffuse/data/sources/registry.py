"""The table of data sources, and `load`, which reads the data set that a name or a path stands for.

A new source is a module of this folder with the functions of `SourceModule`, and a row of `BUILT_IN_SOURCES`. The table
can be read without torch, numpy or PIL, because the command line makes its options from it: modules of sources are
imported by functions, when data are loaded. (They are functions and not names of modules: no text is ever imported as
code.)
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from undiffuse.errors import ConfigError, DataError, counted
from undiffuse.runtime.file_errors import FileError
from undiffuse.runtime.plugins import load_plugin, plugins

if TYPE_CHECKING:
    from undiffuse.data.dataset import Dataset
    from undiffuse.data.sources.image_folder import Allocator

MAX_PATH_BYTES = 4096


@dataclass(frozen=True)
class Option:
    """A keyword of `load`, and an option of every command that reads data.

    ``flag`` is its spelling on the command line where that is not ``--name``. An option that is not given is None, or
    False if its type is bool.
    """

    name: str
    type: Any
    help: str
    flag: str | None = None

    @property
    def default(self) -> bool | None:
        return False if self.type is bool else None

    @property
    def spelling(self) -> str:
        """The option as on the command line, such as --on-bad."""
        return self.flag or f"--{self.name.replace('_', '-')}"


class SourceModule(Protocol):
    """``sniff(source)``: whether this module reads it. ``load(source, **options)``: the data set."""

    def sniff(self, source: str | Path) -> bool: ...

    @property
    def load(self) -> Callable[..., Dataset]: ...


@dataclass(frozen=True)
class Source:
    """A row: ``title`` names the source in messages, ``module`` imports its module, ``options`` are those it takes.

    ``by_name``: it is recognized by a name and not by a path. ``allocates``: its `load` takes an ``allocate``.
    ``has_observations``: its notes contain those of `with_observations` already.
    """

    title: str
    module: Callable[[], SourceModule]
    options: tuple[Option, ...] = ()
    by_name: bool = False
    allocates: bool = False
    has_observations: bool = False


def _builtin() -> SourceModule:
    from undiffuse.data.sources import builtin

    return builtin


def _packed_array() -> SourceModule:
    from undiffuse.data.sources import packed_array

    return packed_array


def _array_files() -> SourceModule:
    from undiffuse.data.sources import array_files

    return array_files


def _idx_files() -> SourceModule:
    from undiffuse.data.sources import idx_files

    return idx_files


def _csv_table() -> SourceModule:
    from undiffuse.data.sources import csv_table

    return csv_table


def _hf_datasets() -> SourceModule:
    from undiffuse.data.sources import hf_datasets

    return hf_datasets


def _webdataset() -> SourceModule:
    from undiffuse.data.sources import webdataset

    return webdataset


def _image_folder() -> SourceModule:
    from undiffuse.data.sources import image_folder

    return image_folder


IMAGE_OPTIONS = (
    Option("size", int | None, "Resize images to this many pixels per side."),
    Option("crop", bool, "Crop images to their centre square first.", "--crop"),
    Option("channels", int | None, "Convert images to 1 (grey), 3 (RGB) or 4 (RGBA) channels."),
    Option("background", str | None, "Colour behind transparent pixels (default white)."),
    Option("frames", str | None, "Frames or pages of an image file that has several: first or all."),
    Option("upscale", bool, "Allow images to be enlarged to more than four times their side.", "--allow-upscale"),
    Option("on_bad", str | None, "What to do with unusable files: stop (default, lists all) or skip."),
)
CAPTION_OPTIONS = (
    Option("captions", bool, "Read a caption of each image, in place of labels.", "--captions"),
    Option(
        "text_encoder",
        str | None,
        "Encoder of captions: bytes (default, trained with the network), minilm or a folder.",
    ),
)
LABELS_OPTION = Option("with_labels", bool, "With --captions: keep labels beside captions.", "--with-labels")
FOLDER_OPTIONS = (
    *IMAGE_OPTIONS,
    *CAPTION_OPTIONS,
    LABELS_OPTION,
    Option(
        "split_folders", bool, "Take folders called train, val and test as parts, not as classes.", "--split-folders"
    ),
)
ARRAY_OPTIONS = (
    Option("layout", str | None, "Order of an array's dimensions, such as NHWC."),
    Option("num_values", int | None, "Number of values of integer data, which lie in 0 .. num_values - 1."),
    Option("value_range", tuple[float, float] | None, "Smallest and largest value of floating-point data."),
)

STAGE_OPTIONS = (
    Option("reduce_to", int | None, "Reduce images to this side, for the base of a cascade.", "--reduce"),
    Option("from_side", int | None, "Side of the low resolution, for a super-resolution model.", "--from"),
    Option("resolution_map", str | None, "How --reduce and --from reduce images: mean (default) or haar.", "--map"),
)
"""Options of every source: what is made of the data after they were read."""

BUILT_IN_SOURCES = (
    Source(
        "a built-in data set",
        _builtin,
        (Option("folder", Path | None, "Folder that contains the files of fashion-mnist."),),
        by_name=True,
    ),
    Source("a packed array", _packed_array, CAPTION_OPTIONS, has_observations=True),
    Source("an array file", _array_files, ARRAY_OPTIONS),
    Source("an idx file (MNIST's format)", _idx_files, ARRAY_OPTIONS),
    Source(
        "a table",
        _csv_table,
        (Option("label_column", str | None, "Column of a table that holds the classes (default label or labels)."),),
    ),
    Source("a folder of the library datasets", _hf_datasets, (*IMAGE_OPTIONS, *CAPTION_OPTIONS, LABELS_OPTION)),
    Source("a WebDataset", _webdataset, (*IMAGE_OPTIONS, *CAPTION_OPTIONS, LABELS_OPTION)),
    Source("a folder of images", _image_folder, FOLDER_OPTIONS, allocates=True),
)
SOURCES: tuple[Source, ...] = (
    *BUILT_IN_SOURCES[:-1],
    *map(load_plugin, plugins("undiffuse.sources").values()),
    BUILT_IN_SOURCES[-1],
)
"""In the order in which they are tried: the first one whose module recognizes the source reads it.

A plugin is a `Source` whose module must import nothing heavy. The last row reads every folder that no other one
recognizes."""

OPTIONS = {option.name: option for source in SOURCES for option in source.options}
OPTIONS |= {option.name: option for option in STAGE_OPTIONS}
"""All options, by name."""


def load(source: str | Path, *, allocate: Allocator | None = None, **options: Any) -> Dataset:
    """The data set of a built-in name or of a path: an array file, a table, or a folder of images.

    ``options`` are those of `SOURCES`, such as ``size``, ``crop``, ``channels``, ``on_bad`` and ``captions`` of image
    folders (docs/data.md); None and False mean "not given". ``allocate`` provides the array for decoded
    images. Raises `ConfigError` for an unknown name (UNKNOWN_DATA), a path that is no data (NOT_A_DIRECTORY) and an
    option that the source does not take (OPTION); `DataError` for bad data, also for a folder that two sources could
    read (AMBIGUOUS); `ResourceError` if the data do not fit into memory. Uses no network.
    """
    from undiffuse.data.dataset import with_observations

    if not isinstance(source, str | os.PathLike):
        cause = f"it is a {type(source).__name__}, neither a name nor a path"
        raise ConfigError("UNKNOWN_DATA", "source", cause, "Give one; from_array is for arrays and tensors")
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    stage = {option.name: given.pop(option.name) for option in STAGE_OPTIONS if option.name in given}
    name = os.fspath(source)
    if len(os.fsencode(name)) > MAX_PATH_BYTES:
        raise FileError("PATH_TOO_LONG", f"more than {MAX_PATH_BYTES} bytes").at(name[:40] + "...")
    row = next((row for row in SOURCES if row.module().sniff(source)), None)
    if row is None:
        raise _unknown(name)
    if not row.by_name and os.path.isdir(name):
        _check_unambiguous(row, Path(name))
    _check_options(row, given)
    if given.get("with_labels") and not given.get("captions"):
        cause = "it keeps labels beside captions, and captions are not read"
        raise ConfigError("OPTION", "with_labels", cause, "Give captions=True too, or leave it out")
    if row.allocates and allocate is not None:
        given["allocate"] = allocate
    encoder = _text_encoder(given)
    data = row.module().load(source, **given)
    if encoder is not None:
        from undiffuse.data.text_encoders import with_encoder

        data = with_encoder(data, encoder)
        given["text_encoder"] = encoder
    if not row.has_observations:
        data = with_observations(data)
    if row.by_name and os.path.exists(name):
        data = data.with_notes(f"{name} is the built-in data set; the file or folder of that name is ./{name}")
    given.pop("allocate", None)
    if stage:
        data, given = _stage(data, **stage), given | stage
    return data.with_origin(name if row.by_name else os.path.abspath(name), _plain_options(given))


def _stage(
    data: Dataset, reduce_to: int | None = None, from_side: int | None = None, resolution_map: str | None = None
) -> Dataset:
    """The stage of a cascade that the options name; with both, super-resolution up to ``reduce_to``."""
    from undiffuse.data.stage_data import reduce_data, split_data

    if reduce_to is None and from_side is None:
        cause = "it sets how images are reduced, but neither --reduce nor --from is given"
        raise ConfigError("OPTION", "--map", cause, "Give one of them, or leave it out")
    row = resolution_map or "mean"
    data = data if reduce_to is None else reduce_data(data, reduce_to, row)
    return data if from_side is None else split_data(data, from_side, row)


def _text_encoder(given: dict[str, Any]) -> str | None:
    """The option ``text_encoder``, taken out of those of the source; a folder as its absolute path."""
    encoder = given.pop("text_encoder", None)
    if encoder is None:
        return None
    if not given.get("captions"):
        raise ConfigError(
            "OPTION", "text_encoder", "it embeds captions, and these are not read", "Give captions=True too"
        )
    return os.path.abspath(encoder) if os.path.isdir(encoder) and encoder not in ("bytes", "minilm") else str(encoder)


def option_words(options: Mapping[str, Any]) -> list[str]:
    """The words that give ``options`` on a command line; those with their defaults are left out."""
    words = []
    for name, value in options.items():
        if value != OPTIONS[name].default:
            given = list(value) if isinstance(value, (tuple, list)) else [] if value is True else [value]
            words += [OPTIONS[name].spelling, *map(str, given)]
    return words


def path_of(source: str | Path) -> Path | None:
    """The absolute path that ``source`` stands for; None for the name of a built-in data set."""
    by_name = any(row.module().sniff(source) for row in SOURCES if row.by_name)
    return None if by_name else Path(os.path.abspath(source))


def as_source(path: str | Path) -> str:
    """``path`` as `load` reads it as a path: with ./ where it is the name of a built-in data set."""
    return str(path) if path_of(str(path)) is not None else f"./{path}"


def _plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` as data that JSON can represent and `load` accepts; paths are absolute."""

    def plain(name: str, value: Any) -> Any:
        if isinstance(value, tuple | list):
            return [plain(name, one) for one in value]
        if OPTIONS[name].type == Path | None:
            return os.path.abspath(value)
        return value.item() if hasattr(value, "item") else value  # NumPy's numbers

    return {name: plain(name, value) for name, value in options.items()}


def _check_options(row: Source, given: Mapping[str, Any]) -> None:
    accepted = [option.name for option in (*row.options, *STAGE_OPTIONS)]
    for name in given:
        if name not in accepted:
            fix = f"Its options are {', '.join(accepted)}"
            raise ConfigError("OPTION", name, f"{row.title} does not take this option", fix)


def _check_unambiguous(row: Source, folder: Path) -> None:
    """Raise `DataError` if another source than ``row`` could read the folder: no file is left out in silence."""
    from undiffuse.data.sources.folder_scan import scan_folder

    others = [other.title for other in SOURCES[SOURCES.index(row) + 1 : -1] if other.module().sniff(folder)]
    if row is not SOURCES[-1] and (count := len(scan_folder(folder).images)):
        others.append(counted(count, "image file"))
    if others:
        cause = f"contains {row.title} and also {' and '.join(others)}, and which are the data is unclear"
        fix = "Name the file or folder that is the data, or move the others elsewhere"
        raise DataError("AMBIGUOUS", folder, cause, fix)


def _unknown(name: str) -> ConfigError:
    """The error for a path, or else for a name, that no source recognizes."""
    from undiffuse.data.sources.builtin import BUILTIN

    *titles, last = [source.title for source in SOURCES]
    kinds = f"{', '.join(titles)} or {last}"
    if os.path.lexists(name) or os.sep in name or Path(name).suffix:
        cause = "is a file that no source of data reads" if os.path.exists(name) else "no such file or folder"
        return ConfigError("NOT_A_DIRECTORY", name, cause, f"Give {kinds}")
    close = difflib.get_close_matches(name.lower(), BUILTIN, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    fix = f"{hint}Built in are {', '.join(BUILTIN)}; DATA may be {kinds}"
    return ConfigError("UNKNOWN_DATA", name, "no built-in data set, file or folder has this name", fix)
