"""Pages of HTML in one file: elements whose text is escaped, tables, embedded pictures, the frame with its style.

A page requests nothing: pictures are data URIs, and its Content-Security-Policy allows these and its own style alone.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from undiffuse.errors import printable
from undiffuse.report.page_style import STYLE
from undiffuse.report.table import cell

MARK = "<!-- undiffuse:report -->"
"""The second line of each page, by which it is recognized."""
VOID = {"meta", "img", "br"}
JPEG_QUALITY = 88
SHORT_NAME = 18
"""Characters of a row's name that are not broken into lines."""
MIN_SIDE = 16
"""Pixels to which a picture that is too large is not reduced further."""


class Markup(str):
    """A piece of HTML; all other text is escaped where it becomes part of one."""

    __slots__ = ()


def text(value: object) -> Markup:
    """``value`` as escaped text; control characters, direction marks and lone surrogates are spelled out."""
    return value if isinstance(value, Markup) else Markup(html.escape(printable(str(value))))


def join(*children: object) -> Markup:
    """The ``children`` in a row, those that are None left out."""
    return Markup("".join(text(child) for child in children if child is not None))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element with escaped ``children`` and ``attributes``: class_ is class, viewBox viewBox, aria_label aria-label.

    An attribute that is None is left out.
    """
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    words = "".join(f' {key}="{text(value)}"' for key, value in pairs)
    return Markup(f"<{name}{words}>" if name in VOID else f"<{name}{words}>{join(*children)}</{name}>")


def paragraph(*children: object, class_: str | None = None) -> Markup:
    return element("p", *children, class_=class_)


def code(words: str) -> Markup:
    return element("code", words)


def commands(*lines: str) -> Markup:
    """Commands of a shell."""
    return join(*(element("pre", code(line), class_="command") for line in lines))


def verbatim(lines: str) -> Markup:
    """Text of several lines in a fixed width."""
    return element("pre", element("code", Markup("\n".join(map(text, lines.splitlines())))))


def missing(what: str, command: str | None = None, reason: str = "", report: str | None = None) -> Markup:
    """A paragraph: ``what`` is not on the page, for which ``reason``, and the ``command`` that adds it.

    ``report``: the command that writes the page again, which is needed after any other ``command``.
    """
    adds = None if command is None else join(" ", code(command), " adds it.")
    if command is not None and report and not command.startswith(report):
        adds = join(" To add it, run ", code(command), ", and then ", code(report), ".")
    return paragraph(what, f": {reason}." if reason else ".", adds, class_="missing")


def table(rows: Iterable[Mapping[str, Any]], caption: str) -> Markup:
    """``rows`` under the names of their fields, as `undiffuse.report.table.render`; the first field names the row."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = element("tr", *(element("th", name, scope="col") for name in names))
    body = []
    for row in rows:
        cells = [element("td", minus(cell(row.get(name)).strip())) for name in names[1:]]
        body.append(element("tr", _row_name(cell(row.get(names[0])).strip()), *cells))
    content = element("table", _caption(caption), element("thead", head), element("tbody", *body))
    return element("div", content, class_="table numbers", tabindex=0, role="region", aria_label=caption)


def _caption(words: str) -> Markup:
    """A caption that stays in view where its table is wider than the screen."""
    return element("caption", element("span", words))


def _row_name(words: str) -> Markup:
    return element("th", words, scope="row", class_="long" if len(words) > SHORT_NAME else None)


def minus(words: str) -> str:
    """``words`` with the sign of a minus before negative numbers."""
    return re.sub(r"(?<![\w.])-(?=[\d.]*\d)", "−", words)


def settings(pairs: Iterable[tuple[str, object]]) -> Markup:
    """Many names with short values, in columns."""
    rows = [element("div", element("dt", name), element("dd", value)) for name, value in pairs]
    return element("dl", *rows, class_="settings")


def facts(pairs: Iterable[tuple[str, object]], caption: str) -> Markup:
    """A table of two columns without a head: names and values."""
    rows = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in pairs]
    content = element("table", _caption(caption), element("tbody", *rows))
    return element("div", content, class_="table facts", tabindex=0, role="region", aria_label=caption)


def figure(content: object, caption: object) -> Markup:
    return element("figure", content, element("figcaption", caption))


def picture(image: Image.Image, alt: str, max_bytes: int, plot: bool = False) -> Markup:
    """``image`` as an element that holds it, in at most ``max_bytes``; a ``plot`` is inverted on dark pages."""
    kind, content, shown = encode(image, max_bytes)
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    width, height = shown.size
    return element("img", src=source, alt=alt, width=width, height=height, class_="plot" if plot else None)


def encode(image: Image.Image, max_bytes: int) -> tuple[str, bytes, Image.Image]:
    """("png" or "jpeg", the bytes of the file, the image in it): PNG, else JPEG, else a smaller JPEG."""
    image = image.convert("RGB")
    palette = image.convert("L") if _is_grey(image) else image
    content = _saved(palette, "PNG", compress_level=6)
    if len(content) <= max_bytes:
        return "png", content, image
    while True:
        content = _saved(palette, "JPEG", quality=JPEG_QUALITY)
        if len(content) <= max_bytes or min(palette.size) <= MIN_SIDE:
            return "jpeg", content, palette
        factor = max(0.5, min(0.9, (max_bytes / len(content)) ** 0.5))
        size = tuple(max(1, round(side * factor)) for side in palette.size)
        palette = palette.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = image.split()
    return red.tobytes() == green.tobytes() == blue.tobytes()


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def section(name: str, title: str, *children: object) -> Markup:
    """A section that the page's contents link to as ``name``."""
    return element(
        "section", element("h2", title, id=f"{name}-title"), *children, id=name, aria_labelledby=f"{name}-title"
    )


def page(title: str, head: object, sections: Sequence[tuple[str, str, Sequence[object]]], foot: object) -> str:
    """A whole page: ``head`` below its ``title``, contents, and ``sections`` of name, title and content."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    metas = [
        element("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="generator", content="undiffuse"),
    ]
    links = [element("li", element("a", name, href=f"#{key}")) for key, name, _ in sections]
    contents = element("nav", element("ol", *links), aria_label="Contents")
    body = [section(key, name, *children) for key, name, children in sections]
    parts = [element("header", element("h1", title), head), contents, element("main", *body), element("footer", foot)]
    style = Markup(f"<style>{STYLE}</style>")
    lines = ["<!doctype html>", MARK, '<html lang="en">', element("head", *metas, element("title", title), style)]
    return "\n".join([*lines, element("body", *parts), "</html>", ""])
