"""Arguments and options that several commands share, the console, the device, the folder of a run."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undiffuse.data.sources.registry import SOURCES
from undiffuse.errors import ConfigError, ResourceError, counted
from undiffuse.runtime.terminal import as_argument as as_argument
from undiffuse.runtime.terminal import make_console

if TYPE_CHECKING:
    from torch import nn

    from undiffuse.runtime.distributed_group import ProcessGroup

console = make_console(soft_wrap=True, quiet=os.environ.get("RANK", "0") != "0")  # one process of several prints

DataArgument = Annotated[
    str,
    typer.Argument(help=f"One of: {', '.join(source.title for source in SOURCES)}.", metavar="DATA"),
]


def require_utf8(where: str | Path, path: str | Path) -> None:
    """Raise `ConfigError` of ``where`` if a ``path`` of model files is not valid UTF-8: safetensors opens no other."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        cause = "its name is not valid UTF-8, and model files cannot be opened there"
        raise ConfigError("PATH", where, cause, "Use a name in UTF-8") from None


def at_hand(context: typer.Context, value: Any) -> Any:
    """The ``value`` of an argument or option that names models, where ``hf:OWNER/NAME`` becomes a downloaded folder.

    It is the callback of all of them. Paths stay as they are. Raises what `require_utf8` and
    `undiffuse.runtime.hub.download` raise.
    """
    from undiffuse.runtime import hub

    if value is None or context.resilient_parsing:  # the latter while a shell completes a command
        return value
    if isinstance(value, list | tuple):
        return [at_hand(context, one) for one in value]
    require_utf8(value, value)
    text = Path(value).as_posix()  # where a path has other separators, a name has these
    return hub.download(hub.parse_name(text)).parent if hub.is_hub_name(text) else value


RunArgument = Annotated[
    Path,
    typer.Argument(
        help="A run folder, a model file (.safetensors), or hf:OWNER/NAME on the Hugging Face hub.",
        metavar="RUN",
        callback=at_hand,
    ),
]
Device = Annotated[
    str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, or another device of torch with float64.")
]
Precision = Annotated[
    str,
    typer.Option(
        help="Of the network's matrix products: float32, bfloat16, or auto: bfloat16 if the device multiplies in it "
        "fast, else float32."
    ),
]

MAX_COUNT = 1_000_000
"""The most calls, Monte Carlo samples or steps of a reference that a command takes; more would never end."""

NetworkFile = Annotated[
    str | None,
    typer.Option(
        "--network", metavar="FILE.py:NAME", help="A network of your own, a class in FILE.py. The file is run."
    ),
]

ARGUMENT = re.compile(r"\w\([^()]*\)|(?<![\w./=-])(?P<name>[a-z]\w*)=(?P<value>\"[^\"]*\"|'[^']*'|[\w.#-]*\w)")
"""A call, which stays as it is, or a Python argument in the text of an error, such as size=64."""

SETTING = re.compile(r"\btrain\.(\w+)")
"""A setting of [train] in the text of an error, such as train.lr."""

OPTION_LIST = re.compile(r"(?<=options are )[\w, ]+")


def register_network(text: str | None) -> type[nn.Module] | None:
    """The class of ``--network``, registered under its name so that its checkpoints load; None without the flag."""
    if text is None:
        return None
    from undiffuse.networks.registry import load_class, register

    cls = load_class(text)
    register(cls.__name__, cls)
    return cls


def network_option(text: str | None) -> str:
    """``--network`` as on the command line, after a space; empty without it."""
    return f" --network {shlex.quote(text)}" if text else ""


def resolve_device(name: str) -> str:
    """The device of ``--device`` as torch calls it, see `undiffuse.runtime.device`. Raises `ConfigError`."""
    from undiffuse.runtime import device

    try:
        return str(device.resolve_device(name))
    except ConfigError as error:
        raise ConfigError(error.code, f"--device {name}", error.cause, error.fix) from None


def log_of(group: ProcessGroup) -> Callable[[str], None]:
    """A function that prints a line on the console in the first process of ``group``, and nothing in the others."""
    return console.print if group.rank == 0 else lambda line: None


def limit_steps(steps: int, chain_length: int, log: Callable[[str], None] | None = None, what: str = "steps") -> int:
    """min(steps, chain_length); ``log`` (by default the console) gets a line if ``steps`` is larger."""
    if steps > chain_length:
        used = f"{counted(chain_length, 'step')} {'is' if chain_length == 1 else 'are'}"
        (log or console.print)(f"{steps:,} {what} exceed the model's chain: {used} used")
    return min(steps, chain_length)


def require_disk_space(flag: str, out: Path, size: int) -> None:
    """Raise `ResourceError` if ``flag`` asks for more than the ``size`` bytes that are free where ``out`` will be."""
    import shutil

    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if size > (free := shutil.disk_usage(place).free):
        cause = f"it needs {size:,} bytes in {out}, where {free:,} are free"
        raise ResourceError("DISK", flag, cause, "Give a smaller number, or another --out")


def bytes_per_value(num_values: int | None) -> int:
    """Bytes of a value in an array of items with ``num_values`` values; None: continuous."""
    return 4 if num_values is None else 1 if num_values <= 256 else 2


def require_memory_for(flag: str, size: int) -> None:
    """Raise `ResourceError` if ``flag`` asks for more than the memory of ``size`` bytes that may be used."""
    from undiffuse.runtime.machine import require_memory

    require_memory(size, flag, "Give a smaller number")


def run_folder(run: Path) -> Path:
    """The folder of a run, or the folder that contains a model file; of a model of the hub runs/OWNER--NAME."""
    from undiffuse.runtime import hub

    folder = run if run.is_dir() else run.parent
    name = hub.snapshot_name(folder)
    return folder if name is None else Path("runs") / name


def in_flags(text: str, flags: Mapping[str, str]) -> str:
    """``text`` with flags in place of Python arguments."""

    def spell(match: re.Match[str]) -> str:
        if match["name"] is None:
            return match[0]
        name, value = match["name"], match["value"].strip("'\"")
        return " ".join(flag_words(flags[name], True if value == "True" else value)) if name in flags else match[0]

    text = OPTION_LIST.sub(lambda match: re.sub(r"\w+", lambda name: flags.get(name[0], name[0]), match[0]), text)
    text = ARGUMENT.sub(spell, text)
    return SETTING.sub(lambda match: flags.get(match[1], match[0]), text)


def flag_words(flag: str, value: Any) -> list[str]:
    """The words that give ``value`` to ``flag`` on a command line."""
    return [flag] if value is True else [flag, str(value)]
