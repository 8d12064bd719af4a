"""How a command ends: its exit code, and one line on stderr for an error or a signal."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

import typer

from undiffuse.errors import UndiffuseError, printable
from undiffuse.runtime.atomic_file import remedy
from undiffuse.runtime.file_errors import BadFilesError
from undiffuse.runtime.signals import Interrupted, StoppedImmediately, signals_as_exceptions
from undiffuse.runtime.terminal import flush_streams

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # type: ignore[assignment]  # typer may vendor click

CLOSED_PIPE = 141
"""The exit code where the reader of the output has gone, as after SIGPIPE."""
MAX_LISTED_PROBLEMS = 20
"""Bad files that are listed one by one."""


def run(command: Callable[[], int], arguments: Sequence[str], debug: bool) -> int:
    """The exit code of ``command``; an error that a user can act on, or a signal, is reported."""
    try:
        with signals_as_exceptions():
            code = command()
        if code == 130:  # typer returns it after Ctrl-C
            _report(StoppedImmediately.message, code, debug)
    except UsageError as error:
        code = _report(_usage_line(error), 2, debug)
    except typer.Exit as exit_:
        code = exit_.exit_code
    except (typer.Abort, KeyboardInterrupt):
        code = _report(StoppedImmediately.message, 130, debug)
    except Interrupted as stopped:
        code = _report(stopped.message, stopped.exit_code, False)
    except UndiffuseError as error:
        if isinstance(error, BadFilesError):
            _list_problems(error)
        code = _report(_error_line(error, arguments), error.exit_code, debug)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        code = _report("error[MEMORY] undiffuse: out of memory. Use a smaller batch.", 6, debug)
    except SystemExit as closed:  # rich and typer end so where the reader of a pipe has gone
        left = closed.code
        code = CLOSED_PIPE if left == 1 else left if isinstance(left, int) else int(left is not None)
    except OSError as error:
        code = _report(_system_line(error), 6, debug)
    return code


def flush(code: int) -> int:
    """The exit code after what is buffered is written: ``code``, or that of a closed pipe or a full disk."""
    try:
        flush_streams()
    except OSError as error:
        return CLOSED_PIPE if isinstance(error, BrokenPipeError) else _report(_system_line(error), 6, False)
    return code


def _error_line(error: UndiffuseError, arguments: Sequence[str]) -> str:
    """The line of ``error`` with flags, or its own where the commands cannot be imported because of a plugin."""
    try:
        from undiffuse.cli.messages import error_line

        return error_line(error, arguments)
    except UndiffuseError as broken:
        return str(broken)


def _usage_line(error: Exception) -> str:
    """The line of a ``UsageError``: its cause, and where an unknown option belongs."""
    from undiffuse.cli.messages import config_hint

    context = getattr(error, "ctx", None)
    command = context.command_path if context else "undiffuse"
    cause = error.format_message().replace("\n", " ").rstrip(".")  # pyright: ignore[reportAttributeAccessIssue]
    hint = config_hint(getattr(error, "option_name", "")) if command.endswith(" train") else ""
    fix = hint or f"See '{command} --help'"
    return printable(f"error[USAGE] {command}: {cause}. {fix}.")


def _system_line(error: OSError) -> str:
    """The line of an error of the operating system that no other code has given a path."""
    return printable(f"error[SYSTEM] {error.filename or 'output'}: {error.strerror or error}. {remedy(error)}.")


def _list_problems(error: BadFilesError) -> None:
    """Print one line for each bad file, at most `MAX_LISTED_PROBLEMS`; nothing for a single or a common problem."""
    problems = error.problems
    if len(problems) == 1 or {problem.code for problem in problems} == {"ASPECT"}:
        return
    for path, code, reason in problems[:MAX_LISTED_PROBLEMS]:
        print(printable(f"  {code} {path}: {reason}"), file=sys.stderr)
    if len(problems) > MAX_LISTED_PROBLEMS:
        print(f"  and {len(problems) - MAX_LISTED_PROBLEMS:,} more", file=sys.stderr)
    if error.remedy:
        print("  Use --on-bad skip to leave out files that cannot be used", file=sys.stderr)


def _report(line: str, code: int, debug: bool) -> int:
    with suppress(OSError):  # the terminal may be closed
        if debug:
            traceback.print_exc()
        print(line, file=sys.stderr)
    return code
