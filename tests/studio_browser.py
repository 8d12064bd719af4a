"""A tab of a browser on the studio: its console, what axe finds, the controls that it has and those that are used."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

AXE = Path(__file__).parents[1] / "studio-web/node_modules/axe-core/axe.min.js"
SECONDS = 60_000
"""Milliseconds that a job may take on a busy machine."""
RECORDER = """
const found = new Set(), used = new Set();
const controls = "a[href], button, input, select, textarea, summary, fieldset, [tabindex], [role=slider]";
const tidy = (text) => text.replace(/, \\d+ pixels?$/, "").replace(/\\b\\d+\\b/, "#").trim();
function name(node) {
  const label = node.closest("label.field")?.querySelector("span");
  const named = node.getAttribute("aria-label") ?? node.querySelector("legend")?.textContent;
  const place = node.closest("[role=tabpanel]")?.id.replace("view-", "") ?? "page";
  const kind = node.getAttribute("role") ?? node.type ?? node.localName;
  return `${place}: ${kind} ${tidy(named ?? label?.textContent ?? node.textContent).split(":")[0]}`;
}
function record(what, event) {
  const node = event.target.closest?.(controls);
  if (node) used.add(name(node) + what(event));
}
const nothing = () => "", key = (e) => `, ${e.key === " " ? "Space" : e.key}`;
const pointer = (e) => (e.button === 2 ? ", right button" : e.shiftKey ? ", shift" : "");
const events = [["click", nothing], ["input", nothing], ["change", nothing], ["keydown", key], ["pointerdown", pointer],
  ["dragover", () => ", over"], ["dragleave", () => ", out"], ["drop", () => ", drop"], ["paste", () => ", paste"],
  ["focusin", (e) => (e.target.localName === "pre" ? "" : ", focus")]];
for (const [type, what] of events)
  document.addEventListener(type, (event) => record(what, event), true);
let waiting = false;
new MutationObserver(() => {
  if (waiting) return;
  waiting = true;
  setTimeout(() => {
    waiting = false;
    for (const node of document.querySelectorAll(controls)) found.add(name(node));
  }, 20);
}).observe(document, {subtree: true, childList: true});
window.studioControls = () => ({found: [...found], used: [...used]});
"""


class Controls:
    """The controls that the tabs of a session had, and those that were used, as "view: kind name"."""

    def __init__(self):
        self.found, self.used = set(), set()

    def add(self, page):
        recorded = page.evaluate("window.studioControls?.() ?? {found: [], used: []}")
        self.found |= set(recorded["found"])
        self.used |= set(recorded["used"])


class Tab:
    """A tab on the studio; `problems` are what the console and the page reported."""

    controls = Controls()

    def __init__(self, browser, address, width=1280, scheme="light"):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page, self.problems = self.context.new_page(), []
        self.page.set_default_timeout(SECONDS)
        self.page.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        if address:
            self.page.add_init_script(RECORDER)
            self.page.goto(address)
            self.page.wait_for_selector("canvas:not(.empty)")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.controls.add(self.page)
        problems = list(self.problems)
        self.context.close()
        assert error[0] or not problems, problems

    def open(self, view):
        self.page.get_by_role("tab", name=view).click()
        return self.page.get_by_role("tabpanel", name=view)

    def done(self, panel, count=1):
        """Wait until ``count`` jobs of the panel are done."""
        panel.get_by_role("status").filter(has_text=re.compile("^done$")).nth(count - 1).wait_for()

    def axe(self):
        """The serious faults that axe finds."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(AXE.read_text())
        found = self.page.evaluate("axe.run(document)")["violations"]
        serious = [one for one in found if one["impact"] in ("serious", "critical", "moderate")]
        return [f"{one['id']}: {[node['html'][:150] for node in one['nodes']][:3]}" for one in serious]


def saved(panel, name, folder):
    """The file that a button saves."""
    with panel.page.expect_download() as download:
        panel.get_by_role("button", name=f"Save {name}").first.click()
    path = folder / name
    download.value.save_as(path)
    return path


def read(path):
    """A PNG file as grey levels."""
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def give_file(fieldset, event, path, name):
    """Drag a file over the place of an image, and drop or paste it there."""
    content = list(path.read_bytes())
    data = fieldset.page.evaluate_handle(
        "([bytes, name]) => { const data = new DataTransfer();"
        " data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'})); return data; }",
        [content, name],
    )
    fieldset.dispatch_event("dragover", {"dataTransfer": data})
    fieldset.dispatch_event("dragleave", {"dataTransfer": data})
    fieldset.evaluate(
        "(node, [type, data]) => node.dispatchEvent(type === 'paste'"
        " ? new ClipboardEvent(type, {bubbles: true, clipboardData: data})"
        " : new DragEvent(type, {bubbles: true, cancelable: true, dataTransfer: data}))",
        [event, data],
    )
    fieldset.get_by_text(name, exact=True).wait_for()
