"""The command line. An error is one line on stderr; exit codes are listed in `undiffuse.errors`."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Sequence

import typer

from undiffuse.cli.app import app
from undiffuse.errors import UndiffuseError, printable
from undiffuse.runtime.file_errors import BadFilesError, FileProblem
from undiffuse.runtime.signals import Interrupted, StoppedImmediately, sigterm_as_exception

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # type: ignore[assignment]  # typer may vendor click

MAX_LISTED_PROBLEMS = 20
"""Bad files that are listed one by one."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0 success, 2 usage or configuration, 3 data, 4 checkpoint, 5 NaN or infinity, 6 resources, 130 and 143 signals.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        with sigterm_as_exception():
            code = app(arguments, prog_name="undiffuse", standalone_mode=False) or 0
        if code == 130:  # typer returns it after Ctrl-C
            _report(StoppedImmediately.message, code, debug)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "undiffuse"
        cause = error.format_message().replace("\n", " ").rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
        code = _report(f"error[USAGE] {command}: {cause}. See '{command} --help'.", 2, debug)
    except (typer.Abort, KeyboardInterrupt):
        code = _report(StoppedImmediately.message, 130, debug)
    except Interrupted as stopped:
        code = _report(stopped.message, stopped.exit_code, False)
    except BadFilesError as error:
        _list_problems(error.problems)
        code = _report(str(error), error.exit_code, debug)
    except UndiffuseError as error:
        code = _report(str(error), error.exit_code, debug)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        code = _report("error[MEMORY] undiffuse: out of memory. Use a smaller batch.", 6, debug)
    except OSError as error:
        path, cause = error.filename or "undiffuse", error.strerror or error
        code = _report(f"error[SYSTEM] {path}: {cause}. Check the disk and the permissions.", 6, debug)
    except typer.Exit as exit_:
        code = exit_.exit_code
    return code


def _list_problems(problems: Sequence[FileProblem]) -> None:
    """Print one line for each bad file, at most `MAX_LISTED_PROBLEMS`; nothing for a single file."""
    if len(problems) == 1:
        return
    for path, code, reason in problems[:MAX_LISTED_PROBLEMS]:
        print(printable(f"  {code} {path}: {reason}"), file=sys.stderr)
    if len(problems) > MAX_LISTED_PROBLEMS:
        print(f"  and {len(problems) - MAX_LISTED_PROBLEMS:,} more", file=sys.stderr)
    print("  Use --on-bad skip to leave out files that cannot be used", file=sys.stderr)


def _report(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(line, file=sys.stderr)
    return code


def run() -> None:
    """Entry point of the installed command."""
    sys.exit(main())
