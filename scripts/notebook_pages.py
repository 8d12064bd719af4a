"""Hook of mkdocs: a page for each notebook of docs/notebooks, made of its cells; links to notebooks lead to it."""

from __future__ import annotations

import json
import re
from typing import Any

LINK = re.compile(r"(\]\([^)\s:]+)\.ipynb\)")


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
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return LINK.sub(r"\1.md)", markdown)
