"""The notebooks of docs/notebooks: their form, and all code cells in order, with settings that take a second.

The cell with the tag `parameters` holds the settings; here others follow it. Cells are read from the JSON and run in
one namespace, so no Jupyter is needed.
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from undiffuse.evaluation import plan
from undiffuse.model.config import Config, ModelConfig, TrainConfig
from undiffuse.training import diffusion_task
from undiffuse.training.monitor import Monitor

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.ipynb"))}
LINK = re.compile(r"\]\(([^)#]+)#?[^)]*\)")
PATCHES = {"kind": "unet", "widths": (4,), "blocks": 1, "attention": (), "patch": 4}
TRAIN = TrainConfig(batch=8, max_steps=2, warmup=1, precision="float32", previews=1)
SCHEDULE = {"name": "linear_log_snr", "high": 6.0}
CONFIG = Config(ModelConfig(network=PATCHES, schedule=SCHEDULE, chain_length=8), TRAIN)
SIZES = {"items": 4, "mc_samples": 2}
SETTINGS: dict[str, dict[str, object]] = {
    "noise-by-hand": {"POINTS": 100, "STEPS": 20},
    "train-on-your-images": {"CONFIG": CONFIG, "SIZE": 8, "SAMPLES": 4, "STEPS": 3, "PIECES": 40},
    "likelihood": {"CONFIG": CONFIG, "SIZES": SIZES},
    "restore": {"CONFIG": CONFIG, "STEPS": 2},
}


def code(notebook: Mapping) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: Mapping, settings: Mapping[str, object]) -> dict[str, object]:
    """The names that the cells define; ``settings`` replace those of the cell with the tag `parameters`."""
    names: dict[str, object] = {"__name__": "notebook"}
    for number, cell in enumerate(code(notebook)):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert settings.keys() <= names.keys()
            names |= settings
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all notebooks run, so that two of them share a run of digits."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_all_cells_run(name, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Monitor, "_draw", lambda *_: None)
    monkeypatch.setattr(diffusion_task, "HELD_OUT_ITEMS", 4)
    monkeypatch.setattr(plan, "PLANNED_FRACTION", 0.002)
    names = run(NOTEBOOKS[name], SETTINGS[name])
    assert any(isinstance(value, Figure | Image.Image) for value in names.values()) or name == "restore"
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_small_and_has_no_outputs(name):
    """Outputs are not kept: they are large, differ on each machine, and would hide what the tests do not run."""
    notebook = NOTEBOOKS[name]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 20_000
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code(notebook))
    assert sum("parameters" in cell["metadata"].get("tags", ()) for cell in code(notebook)) == 1
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert notebook["cells"][0]["source"][0].startswith("# ")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_a_notebook_lead_somewhere(name):
    text = "".join("".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "markdown")
    for link in LINK.findall(text):
        assert (FOLDER / link).resolve().exists(), link


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_page_of_the_documentation_has_every_cell(name):
    """Without mkdocs, which the hook needs only to add the page to its files."""
    spec = importlib.util.spec_from_file_location("site_pages", FOLDER.parents[1] / "scripts" / "site_pages.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.page_of(NOTEBOOKS[name], name)
    cells = NOTEBOOKS[name]["cells"]
    assert all("".join(cell["source"]) in page for cell in cells[1:])
    assert page.count("```python") == sum(cell["cell_type"] == "code" for cell in cells)
    assert f'href="../{name}.ipynb"' in page
    assert (
        hook.on_page_markdown("[a](../b.ipynb) [c](https://d.org/e.ipynb)") == "[a](../b.md) [c](https://d.org/e.ipynb)"
    )


def test_the_page_lists_every_notebook():
    page = (FOLDER / "index.md").read_text()
    assert set(re.findall(r"\((\S+)\.ipynb\)", page)) == NOTEBOOKS.keys()
