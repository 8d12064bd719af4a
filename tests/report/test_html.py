"""Markup: escapes, tables, pictures within their bytes, and the frame of a page."""

import base64
import hashlib
import io

import numpy as np
import pytest
from page_checks import Page, check_page
from PIL import Image

from undiffuse.report import html

HOSTILE = "</p><script>alert('x')</script>\"'&<img src=x onerror=y>\x00\u202e\ud800"


def test_text_and_attributes_are_escaped():
    written = html.element("p", HOSTILE, html.element("b", 1 < 2), None, title=HOSTILE, lang=None)
    page = Page(written)
    assert [name for name, _ in page.elements] == ["p", "b"]
    assert list(page.elements[0][1]) == ["title"]
    shown = HOSTILE.replace("\x00", "\\x00").replace("\u202e", "\\u202e").replace("\ud800", "\\ud800")
    assert page.elements[0][1]["title"] == shown
    assert page.texts == [("p", shown), ("b", "True")]


def test_a_table_names_its_rows_and_columns():
    written = html.table([{"what": "a", "x": (-1.0, 0.25)}, {"what": "b" * 30, "y": "-3 to <4"}], "of & things")
    page = Page(written)
    assert [(t["scope"], t.get("class")) for t in page.all("th")] == [("col", None)] * 3 + [
        ("row", None),
        ("row", "long"),
    ]
    assert [text for _, text in page.texts] == [
        "of & things",
        "what",
        "x",
        "y",
        "a",
        "−1.00 ± 0.25",
        "b" * 30,
        "−3 to <4",
    ]
    region = page.all("div")[0]
    assert (region["role"], region["tabindex"], region["aria-label"]) == ("region", "0", "of & things")


@pytest.mark.parametrize(("words", "shown"), [("-1.5", "−1.5"), ("≤ -.5", "≤ −.5"), ("dpm-2 a-b 1-2", "dpm-2 a-b 1-2")])
def test_the_sign_of_a_minus(words, shown):
    assert html.minus(words) == shown


@pytest.mark.parametrize(
    ("mode", "size", "budget", "kind"),
    [("L", 40, 5000, "png"), ("RGB", 40, 9000, "png"), ("RGB", 100, 28_000, "jpeg"), ("RGB", 600, 30_000, "jpeg")],
)
def test_a_picture_fits_into_its_bytes(mode, size, budget, kind):
    """Noise, which no format compresses: as it is where it fits, else by JPEG, else smaller."""
    shape = (size, size) + (3,) * (mode == "RGB")
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=shape).astype(np.uint8))
    tag = Page(html.picture(image, "noise", budget)).all("img")[0]
    head, content = tag["src"].split(",")
    assert head == f"data:image/{kind};base64"
    content = base64.b64decode(content)
    assert len(content) <= budget
    with Image.open(io.BytesIO(content)) as stored:
        assert stored.size == (int(tag["width"]), int(tag["height"]))
        if kind == "png":
            np.testing.assert_array_equal(np.asarray(stored), np.asarray(image))
        assert stored.size == image.size or budget == 30_000


def test_the_frame_of_a_page():
    written = html.page("A <b>", html.paragraph("head"), [("one", "One & only", ["text", html.code("x")])], "foot")
    page = check_page(written)
    assert written.startswith(f"<!doctype html>\n{html.MARK}\n")
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in written
    assert ("a", "One & only") in page.texts
    assert ("h1", "A <b>") in page.texts
    for rule in ("prefers-color-scheme:dark", "@media print", "max-width:30rem"):
        assert rule in page.style
