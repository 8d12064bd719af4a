"""What every page of a report has to be: well-formed, complete in itself, and readable without pictures."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br"}
URL = re.compile(r"https?:|//|url\(|@import|javascript:|file:", re.I)


class Page(HTMLParser):
    """A parsed page; raises AssertionError where elements are not closed in order, or where it requests something."""

    def __init__(self, written: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.style = ""
        self.feed(written)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute of {tag} occurs twice"
        self.elements.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        elif data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        return "\n".join(data for _, data in self.texts)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [values for name, values in self.elements if name == tag]


def check_page(written: str) -> Page:
    """``written`` parsed, after all that holds for every page is asserted."""
    assert len(written.encode()) <= 3_000_000
    page = Page(written)
    tags = {name for name, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "form", "base", "video", "audio", "source"}
    policies = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert URL.search(page.style) is None
    for tag, values in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in values), (tag, values)
        for name, value in values.items():
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                assert value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,", "#")), (tag, name)
    ids = [values["id"] for _, values in page.elements if "id" in values]
    assert len(ids) == len(set(ids))
    links = [values["href"][1:] for values in page.all("a")]
    assert set(links) <= set(ids)
    for image in page.all("img"):
        assert image["alt"]
        assert int(image["width"]) > 0
        assert int(image["height"]) > 0
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert svg["aria-label"]
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert len(page.all("h1")) == 1
    assert len(page.all("main")) == 1
    assert len(page.all("title")) >= 1
    return page
