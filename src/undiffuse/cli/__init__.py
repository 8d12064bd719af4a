"""The command line: faces only, no mathematics. Every error is one line; exit codes are in `undiffuse.errors`."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence

import typer

from undiffuse.cli.app import app
from undiffuse.data import BadFiles, Problem
from undiffuse.errors import UndiffuseError, printable
from undiffuse.train import Interrupted
from undiffuse.train.stop import StoppedAtOnce, ending_at_once

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # type: ignore[assignment]  # typer has click's or a copy

SHOWN = 20
"""Problems of files that are listed one by one."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns (to the shell: exits with) its code.

    0 done, 2 usage or configuration, 3 data, 4 checkpoint, 5 non-finite numbers, 6 resources, 130 and 143 signals.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        with ending_at_once():
            code = app(arguments, prog_name="undiffuse", standalone_mode=False) or 0
        if code == 130:  # typer's own way to say Ctrl-C
            _report(StoppedAtOnce.said, code, debug)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "undiffuse"
        cause = error.format_message().replace("\n", " ").rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
        code = _report(f"error[USAGE] {command}: {cause}. See '{command} --help'.", 2, debug)
    except (typer.Abort, KeyboardInterrupt):
        code = _report(StoppedAtOnce.said, 130, debug)
    except Interrupted as stopped:
        code = _report(stopped.said, stopped.exit_code, False)
    except BadFiles as error:
        _list(error.problems)
        code = _report(str(error), error.exit_code, debug)
    except UndiffuseError as error:
        code = _report(str(error), error.exit_code, debug)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        code = _report("error[MEMORY] undiffuse: out of memory. Use a smaller batch.", 6, debug)
    except OSError as error:
        place = error.filename or "undiffuse"
        code = _report(
            f"error[SYSTEM] {place}: {error.strerror or error}. Check the disk and the rights there.", 6, debug
        )
    except typer.Exit as done:
        code = done.exit_code
    return code


def _list(problems: Sequence[Problem]) -> None:
    """Prints all ``problems`` where there are several, one a line, as many as can be read."""
    if len(problems) == 1:
        return
    for path, code, reason in problems[:SHOWN]:
        print(printable(f"  {code} {path}: {reason}"), file=sys.stderr)
    if len(problems) > SHOWN:
        print(f"  and {len(problems) - SHOWN:,} more", file=sys.stderr)
    print("  --on-bad skip leaves out each file that cannot be taken", file=sys.stderr)


def _report(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    return code


def run() -> None:
    """The entry point of the installed command."""
    sys.exit(main())
