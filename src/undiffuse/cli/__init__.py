"""The command line. An error is one line on stderr; exit codes are listed in `undiffuse.errors`.

This module imports nothing that takes time, so that Ctrl-C during the imports of the others ends in one line too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0 success, 2 usage or configuration, 3 data, 4 checkpoint, 5 NaN or infinity, 6 resources, 129, 130 and 143 signals,
    141 a closed pipe.
    """
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]

    def command() -> int:
        from undiffuse.cli.app import app

        return app(arguments, prog_name="undiffuse", standalone_mode=False) or 0

    return guard(command, arguments, debug)


def guard(command: Callable[[], int], arguments: Sequence[str] = (), debug: bool = False) -> int:
    """The exit code of ``command``, which it returns; what stops it is printed in one line.

    ``arguments`` are those of the command line, for the flags in error messages.
    """
    try:
        from undiffuse.cli.error_lines import run

        return run(command, arguments, debug)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def run(program: Callable[[], int] = main) -> None:
    """Entry point of the installed command, and of another ``program`` that returns its exit code."""
    try:
        from undiffuse.runtime.terminal import prepare_streams

        prepare_streams()
        code = program()
        from undiffuse.cli.error_lines import flush

        code = flush(code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code)
