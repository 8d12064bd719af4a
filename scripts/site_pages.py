"""Hook of mkdocs: pages for each notebook of docs/notebooks and for the records, which are not Markdown in docs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK_LINK = re.compile(r"(\]\([^)\s:]+)\.ipynb\)")
RECORDS = ("benchmarks/RECORDS.md", "benchmarks/records/*/README.md")


def page_of(notebook: dict[str, Any], name: str) -> str:
    """The Markdown of ``notebook``: its text, its code as blocks, and a link to the file after the title."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
    title, _, rest = parts[0].partition("\n")
    parts[0] = f'{title}\n\n<a href="../{name}.ipynb" download>Download this notebook</a>\n{rest}'
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            content = page_of(json.loads(file.content_string), file.name)
            files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=content))
    for path in (path for pattern in RECORDS for path in sorted(ROOT.glob(pattern))):
        content = path.read_text(encoding="utf-8").replace("](../docs/", "](../")
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``markdown`` with links to the pages above: of a notebook in place of the file, of records inside the site."""
    return NOTEBOOK_LINK.sub(r"\1.md)", markdown).replace("](../benchmarks/", "](benchmarks/")
