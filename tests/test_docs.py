"""What the documentation names exists: modules, functions, tests, pages, commands and their flags; the example runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import tomllib
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import quick_looks

import undiffuse
from undiffuse.data.transform import IntegerLevels
from undiffuse.model import checkpoint, presets
from undiffuse.model.config import Config, ModelConfig, TrainConfig, read, replace_train
from undiffuse.model.diffusion import Diffusion
from undiffuse.networks.registry import build, load_class
from undiffuse.process.schedule import SCHEDULES
from undiffuse.process.target import TARGETS
from undiffuse.process.time_sampling import (
    TIME_DISTRIBUTIONS,
    LogitNormal,
    LogNormalSigma,
    UniformSteps,
    UniformTime,
    loss_aware,
)
from undiffuse.process.weighting import WEIGHTS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

REFERENCE = ROOT / "docs/reference.md"
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def resolve(dotted: str) -> object:
    """What ``a.b.c`` is: the longest module that can be imported, then attributes (annotated fields too)."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AttributeError(dotted)


@cache
def defined(path: Path) -> set[str]:
    """The functions and classes of a file, by its syntax tree."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_the_reference_has_every_public_name_once():
    row = r"^::: undiffuse\.(\S+)\n    options: \{heading_level: 3, heading: (\w+), toc_label: \2\}$"
    listed = re.findall(row, REFERENCE.read_text(), re.M)
    expected = [(f"{module}.{name}", public) for public, (module, name) in undiffuse._SOURCE.items()]
    assert sorted(listed) == sorted(expected)


@page
def test_dotted_names_resolve(path: Path) -> None:
    for dotted in re.findall(r"(?<![\w/.\"-])undiffuse(?:\.[A-Za-z_]\w*)+", path.read_text()):
        resolve(dotted)


def module_table() -> dict[str, list[str]]:
    """The modules of each folder in the table of the layers, without those of its subfolders."""
    table = (ROOT / "docs/architecture.md").read_text().split("| --- | --- | --- |\n")[1].split("\n\n")[0]
    listed: dict[str, list[str]] = {}
    for row in table.splitlines():
        _, folder, modules, *_ = row.split("|")
        name = folder.strip(" `/") or list(listed)[-1]
        listed.setdefault(name, []).extend(re.findall(r"`(\w+)`", modules))
    return listed


def test_the_table_of_the_layers_has_every_module_once() -> None:
    listed, package = module_table(), ROOT / "src/undiffuse"
    assert listed.pop("cli") == []  # its row says: one module for each command
    modules = {folder: sorted(path.stem for path in (package / folder).glob("[!_]*.py")) for folder in listed}
    assert {folder: sorted(names) for folder, names in listed.items()} == modules
    assert {*listed, "cli"} == {path.parent.name for path in package.glob("*/*.py")}


@page
def test_tests_that_are_named_exist(path: Path) -> None:
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", path.read_text()):
        assert name in defined(ROOT / file), f"{file}::{name}"


@page
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\s-]", "", t).strip().lower().replace(" ", "-") for t in titles}, link


@page
def test_files_that_are_named_exist(path: Path) -> None:
    for file in re.findall(r"`((?:src|tests|scripts|docs|benchmarks)/[\w/.-]+\.\w+)`", path.read_text()):
        assert (ROOT / file).exists(), file


def test_cited_papers_are_listed() -> None:
    listed = set(re.findall(r"^- \[(\w+)\]", (ROOT / "docs/notation.md").read_text(), re.M))
    for path in [*PAGES, *sorted((ROOT / "src").rglob("*.py"))]:
        for brackets in re.findall(r"\[([^\[\]]+)\]", path.read_text()):
            for paper in brackets.split(";"):
                if cited := re.match(r"\s*([^\W\d_]{2,}\d\d[a-z]?)\b", paper):
                    assert cited[1] in listed or cited[1].islower(), f"{path.name}: [{cited[1]}]"


def test_every_number_of_the_mathematics_is_there_once_and_tested() -> None:
    text = (ROOT / "docs/maths.md").read_text()
    numbers = [int(n) for n in re.findall(r"^\*\*\((\d+)\)\*\*", text, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    rows = dict(re.findall(r"^\| (\d+) \|( (?:`|the same).*)\|$", text, re.M))
    assert sorted(map(int, rows)) == numbers
    assert all("tests/" in row and "::test_" in row for row in rows.values())


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.M | re.S)


@page
def test_examples_compile(path: Path) -> None:
    for source in blocks(path, "python"):
        compile(source, path.name, "exec")


def test_the_readmes_example_runs(tmp_path, monkeypatch, capsys) -> None:
    """As it is written, but for the training: `fit` is replaced by one that takes the same arguments."""
    configs: list[Config] = []
    signature = inspect.signature(undiffuse.fit)

    def fit(*args, **named) -> Path:
        given = signature.bind(*args, **named).arguments
        config, data, out = given["config"], given["data"], Path(given["out"])
        configs.append(config)
        network = {"kind": "unet", "widths": [8], "blocks": 1, "attention": []}
        model = replace(config.model, chain_length=2, network=network)
        out.mkdir(parents=True)
        diffusion = Diffusion(model, data.item_shape, IntegerLevels(data.num_values))
        checkpoint.save(diffusion, out / "model.safetensors")
        return out

    monkeypatch.setattr(undiffuse, "fit", fit)
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(256, size=(32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(f"photos/{i}.png")
    (source,) = blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    assert configs[0].train.minutes is not None or configs[0].train.max_steps is not None
    assert names["samples"].shape == (64, 3, 32, 32)
    assert "bits" in capsys.readouterr().out


def test_the_recipe_names_every_setting_and_can_be_read(tmp_path) -> None:
    _, whole, *_ = blocks(ROOT / "docs/recipes.md", "toml")
    for name, kind in (("model", ModelConfig), ("train", TrainConfig)):
        table = whole.partition(f"[{name}]\n")[2].partition("\n[")[0]
        assert set(re.findall(r"^(?:# )?(\w+) = ", table, re.M)) == {field.name for field in fields(kind)}
    for text in (whole, re.sub("^minutes", "# minutes", whole, flags=re.M).replace("# max_steps", "max_steps")):
        (tmp_path / "whole.toml").write_text(text)
        config = read(tmp_path / "whole.toml", Config())
        length = {"minutes": config.train.minutes, "max_steps": config.train.max_steps}
        network = {"kind": "unet", "widths": [64, 128], "blocks": 2, "attention": [1], "heads": 1}
        assert config == replace_train(Config(ModelConfig(network=network)), **length)
        Diffusion(config.model, (3, 8, 8), IntegerLevels(256))
    for text in blocks(ROOT / "docs/recipes.md", "toml"):
        (tmp_path / "part.toml").write_text(text)
        read(tmp_path / "part.toml", Config())


def test_the_recipe_of_the_transformer_trains(tmp_path) -> None:
    (text,) = (text for text in blocks(ROOT / "docs/recipes.md", "toml") if '{kind = "dit"' in text)
    (tmp_path / "dit.toml").write_text(text)
    recipe = replace_train(read(tmp_path / "dit.toml", Config()), max_steps=2, batch=4, precision="float32")
    recipe = replace(recipe, model=replace(recipe.model, network=recipe.model.network | {"depth": 1, "width": 48}))
    values = np.random.default_rng(0).integers(256, size=(20, 3, 8, 8))
    with quick_looks():
        data = undiffuse.from_array(values, num_values=256)
        run = undiffuse.fit(recipe, data, tmp_path / "run", device="cpu", quiet=True)
    model = undiffuse.load(run)
    assert model.network.layers[0].modulation.weight.abs().max() > 0
    assert (recipe.train.optimizer, recipe.model.target) == ("muon", {"name": "x"})


def test_the_network_of_the_page_trains_with_labels_and_loads(tmp_path) -> None:
    source, _ = blocks(ROOT / "docs/own-network.md", "python")
    (tmp_path / "my_net.py").write_text(source)
    network = load_class(f"{tmp_path / 'my_net.py'}:Net")
    (text,) = blocks(ROOT / "docs/own-network.md", "toml")
    (tmp_path / "net.toml").write_text(text)
    digits = presets.get("digits")
    recipe = read(tmp_path / "net.toml", replace(digits, model=replace(digits.model, network={"kind": "Net"})))
    recipe = replace_train(recipe, max_steps=2, minutes=None, batch=4, conditional=True)
    data = undiffuse.from_array(np.arange(20 * 64).reshape(20, 1, 8, 8) % 17, labels=np.arange(20) % 3, num_values=17)
    with quick_looks():
        run = undiffuse.fit(recipe, data, tmp_path / "run", device="cpu", quiet=True, network=network)
    model = undiffuse.load(run, network=network)
    trained = model.network.network  # in the head of probabilities
    assert (len(trained.blocks), trained.embed_label.num_embeddings) == (6, 4)
    condition = undiffuse.Condition(label=torch.tensor([2, -1]))
    assert model.sample(2, sampler=undiffuse.Sampler("ddim", 2), cond=condition).shape == (2, 1, 8, 8)


def test_the_recipe_of_adm_has_the_number_of_parameters_that_the_page_states(tmp_path) -> None:
    page = ROOT / "docs/recipes.md"
    (tmp_path / "adm64.toml").write_text(blocks(page, "toml")[-1])
    recipe = read(tmp_path / "adm64.toml", presets.get("adm"))
    with torch.device("meta"):
        network = build(**recipe.model.network, channels=3, out_channels=6, classes=1000)
    assert f"{sum(p.numel() for p in network.parameters()):,} parameters" in page.read_text()
    small, paper = presets.get("adm").model.network, recipe.model.network
    assert small["widths"] == tuple(width // 3 for width in paper["widths"][:3])
    assert {k: v for k, v in small.items() if paper[k] != v}.keys() == {"widths", "blocks", "attention"}


@pytest.mark.parametrize(
    ("setting", "table"),
    [("schedule", SCHEDULES), ("target", TARGETS), ("weight", WEIGHTS), ("times", TIME_DISTRIBUTIONS)],
)
def test_the_recipe_names_every_choice(setting, table) -> None:
    line, *_ = re.findall(rf"^{setting} = .*$", (ROOT / "docs/recipes.md").read_text(), re.M)
    assert set(table) <= set(re.findall(r"\w+", line))


def test_the_settings_of_every_choice_have_the_defaults_that_the_recipe_states() -> None:
    distributions = {"uniform": UniformTime, "log_normal_sigma": LogNormalSigma, "logit_normal": LogitNormal}
    tables = {
        "schedule": {name: SCHEDULES[name] for name in SCHEDULES},
        "target": {name: target.rule for name, target in TARGETS.items()},
        "weight": {name: weight.rule for name, weight in WEIGHTS.items()},
        "times": {**distributions, "loss_aware": loss_aware, "steps": UniformSteps},
    }
    text = (ROOT / "docs/recipes.md").read_text()
    rows = re.findall(r"^\| (?:`(\w+)` )?\| ((?:`\w+`(?:, )?)+) \|(.*) ?\|$", text, re.M)
    table, seen = "", set()
    for name, choices, settings in rows:
        table = name or table
        if table not in tables:
            continue
        for choice in re.findall(r"\w+", choices):
            seen.add((table, choice))
            defaults = {key: p.default for key, p in inspect.signature(tables[table][choice]).parameters.items()}
            for key, value in re.findall(r"`(\w+) = (.*?)`", settings):
                stated = float(value) if value == "inf" else tomllib.loads(f"x = {value}")["x"]
                assert defaults[key] == stated, (table, choice, key)
    every = {(table, choice) for table, choices in tables.items() for choice in choices}
    assert seen == every - {("target", name) for name in TARGETS if name != "edm"}
    assert set(tables["times"]) == set(TIME_DISTRIBUTIONS)


def commands() -> dict[str, set[str]]:
    """The flags of each command."""
    import typer

    from undiffuse.cli.app import app

    group = typer.main.get_command(app)
    return {name: {o for p in c.params for o in p.opts if o.startswith("--")} for name, c in group.commands.items()}


@page
def test_commands_and_flags_exist(path: Path) -> None:
    known = commands()
    for line in re.findall(r"^\$ undiffuse (.*)$", "\n".join(blocks(path, "console")), re.M):
        name, *rest = line.partition("#")[0].split()
        assert name in known, line
        assert {word for word in rest if word.startswith("--")} <= known[name], line


def test_the_page_of_commands_has_every_command_once() -> None:
    rows = re.findall(r"^\| `undiffuse ([\w-]+)", (ROOT / "docs" / "commands.md").read_text(), re.M)
    assert sorted(rows) == sorted(commands())


def test_the_checks_can_fail() -> None:
    with pytest.raises(AttributeError):
        resolve("undiffuse.process.noise_level.nothing")
    with pytest.raises(AttributeError):
        resolve("nothing_at_all.here")
    assert resolve("undiffuse.process.gaussian.Gaussian.kl") is sys.modules["undiffuse.process.gaussian"].Gaussian.kl
    assert "test_the_checks_can_fail" in defined(Path(__file__))
