"""Tables of results: as text on standard output, or with ``--json`` the same numbers as one JSON document.

A command that shows a table is decorated with `with_json` and calls `show`, so that it has the flag.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Annotated, Any

import typer

FLAG = "--json"
Flag = Annotated[
    bool,
    typer.Option(FLAG, help="Print the results as JSON on standard output, and all other lines on standard error."),
]
_document: ContextVar[dict[str, Any] | None] = ContextVar("document")
"""What is printed when the command ends; None while tables are printed as text."""


def with_json(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with the flag ``--json``, for the tables that it shows."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()]
    flag = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Flag)

    @functools.wraps(command)
    def wrapped(as_json: bool = False, **arguments: Any) -> None:
        with _results(as_json):
            command(**arguments)

    wrapped.__signature__ = signature.replace(parameters=[*parameters, flag])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in (*parameters, flag)}
    return wrapped


@contextmanager
def _results(as_json: bool) -> Iterator[None]:
    """Within the block, `show` prints text, or collects a document, and all that is printed goes to standard error.

    The document is printed at the end, also after an error, if there is anything in it.
    """
    document, out = ({} if as_json else None), sys.stdout
    token = _document.set(document)
    try:
        if document is None:
            yield
        else:
            with redirect_stdout(sys.stderr):
                yield
    finally:
        _document.reset(token)
        if document and os.environ.get("RANK", "0") == "0":  # of several processes the first one
            print(json.dumps(plain(document), indent=1, allow_nan=False), file=out)


def show(rows: Sequence[Mapping[str, Any]], title: str = "", **data: Any) -> None:
    """Print ``rows`` as a table, or with ``--json`` add ``data`` to the document: the same numbers, not rounded.

    A key names the unit of its numbers, or docs/hub.md does.
    """
    from undiffuse.report import table

    if _document.get() is None:
        table.render(rows, title)
    add(**data)


def add(**data: Any) -> None:
    """With ``--json``, add ``data`` to the document; without it, nothing."""
    if (document := _document.get()) is not None:
        document |= data


def plain(value: Any) -> Any:
    """``value`` as data of JSON, which has no NaN and no infinity: they become null; other objects become text."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
